import { model, settings } from "./api.js";
import { chat } from "./chat.js";
import { documentView } from "./document.js";
import { strip } from "./strip.js";
import { tree } from "./tree.js";

const views = { chat, document: documentView, tree };
const made = {}; // each view is made once, and goes on when another is looked at
const place = document.getElementById("view");

function go() {
  const name = location.hash.slice(1) in views ? location.hash.slice(1) : "chat";
  made[name] ??= views[name]();
  place.replaceChildren(made[name]);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const numbers = new Set(["temperature", "top_p", "max_tokens", "seed"]);

document.getElementById("settings-button").addEventListener("click", () => {
  const values = settings.get();
  for (const field of form.elements) if (field.name) field.value = values[field.name] ?? "";
  dialog.showModal();
});
dialog.addEventListener("close", () => {
  if (dialog.returnValue !== "save") return;
  const given = [...form.elements].filter((field) => field.name && field.value !== "");
  settings.set(Object.fromEntries(given.map((field) => [field.name, numbers.has(field.name) ? Number(field.value) : field.value])));
  tellModel();
});

async function tellModel() {
  try {
    document.getElementById("model").textContent = await model();
  } catch (error) {
    document.getElementById("model").textContent = `(${error.message})`;
  }
}

addEventListener("hashchange", go);
go();
tellModel();
strip(document.getElementById("strip"));
