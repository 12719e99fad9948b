/** Handovers as edges that flow from prefill workers to decode workers; the list beside them says the same in numbers. */

import { arrange, attr, h, say, svg } from "./dom.js";
import { bytes, count, seconds } from "./format.js";

const MOST_ROWS = 24;
const MOST_NODES = 9;
const MOST_FLOWING = 20;
const ROW = { least: 26, most: 44, all: 180 };

export class Flows {
  constructor(onWorker) {
    this.onWorker = onWorker;
    this.edges = new Map();
    this.nodes = new Map();
    this.rows = new Map();
    this.from = h("div", { class: "flow-side" });
    this.to = h("div", { class: "flow-side flow-to" });
    this.picture = svg("svg", { class: "flow-edges", preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" });
    this.body = h("tbody");
    this.note = h("p", { class: "note" });
    this.empty = h("p", { class: "empty" }, "No KV cache was handed over in the last 30 s.");
    this.table = h("table", { class: "compact" },
      h("caption", { class: "hidden-label" }, "Handovers of the last 30 seconds, by pair of workers"),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Pair"), h("th", { scope: "col", class: "num" }, "Bytes/s"), h("th", { scope: "col", class: "num" }, "Each"), h("th", { scope: "col", class: "num" }, "Count"))),
      this.body);
    this.full = h("div", {}, h("div", { class: "flow" }, this.from, this.picture, this.to), h("div", { class: "scroll flow-list", tabindex: "0", role: "region", "aria-label": "Handovers by pair" }, this.table), this.note);
    this.sum = h("span", { class: "muted" });
    this.root = h("section", { class: "panel flows" }, h("header", { class: "panel-head" }, h("h2", {}, "Handovers"), this.sum), this.empty, this.full);
  }

  show(pairs, workers) {
    this.empty.hidden = pairs.length > 0;
    this.full.hidden = pairs.length === 0;
    const all = pairs.reduce((sum, pair) => sum + pair.bytes_per_s, 0);
    say(this.sum, pairs.length ? `${bytes(all)}/s, last 30 s` : "last 30 s");
    const sources = busiest(pairs, "source");
    const takers = busiest(pairs, "worker");
    const drawn = new Map();
    for (const pair of pairs) {
      const [source, worker] = [sources.place(pair.source), takers.place(pair.worker)];
      const id = `${source}\n${worker}`;
      if (!drawn.has(id)) drawn.set(id, { id, source, worker, bytes_per_s: 0 });
      drawn.get(id).bytes_per_s += pair.bytes_per_s;
    }
    this.side(this.from, sources, "from", workers);
    this.side(this.to, takers, "to", workers);
    this.draw([...drawn.values()], sources.names, takers.names);
    this.list(pairs.slice(0, MOST_ROWS));
    this.note.hidden = pairs.length <= MOST_ROWS;
    say(this.note, `The ${MOST_ROWS} busiest of ${count(pairs.length)} pairs.`);
  }

  side(parent, { names, others }, kind, workers) {
    arrange(parent, names.map((name) => {
      const id = `${kind} ${name}`;
      if (!this.nodes.has(id)) this.nodes.set(id, h("button", { type: "button", class: "node", tabindex: "-1", on: { click: () => this.onWorker(name) } }));
      const node = this.nodes.get(id);
      attr(node, "data-role", workers.get(name)?.role ?? "gone");
      say(node, name || `${count(others)} others`);
      node.classList.toggle("others", !name);
      return node;
    }));
  }

  draw(pairs, sources, takers) {
    const number = Math.max(sources.length, takers.length);
    const row = Math.round(Math.min(ROW.most, Math.max(ROW.least, ROW.all / number)));
    const height = number * row;
    this.from.style.setProperty("--row", `${row}px`);
    this.to.style.setProperty("--row", `${row}px`);
    attr(this.picture, "viewBox", `0 0 100 ${height}`);
    attr(this.picture, "height", String(height));
    const most = Math.max(...pairs.map((pair) => pair.bytes_per_s), 1);
    const middle = (list, name) => (list.indexOf(name) + 0.5) * row + (height - list.length * row) / 2;
    pairs.sort((one, other) => other.bytes_per_s - one.bytes_per_s);
    arrange(this.picture, pairs.map((pair, rank) => {
      if (!this.edges.has(pair.id)) {
        const base = svg("path", { class: "edge", "vector-effect": "non-scaling-stroke" });
        const flow = svg("path", { class: "edge-flow", "vector-effect": "non-scaling-stroke" });
        this.edges.set(pair.id, { group: svg("g", {}, base, flow), base, flow });
      }
      const edge = this.edges.get(pair.id);
      const y0 = middle(sources, pair.source);
      const y1 = middle(takers, pair.worker);
      const path = `M0 ${y0} C50 ${y0} 50 ${y1} 100 ${y1}`;
      const width = (1.2 + 6 * Math.sqrt(pair.bytes_per_s / most)).toFixed(1);
      for (const line of [edge.base, edge.flow]) {
        attr(line, "d", path);
        attr(line, "stroke-width", line === edge.base ? width : Math.max(1.2, width / 3).toFixed(1));
      }
      edge.flow.classList.toggle("still", rank >= MOST_FLOWING);
      return edge.group;
    }));
  }

  list(pairs) {
    arrange(this.body, pairs.map((pair) => {
      if (!this.rows.has(pair.id)) {
        const cells = [h("td", { class: "num" }), h("td", { class: "num" }), h("td", { class: "num" })];
        this.rows.set(pair.id, { row: h("tr", {}, h("td", { class: "pair" }, h("span", {}, pair.source), h("span", { class: "arrow", "aria-label": "to" }, " → "), h("span", {}, pair.worker)), cells), cells });
      }
      const { row, cells } = this.rows.get(pair.id);
      say(cells[0], bytes(pair.bytes_per_s));
      say(cells[1], seconds(pair.mean_s));
      say(cells[2], count(pair.count));
      return row;
    }));
  }
}

/** The busiest workers at one end, by name; "" stands for all others. */
function busiest(pairs, end) {
  const sums = new Map();
  for (const pair of pairs) sums.set(pair[end], (sums.get(pair[end]) || 0) + pair.bytes_per_s);
  const ranked = [...sums.keys()].sort((one, other) => sums.get(other) - sums.get(one) || byName(one, other));
  const told = ranked.length > MOST_NODES ? ranked.slice(0, MOST_NODES - 1) : ranked;
  const names = [...told].sort(byName);
  if (told.length < ranked.length) names.push("");
  return { names, others: ranked.length - told.length, place: (name) => (told.includes(name) ? name : "") };
}

function byName(one, other) {
  return one.localeCompare(other, "en", { numeric: true });
}
