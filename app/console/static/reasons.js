/** Why a request went where it went, as bars of seconds; and where its time went. */

import { h, share } from "./dom.js";
import { bytes, count, seconds } from "./format.js";

const PARTS = [["queue_s", "queue", "queue"], ["prefill_s", "prefill", "prefill"], ["handover_s", "handover", "handover"], ["first_step_s", "first step", "step"], ["decode_s", "decode", "decode"], ["inflicted_s", "slows others", "harm"]];
const FIRST = 8;

function same(one, other) {
  return other && one.prefill === other.prefill && one.decode === other.decode;
}

function pair(candidate) {
  return candidate.prefill === null ? `${candidate.decode}, alone` : `${candidate.prefill} → ${candidate.decode}`;
}

/** explanation: of GET or POST /v1/routes. */
export function reasons(explanation) {
  const { chosen } = explanation;
  const candidates = [...explanation.candidates].sort((one, other) => same(other, chosen) - same(one, chosen) || Boolean(one.gives_up) - Boolean(other.gives_up) || one.total_s - other.total_s);
  if (chosen && !candidates.some((each) => same(each, chosen))) candidates.unshift(chosen);
  if (!candidates.length) return h("p", { class: "empty" }, explanation.refused_because || "No way to serve it was weighed.");
  const most = Math.max(...candidates.map((each) => PARTS.reduce((sum, [name]) => sum + each[name], 0)), 1e-9);
  const list = h("ol", { class: "candidates" }, candidates.map((each, index) => row(each, same(each, chosen), most, index >= FIRST)));
  const more = candidates.length > FIRST && h("button", { type: "button", class: "plain", on: { click: (event) => { for (const item of list.children) item.hidden = false; event.target.remove(); } } }, `Show all ${candidates.length}`);
  return h("div", {}, legend(), list, more);
}

function legend() {
  return h("p", { class: "legend" }, PARTS.map(([, label, colour]) => h("span", {}, h("i", { class: `swatch part-${colour}`, "aria-hidden": "true" }), label)));
}

function row(candidate, isChosen, most, isHidden) {
  const bar = h("span", { class: "stack", role: "img", "aria-label": PARTS.filter(([name]) => candidate[name] > 0).map(([name, label]) => `${label} ${seconds(candidate[name])}`).join(", ") || "no time" }, PARTS.map(([name, label, colour]) => {
    const part = h("i", { class: `part-${colour}`, title: `${label} ${seconds(candidate[name])}` });
    share(part, "--share", candidate[name] / most);
    return part;
  }));
  const notes = [candidate.cached_tokens ? `${count(candidate.cached_tokens)} tokens cached` : "", candidate.gives_up ? `at the cost of: ${candidate.gives_up}` : ""].filter(Boolean).join(" · ");
  return h("li", { class: isChosen ? "chosen" : null, hidden: isHidden },
    h("span", { class: "candidate-name" }, h("span", {}, pair(candidate)), isChosen && h("b", { class: "badge" }, "chosen")),
    bar, h("span", { class: "num" }, seconds(candidate.total_s)), notes && h("span", { class: "candidate-note muted" }, notes));
}

/** The sentence above the bars. */
export function verdict(explanation) {
  const { chosen } = explanation;
  if (explanation.refused_because) return `It ${explanation.observed === undefined || !explanation.observed ? "is refused" : "was refused"}: ${explanation.refused_because}`;
  if (!chosen) return "It has no route yet.";
  const ttft = chosen.queue_s + chosen.prefill_s + (chosen.is_first_early ? 0 : chosen.handover_s + chosen.first_step_s);
  const held = explanation.held_because ? ` ${explanation.observed ? "It was held back" : "It is held back"}: ${explanation.held_because}.` : "";
  return `${chosen.prefill === null ? `${chosen.decode} computes and decodes it alone` : `${chosen.prefill} computes the prompt and hands over to ${chosen.decode}`}; first token predicted after ${seconds(ttft)}.${held}`;
}

/** timeline: as GET /v1/routes tells it. */
export function timelineOf(timeline) {
  const all = Math.max(timeline.end_s, 1e-9);
  const rows = timeline.stages.map((stage) => {
    const bar = h("span", { class: "lane", "aria-hidden": "true" }, h("i", { class: `part-${colourOf(stage.kind)}` }));
    share(bar, "--begin", stage.begin_s / all);
    share(bar, "--share", (stage.end_s - stage.begin_s) / all);
    const place = stage.source ? `${stage.source} → ${stage.worker}` : stage.worker ?? "gateway";
    const facts = [stage.tokens ? `${count(stage.tokens)} tokens` : "", stage.cached_tokens ? `${count(stage.cached_tokens)} cached` : "", stage.num_bytes ? bytes(stage.num_bytes) : ""].filter(Boolean).join(", ");
    return h("tr", {}, h("th", { scope: "row" }, stage.kind, stage.attempt > 1 && h("span", { class: "muted" }, ` (attempt ${stage.attempt})`)), h("td", { class: "lane-cell" }, bar), h("td", { class: "num" }, seconds(stage.end_s - stage.begin_s)), h("td", {}, place), h("td", { class: "muted" }, facts));
  });
  const breaks = (timeline.interruptions ?? []).map((each) => h("li", {}, `After ${seconds(each.at_s)} attempt ${each.attempt} ended with ${each.code}${each.worker ? ` on ${each.worker}` : ""}${each.is_migration ? ", and the answer went on elsewhere" : ""}.`));
  return h("div", {}, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Timeline" }, h("table", { class: "gantt" }, h("caption", { class: "hidden-label" }, "Stages of the request"), h("thead", { class: "hidden-label" }, h("tr", {}, ["Stage", "When", "Seconds", "Where", "What"].map((label) => h("th", { scope: "col" }, label)))), h("tbody", {}, rows))), breaks.length > 0 && h("ul", { class: "warnings" }, breaks));
}

export function colourOf(kind) {
  return { prepare: "idle", queue: "queue", wait: "queue", prefill: "prefill", handover: "handover", decode: "decode" }[kind] ?? "idle";
}
