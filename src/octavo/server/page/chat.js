import { events, model, samplingFields, settings } from "./api.js";
import { element, runs, tellError, view } from "./dom.js";

const messages = []; // outlives the view

export function chat() {
  const root = view("chat");
  const list = root.querySelector(".messages");
  const input = root.querySelector("textarea");

  const show = ({ role, content }) => {
    const text = element("div", { class: "text" }, content);
    list.append(element("li", { class: role }, element("strong", {}, role), text));
    text.scrollIntoView({ block: "nearest" });
    return text;
  };
  messages.forEach(show);

  runs(root.querySelector("form"), root.querySelector(".stop"), async (signal) => {
    const said = { role: "user", content: input.value };
    messages.push(said);
    show(said);
    input.value = "";
    const answer = { role: "assistant", content: "" };
    const place = show(answer);
    const { system } = settings.get();
    const all = system ? [{ role: "system", content: system }, ...messages] : [...messages];
    try {
      const body = { model: await model(), messages: all, stream: true, ...samplingFields() };
      for await (const event of events("v1/chat/completions", body, signal)) {
        answer.content += event.choices[0]?.delta?.content ?? "";
        place.textContent = answer.content;
        place.scrollIntoView({ block: "nearest" });
      }
    } catch (error) {
      tellError(place.parentElement, error);
    }
    messages.push(answer);
    input.focus();
  });
  root.querySelector(".clear").addEventListener("click", () => {
    messages.length = 0;
    list.replaceChildren();
    input.focus();
  });
  return root;
}
