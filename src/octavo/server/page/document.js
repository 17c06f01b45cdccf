import { call, events, model } from "./api.js";
import { element, runs, tellError, view } from "./dom.js";

export function documentView() {
  const root = view("document");
  const find = (name) => root.querySelector(`.${name}`);
  const [text, file, question, list, answer, progress] = ["text", "file", "question", "segments", "answer", "progress"].map(find);
  const [enough, now] = [find("enough"), find("answer-now")];
  let identity = null;

  file.addEventListener("change", async () => {
    if (file.files[0]) text.value = await file.files[0].text();
  });

  const say = async (verb, body = {}) => {
    try {
      await call(`v1/octavo/margins/${encodeURIComponent(identity)}/${verb}`, body);
    } catch (error) {
      tellError(progress, error);
    }
  };
  enough.addEventListener("click", () => say("stop_reading"));
  now.addEventListener("click", () => say("answer_now"));

  const notes = new Map(); // segment -> where its note stands
  const row = (segment, source) => {
    const note = element("div", { class: "note" }, "…");
    const part = element("p", { class: "part" }, source.slice(segment.start, segment.stop));
    const item = element("li", { id: `segment-${segment.index + 1}`, tabindex: "-1" }, part, note);
    notes.set(segment.index, note);
    return item;
  };

  const showNote = (margin, reviewing) => {
    const note = notes.get(margin.segment.index);
    const kept = margin.kept;
    const mark = kept === null ? "written" : kept ? "kept" : "dropped";
    const score = margin.score === null || margin.score === undefined ? "" : ` ${margin.score.toFixed(2)}`;
    const by = margin.judged_by === "person" ? ", by you" : "";
    const words = element("span", { class: "words" }, margin.text || "(nothing)");
    note.className = `note ${mark}`;
    note.replaceChildren(element("span", { class: "mark" }, `[${margin.segment.index + 1}] ${mark}${score}${by}`), words);
    if (!reviewing || kept === null) return;
    const segment = margin.segment.index;
    const edit = () => {
      const area = element("textarea", { "aria-label": `Words of note ${segment + 1}`, rows: "3" });
      area.value = margin.text;
      const save = element("button", { type: "button", onclick: () => say("edit", { segment, text: area.value }) }, "Save");
      note.replaceChildren(area, save);
      area.focus();
    };
    const button = (name, act) => element("button", { type: "button", onclick: act }, name);
    const buttons = [
      button("Accept", () => say("accept", { segment })),
      button("Reject", () => say("reject", { segment })),
      button("Edit", edit),
    ];
    note.append(element("div", { class: "buttons" }, ...buttons));
  };

  // Numbers in brackets in the answer lead to the segments whose notes they are.
  const cite = (told) => {
    const parts = told.split(/(\[\d+\])/);
    answer.replaceChildren(
      ...parts.map((part) => {
        const number = /^\[(\d+)\]$/.exec(part)?.[1];
        const known = number !== undefined && notes.has(Number(number) - 1);
        return known ? element("a", { href: `#segment-${number}`, onclick: jump }, part) : part;
      }),
    );
  };
  const jump = (event) => {
    event.preventDefault();
    const target = root.querySelector(event.currentTarget.getAttribute("href"));
    target?.focus();
    target?.scrollIntoView({ block: "center" });
  };

  runs(root.querySelector("form"), find("stop"), async (signal) => {
    const source = text.value;
    const review = find("review").checked;
    notes.clear();
    list.replaceChildren();
    answer.replaceChildren();
    progress.textContent = "Waiting…";
    let told = "";
    let reviewing = review;
    const body = {
      model: await model().catch(() => undefined),
      document: source,
      question: question.value,
      segment_tokens: Number(find("segment").value),
      prompts: {
        margin: "[{number}] {margin}\n",
        answer:
          "These notes were taken while the document was read. Each begins with its number in brackets.\n\n{margins}\n" +
          "Answer the question with the help of the document and the notes. Behind each statement give the number of " +
          "the note that says it, in brackets.\n\nQuestion: {question}",
      },
      review,
      stream: true,
    };
    try {
      for await (const event of events("v1/octavo/margins", body, signal)) {
        if (event.type === "begun") {
          identity = event.id;
          event.segments.forEach((segment) => list.append(row(segment, source)));
          enough.disabled = false;
          now.disabled = !review;
        } else if (event.type === "segment_read") {
          progress.textContent = `Read ${event.num_read} of ${event.num_segments} segments`;
        } else if (event.type === "margin_written" || event.type === "margin_decided") {
          showNote(event.margin, reviewing);
        } else if (event.type === "review_begun") {
          progress.textContent = "Judge the notes, or answer now";
        } else if (event.type === "answer_begun") {
          reviewing = false;
          enough.disabled = now.disabled = true;
          progress.textContent = "Answering…";
          list.querySelectorAll(".buttons").forEach((one) => one.remove());
        } else if (event.type === "answer_delta") {
          told += event.output.text;
          cite(told);
        } else if (event.type === "done") {
          const { usage } = event.result;
          progress.textContent = `Done: ${usage.completion_tokens} tokens written`;
        }
      }
    } catch (error) {
      progress.textContent = error.name === "AbortError" ? "Stopped" : "";
      tellError(progress, error);
    } finally {
      enough.disabled = now.disabled = true;
    }
  });
  return root;
}
