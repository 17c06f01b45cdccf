import { ask } from "./api.js";
import { element } from "./dom.js";

const SECONDS = 1;

// What the engine tells of itself, once a second while the page is seen.
export function strip(place) {
  let before = null;
  const meter = (name, value, most, told) =>
    element("span", { class: "figure" }, `${name} `, element("meter", { min: 0, max: most || 1, value, title: told }), ` ${told}`);
  const figure = (name, told) => element("span", { class: "figure" }, `${name} ${told}`);

  const show = (now) => {
    const used = now.blocks - now.available_blocks;
    const steps = before ? now.steps - before.steps : 0;
    const tokens = before ? now.stats.computed_tokens - before.stats.computed_tokens : 0;
    const asked = now.stats.query_tokens;
    place.replaceChildren(
      figure("running", now.running),
      figure("waiting", now.waiting),
      figure("tokens a step", steps ? (tokens / steps).toFixed(1) : "–"),
      meter("KV blocks", used, now.blocks, `${used} of ${now.blocks}`),
      figure("cached", now.cached_blocks),
      figure("shared by forks", now.stats.forked_tokens),
      figure("prefix hits", asked ? `${((100 * now.stats.hit_tokens) / asked).toFixed(0)} %` : "–"),
      ...(now.restarts ? [figure("restarts", now.restarts)] : []),
    );
    before = now;
  };

  const look = async () => {
    if (document.visibilityState === "visible") {
      try {
        show(await ask("v1/octavo/stats"));
      } catch (error) {
        place.replaceChildren(figure("the server says nothing:", error.message));
      }
    }
    setTimeout(look, 1000 * SECONDS);
  };
  look();
}
