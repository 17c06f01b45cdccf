import { ask, events, model, samplingFields } from "./api.js";
import { element, runs, tellError, view } from "./dom.js";

// Texts as a tree of what they begin with alike: { text, children, ends }.
export function grown(texts) {
  const root = { text: "", children: [], ends: [] };
  texts.forEach((words, index) => {
    let node = root;
    for (const word of words) {
      let next = node.children.find((child) => child.text === word);
      if (!next) node.children.push((next = { text: word, children: [], ends: [] }));
      node = next;
    }
    node.ends.push(index);
  });
  return root;
}

// A chain of nodes with one child each, on one line.
function line(node) {
  let text = node.text;
  let last = node;
  while (last.children.length === 1 && !last.ends.length) {
    last = last.children[0];
    text += last.text;
  }
  return { text, last };
}

function branch(node, label) {
  const { text, last } = line(node);
  const ends = last.ends.map((index) => label(index)).join(", ");
  const told = element("div", { class: "words" }, text, ends ? element("span", { class: "mark" }, ` ${ends}`) : "");
  const item = element("li", { role: "treeitem", tabindex: "0", "aria-expanded": last.children.length ? "true" : undefined }, told);
  if (last.children.length) {
    const group = element("ul", { role: "group" }, ...last.children.map((child) => branch(child, label)));
    item.append(group);
    item.addEventListener("keydown", (event) => {
      if (event.target !== item) return;
      const open = { ArrowRight: true, ArrowLeft: false }[event.key];
      if (open === undefined) return;
      group.hidden = !open;
      item.setAttribute("aria-expanded", String(open));
      event.preventDefault();
    });
  }
  return item;
}

export function tree() {
  const root = view("tree");
  const find = (name) => root.querySelector(`.${name}`);
  const place = find("growing");

  const draw = (texts, label) => {
    const { children, ends } = grown(texts);
    const node = { text: "", children, ends };
    place.replaceChildren(element("ul", { role: "none" }, ...(children.length ? children : [node]).map((one) => branch(one, label))));
  };

  runs(root.querySelector("form"), find("stop"), async (signal) => {
    const count = Number(find("count").value);
    const common = { model: await model().catch(() => undefined), prompt: find("prompt").value, max_tokens: Number(find("tokens").value) };
    place.replaceChildren();
    try {
      if (find("how").value === "beams") {
        const body = { ...common, beam_width: count, logprobs: 0 };
        const { outputs } = await ask("v1/octavo/beam_search", body, signal);
        draw(outputs.map((one) => pieces(one)), (index) => `${outputs[index].score.toFixed(2)}`);
        return;
      }
      const texts = Array.from({ length: count }, () => []);
      const ended = new Map();
      const { max_tokens, ...sampling } = samplingFields();
      const body = { ...common, ...sampling, n: count, stream: true };
      for await (const event of events("v1/completions", body, signal)) {
        for (const choice of event.choices) {
          if (choice.text) texts[choice.index].push(choice.text);
          if (choice.finish_reason) ended.set(choice.index, choice.finish_reason);
        }
        draw(texts, (index) => `#${index + 1} ${ended.get(index) ?? "…"}`);
      }
    } catch (error) {
      tellError(place, error);
    }
  });
  return root;
}

// An output by its tokens, as far as they are told; else by its words.
function pieces(output) {
  const tokens = output.logprobs?.content?.map((one) => one.token) ?? output.logprobs?.tokens;
  return tokens ?? output.text.split(/(?=\s)/);
}
