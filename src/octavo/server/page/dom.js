// Elements, made of text alone: nothing a model or a document says becomes markup.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function view(name) {
  return document.getElementById(`${name}-view`).content.cloneNode(true).firstElementChild;
}

export function tellError(place, error) {
  if (error.name === "AbortError") return;
  place.append(element("p", { class: "error", role: "alert" }, error.message));
}

// A form that starts something which can be stopped: `start` gets a signal, and is awaited.
export function runs(form, stop, start) {
  let controller = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (controller) return;
    controller = new AbortController();
    stop.disabled = false;
    try {
      await start(controller.signal);
    } finally {
      controller = null;
      stop.disabled = true;
    }
  });
  stop.addEventListener("click", () => controller?.abort());
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}
