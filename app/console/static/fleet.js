/** The first view: numbers, charts, handovers, workers. */

import { Chart } from "./charts.js";
import { h, say } from "./dom.js";
import { Flows } from "./flows.js";
import { count, percent, plain, seconds } from "./format.js";
import { Workers, health } from "./workers.js";

export class Fleet {
  constructor(root, store) {
    this.store = store;
    this.workers = new Workers(store);
    this.flows = new Flows((name) => this.workers.open(name));
    this.charts = {
      ttft: new Chart("Time to first token", percentiles(), seconds, { slo: true }),
      itl: new Chart("Time between tokens", percentiles(), seconds, { slo: true }),
      tokens: new Chart("Tokens per second", [{ label: "prefill", colour: "prefill" }, { label: "decode", colour: "decode" }], count),
      queue: new Chart("Requests", [{ label: "running", colour: "accent" }, { label: "waiting", colour: "prefill" }, { label: "in gateway", colour: "muted", dash: [2, 3] }], count),
    };
    this.charts.tokens.empty.textContent = this.charts.queue.empty.textContent = "Collecting …";
    this.numbers = new Map();
    this.kpis = h("dl", { class: "kpis panel" });
    this.warnings = h("ul", { class: "warnings", hidden: true });
    root.append(this.kpis, this.warnings, h("div", { class: "overview" }, h("div", { class: "charts" }, Object.values(this.charts).map((chart) => chart.root)), this.flows.root), this.workers.root);
  }

  show() {
    const store = this.store;
    const workers = store.shown().map(([, worker]) => worker);
    const sum = (name) => workers.reduce((all, worker) => all + worker[name], 0);
    const blocks = sum("num_blocks");
    const ready = workers.filter((worker) => !health(worker)).length;
    const ended = store.ended();
    this.number("Workers ready", `${ready} / ${workers.length}`, ready < workers.length ? "warn" : "");
    this.number("Decode tok/s", count(sum("decode_tokens_per_s")));
    this.number("Prefill tok/s", count(sum("prefill_tokens_per_s")));
    this.number("Requests/s", ended.per_s.toFixed(ended.per_s < 10 ? 1 : 0));
    this.number("Running", count(sum("num_running")));
    this.number("Waiting", count(sum("num_waiting") + (store.totals?.num_waiting ?? 0)));
    this.number("KV in use", percent(blocks - sum("free_blocks"), blocks));
    this.number("Cache hits", percent(sum("hit_tokens"), sum("prompt_tokens")));
    this.slo("TTFT p99", "ttft");
    this.slo("ITL p99", "itl");
    this.number("Failed, 30 s", count(ended.failed), ended.failed ? "bad" : "");
    const warnings = store.totals?.warnings ?? [];
    this.warnings.hidden = !warnings.length;
    if (this.told !== warnings.join("\n")) this.warnings.replaceChildren(...warnings.map((text) => h("li", {}, text)));
    this.told = warnings.join("\n");
    this.charts.ttft.show(store.percentiles("ttft", [0.5, 0.9, 0.99]), store.at, store.slo("ttft"));
    this.charts.itl.show(store.percentiles("itl", [0.5, 0.9, 0.99]), store.at, store.slo("itl"));
    this.charts.tokens.show(store.load("prefill", "decode"), store.at);
    this.charts.queue.show(store.load("running", "waiting", "queued"), store.at);
    this.flows.show(store.pairs(), store.workers);
    this.workers.show();
  }

  slo(label, name) {
    const value = this.store.recent(name, 0.99);
    const slo = this.store.slo(name);
    this.number(label, seconds(value), slo !== null && value > slo ? "bad" : "", slo === null ? "" : ` ≤ ${plain(slo)}`);
  }

  number(label, value, tone = "", unit = "") {
    if (!this.numbers.has(label)) {
      const told = { unit: h("span"), root: h("dd", { class: "num" }) };
      this.numbers.set(label, told);
      this.kpis.append(h("div", {}, h("dt", {}, label, told.unit), told.root));
    }
    const told = this.numbers.get(label);
    say(told.root, value);
    say(told.unit, unit);
    told.root.dataset.tone = tone;
  }
}

function percentiles() {
  return [{ label: "p50", colour: "accent", width: 2 }, { label: "p90", colour: "accent-2" }, { label: "p99", colour: "muted" }];
}
