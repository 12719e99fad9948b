/** The last requests, each with its stages in small; one of them in full. */

import { arrange, attr, h, say, share } from "./dom.js";
import { clock, count, seconds } from "./format.js";
import { colourOf, reasons, timelineOf, verdict } from "./reasons.js";
import { ask } from "./stream.js";

const MOST_ROWS = 100;

export class Requests {
  constructor(root, store) {
    this.store = store;
    this.rows = new Map();
    this.chosen = "";
    this.filter = h("input", { type: "search", id: "request-filter", placeholder: "Filter by id, worker, model, code …", "aria-label": "Filter requests", autocomplete: "off", spellcheck: "false", on: { input: () => this.show() } });
    this.failed = h("input", { type: "checkbox", on: { change: () => this.show() } });
    this.still = h("input", { type: "checkbox", on: { change: () => this.show() } });
    this.body = h("tbody");
    this.empty = h("p", { class: "empty" }, "No request has ended yet. The playground sends one.");
    const heads = [["Ended"], ["Request"], ["Stages"], ["TTFT", "num"], ["ITL", "num"], ["Total", "num"], ["Prompt", "num"], ["Answer", "num"], ["Workers"], ["Result"]];
    this.table = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Requests" }, h("table", { class: "requests" }, h("caption", { class: "hidden-label" }, "The last requests of this gateway"), h("thead", {}, h("tr", {}, heads.map(([label, kind]) => h("th", { scope: "col", class: kind }, label)))), this.body));
    this.detail = h("section", { class: "panel detail", "aria-live": "polite", "aria-label": "One request" }, h("p", { class: "empty" }, "Choose a request to see its timeline and the router's reasons."));
    const legend = h("p", { class: "legend" }, ["queue", "prefill", "handover", "decode"].map((kind) => h("span", {}, h("i", { class: `swatch part-${colourOf(kind)}`, "aria-hidden": "true" }), kind)));
    root.append(h("div", { class: "split" }, h("section", { class: "panel" }, h("header", { class: "panel-head wrap" }, h("h2", {}, "Requests"), legend, h("div", { class: "tools" }, this.filter, h("label", { class: "check" }, this.failed, " Failed only"), h("label", { class: "check" }, this.still, " Hold still"))), this.table, this.empty), this.detail));
  }

  show() {
    const text = this.filter.value.toLowerCase();
    const all = this.store.shownRequests();
    if (this.still.checked && this.rows.size) return;
    const found = all.filter((row) => (!this.failed.checked || row.code !== "ok") && (!text || `${row.id} ${row.model} ${row.prefill} ${row.decode} ${row.code}`.toLowerCase().includes(text))).slice(0, MOST_ROWS);
    this.table.hidden = !found.length;
    this.empty.hidden = found.length > 0;
    say(this.empty, all.length ? "No request matches." : "No request has ended yet. The playground sends one.");
    const wanted = new Map();
    for (const row of found) wanted.set(row.id, this.rows.get(row.id) ?? this.row(row));
    this.rows = wanted;
    arrange(this.body, wanted.values());
  }

  row(row) {
    const all = Math.max(row.end_s, 1e-9);
    const bar = h("span", { class: "lane lane-small", "aria-hidden": "true" }, row.stages.map(([kind, begin, end]) => {
      const part = h("i", { class: `part-${colourOf(kind)}` });
      share(part, "--begin", begin / all);
      share(part, "--share", (end - begin) / all);
      return part;
    }));
    const places = row.decode === null ? "–" : row.prefill && row.prefill !== row.decode ? `${row.prefill} → ${row.decode}` : row.decode;
    return h("tr", { data: { id: row.id }, "aria-selected": row.id === this.chosen ? "true" : null },
      h("td", { class: "num" }, clock(row.received_at + row.end_s)),
      h("td", {}, h("a", { href: `#requests/${encodeURIComponent(row.id)}`, class: "mono", title: row.id }, row.id.slice(0, 8))),
      h("td", { class: "lane-cell" }, bar),
      h("td", { class: "num" }, seconds(row.ttft_s)), h("td", { class: "num" }, seconds(row.itl_s)), h("td", { class: "num" }, seconds(row.end_s)),
      h("td", { class: "num" }, count(row.prompt_tokens), row.cached_tokens > 0 && h("span", { class: "muted", title: `${row.cached_tokens} tokens were cached` }, ` (${Math.round((100 * row.cached_tokens) / row.prompt_tokens)} %)`)),
      h("td", { class: "num" }, count(row.completion_tokens)),
      h("td", { class: "places" }, places, row.num_attempts > 1 && h("span", { class: "muted" }, ` · ${row.num_attempts} attempts`)),
      h("td", {}, h("span", { class: row.code === "ok" ? "muted" : "tone-bad" }, row.code)));
  }

  async open(id) {
    this.chosen = id;
    for (const [each, row] of this.rows) attr(row, "aria-selected", each === id ? "true" : null);
    if (!id) return;
    try {
      const told = await (await ask(`v1/routes/${encodeURIComponent(id)}`)).json();
      if (this.chosen === id) this.tell(told);
    } catch (error) {
      if (this.chosen === id) this.detail.replaceChildren(h("p", { class: "error" }, error.message));
    }
  }

  tell(told) {
    const timeline = told.timeline;
    const parts = [h("header", { class: "panel-head" }, h("h2", { class: "mono", tabindex: "-1" }, told.request), h("span", { class: "muted" }, told.policy))];
    if (timeline) parts.push(h("h3", {}, "Where its time went"), timelineOf(timeline));
    else parts.push(h("p", { class: "empty" }, "It has not ended yet."));
    for (const [index, attempt] of [...told.earlier, told].entries()) {
      parts.push(h("h3", {}, told.earlier.length ? `Why there: attempt ${attempt.attempt ?? index + 1}` : "Why there"), h("p", {}, verdict(attempt)), reasons(attempt));
    }
    this.detail.replaceChildren(...parts);
    if (matchMedia("(max-width: 1099px)").matches) this.detail.scrollIntoView({ block: "start" });
  }
}
