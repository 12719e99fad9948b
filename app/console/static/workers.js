/** The workers: a grid that stays readable with hundreds, or a table; filtered, sorted, one in full in a dialog. */

import { arrange, attr, h, say, share } from "./dom.js";
import { ago, brief, bytes, clock, count, percent, seconds } from "./format.js";

const ROLES = ["prefill", "decode", "both"];
const DENSE = 36;

const used = (worker) => (worker.num_blocks - worker.free_blocks) / worker.num_blocks;
const held = (worker) => worker.num_cached / worker.num_blocks;
const tokens = (worker) => worker.prefill_tokens_per_s + worker.decode_tokens_per_s;

/** What is wrong with a worker, in a word; "" if nothing is. */
export function health(worker) {
  if (worker.refused_because) return "refused";
  if (!worker.is_connected) return "lost";
  if (worker.state === "draining") return "draining";
  if (worker.becoming) return `→ ${worker.becoming}`;
  if (worker.is_stale) return "silent";
  return "";
}

const SORTS = {
  name: ["Name", (one, other) => one[0].localeCompare(other[0], "en", { numeric: true })],
  health: ["Health", by((worker) => (health(worker) ? 1 : 0))],
  tokens: ["Tokens/s", by(tokens)],
  queue: ["Queue", by((worker) => worker.num_waiting * 1e6 + worker.queue_s)],
  kv: ["KV in use", by(used)],
  hit: ["Hit rate", by((worker) => worker.hit_tokens / Math.max(1, worker.prompt_tokens))],
};

function by(value) {
  return (one, other) => value(other[1]) - value(one[1]) || SORTS.name[1](one, other);
}

const COLUMNS = [
  ["Role", (worker) => worker.role, "text"],
  ["Health", (worker) => health(worker) || "ready", "text"],
  ["Model", (worker) => worker.model, "text"],
  ["Prefill tok/s", (worker) => count(worker.prefill_tokens_per_s), "tokens"],
  ["Decode tok/s", (worker) => count(worker.decode_tokens_per_s), "tokens"],
  ["Running", (worker) => `${count(worker.num_running)} / ${count(worker.max_batch)}`],
  ["Waiting", (worker) => count(worker.num_waiting), "queue"],
  ["Queue", (worker) => seconds(worker.queue_s), "queue"],
  ["KV in use", (worker) => percent(used(worker), 1), "kv"],
  ["KV cached", (worker) => percent(held(worker), 1)],
  ["Hit rate", (worker) => percent(worker.hit_tokens, worker.prompt_tokens), "hit"],
  ["Busy", (worker) => percent(worker.utilisation, 1)],
  ["Slowdown", (worker) => `× ${worker.speed.toFixed(2)}`],
  ["Layout", (worker) => worker.layout.slice(0, 8) || "–", "text"],
];

export class Workers {
  constructor(store) {
    this.store = store;
    this.role = "";
    this.sort = "name";
    this.text = "";
    this.view = "grid";
    this.tiles = new Map();
    this.rows = new Map();
    this.current = null;
    this.opened = null;
    this.dialog = document.getElementById("worker-dialog");
    this.dialog.addEventListener("close", () => { this.opened = null; });
    this.dialog.addEventListener("click", (event) => { if (event.target === this.dialog) this.dialog.close(); });
    this.build();
  }

  build() {
    this.filter = h("input", { type: "search", id: "worker-filter", placeholder: "Filter by name, model, layout …", "aria-label": "Filter workers", autocomplete: "off", spellcheck: "false", on: { input: () => { this.text = this.filter.value.toLowerCase(); this.show(); } } });
    this.roles = ["", ...ROLES].map((role) => {
      const number = h("span", { class: "muted num" }, "0");
      const button = h("button", { type: "button", class: "segment", "aria-pressed": String(role === ""), data: { role }, on: { click: () => { this.role = role; this.show(); } } }, role ? h("i", { class: "swatch", "aria-hidden": "true" }) : null, role ? role[0].toUpperCase() + role.slice(1) : "All", " ", number);
      return { role, button, number };
    });
    this.sorting = h("select", { "aria-label": "Sort workers", on: { change: () => { this.sort = this.sorting.value; this.show(); } } }, Object.entries(SORTS).map(([id, [label]]) => h("option", { value: id }, label)));
    this.views = ["grid", "table"].map((view) => h("button", { type: "button", class: "segment", "aria-pressed": String(view === this.view), on: { click: () => { this.view = view; this.show(); } } }, view === "grid" ? "Grid" : "Table"));
    this.grid = h("div", { class: "tiles", role: "group", "aria-label": "Workers; arrow keys move, Enter opens", on: { keydown: (event) => this.move(event) } });
    this.body = h("tbody");
    this.heads = COLUMNS.map(([label, , kind]) => h("th", { scope: "col", class: kind === "text" ? null : "num" }, label));
    this.table = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Workers as a table" }, h("table", {}, h("caption", { class: "hidden-label" }, "Workers"), h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Worker"), this.heads)), this.body));
    this.empty = h("div", { class: "empty" });
    this.root = h("section", { class: "panel" },
      h("header", { class: "panel-head wrap" }, h("h2", {}, "Workers"),
        h("div", { class: "segments", role: "group", "aria-label": "Role" }, this.roles.map((each) => each.button)),
        h("div", { class: "tools" }, this.filter, h("label", { class: "field-inline" }, h("span", {}, "Sort"), " ", this.sorting), h("div", { class: "segments", role: "group", "aria-label": "Layout" }, this.views))),
      this.grid, this.table, this.empty);
  }

  show() {
    const all = this.store.shown();
    for (const { role, button, number } of this.roles) {
      attr(button, "aria-pressed", String(role === this.role));
      say(number, String(role ? all.filter(([, worker]) => worker.role === role).length : all.length));
    }
    this.views.forEach((button, index) => attr(button, "aria-pressed", String((index === 0) === (this.view === "grid"))));
    const found = all.filter(([name, worker]) => (!this.role || worker.role === this.role) && this.matches(name, worker)).sort(SORTS[this.sort][1]);
    this.grid.hidden = this.view !== "grid" || !found.length;
    this.table.hidden = this.view !== "table" || !found.length;
    this.empty.hidden = found.length > 0;
    if (!found.length) this.tellEmpty(all.length);
    this.grid.classList.toggle("dense", found.length > DENSE);
    if (this.view === "grid") this.showGrid(found);
    else this.showTable(found);
    if (this.opened) this.tell(this.opened);
  }

  matches(name, worker) {
    return !this.text || `${name} ${worker.model} ${worker.role} ${worker.layout} ${worker.engine} ${health(worker)}`.toLowerCase().includes(this.text);
  }

  tellEmpty(total) {
    if (total) this.empty.replaceChildren(h("p", {}, "No worker matches."));
    else if (!this.empty.querySelector("code")) this.empty.replaceChildren(h("p", {}, "No worker is registered. Start some, in a terminal each:"), h("pre", {}, h("code", {}, "headrace worker --role prefill --model /models/NAME\nheadrace worker --role decode --model /models/NAME")));
  }

  showGrid(found) {
    if (!found.some(([name]) => name === this.current)) this.current = found[0]?.[0] ?? null;
    const nodes = found.map(([name, worker]) => {
      if (!this.tiles.has(name)) this.tiles.set(name, this.tile(name));
      const tile = this.tiles.get(name);
      this.paint(tile, name, worker);
      return tile.root;
    });
    for (const name of this.tiles.keys()) if (!this.store.workers.has(name)) this.tiles.delete(name);
    const focused = document.activeElement;
    arrange(this.grid, nodes);
    if (focused !== document.activeElement && focused?.isConnected) focused.focus({ preventScroll: true });
  }

  tile(name) {
    const parts = { name: h("span", { class: "tile-name" }, name), health: h("span", { class: "tile-health" }), rate: h("b", { class: "num" }), queue: h("span", { class: "num" }), kv: h("span", { class: "bar", "aria-hidden": "true" }, h("i", { class: "bar-held" }), h("i", { class: "bar-used" })), kvText: h("span", { class: "num muted" }), hit: h("span", { class: "num muted" }) };
    parts.root = h("button", { type: "button", class: "tile", tabindex: "-1", on: { click: () => this.open(name), focus: () => this.focusOn(name) } },
      h("span", { class: "tile-top" }, parts.name, parts.health),
      h("span", { class: "tile-mid" }, h("span", { class: "tile-rate" }, parts.rate, h("span", { class: "unit" }, " tok/s")), parts.queue),
      parts.kv, h("span", { class: "tile-low" }, parts.kvText, parts.hit));
    return parts;
  }

  paint(tile, name, worker) {
    const wrong = health(worker);
    attr(tile.root, "data-role", worker.role);
    attr(tile.root, "data-health", wrong ? wrong.split(" ")[0] : "ready");
    attr(tile.root, "tabindex", name === this.current ? "0" : "-1");
    attr(tile.root, "title", `${name} · ${worker.role}${wrong ? ` · ${wrong}` : ""}`);
    say(tile.health, wrong);
    say(tile.rate, brief(tokens(worker)));
    say(tile.queue, `${count(worker.num_running)} run${worker.num_waiting ? ` · ${count(worker.num_waiting)} wait` : ""}`);
    share(tile.kv, "--used", used(worker));
    share(tile.kv, "--held", held(worker));
    say(tile.kvText, `KV ${percent(used(worker), 1)}`);
    say(tile.hit, worker.prompt_tokens ? `hit ${percent(worker.hit_tokens, worker.prompt_tokens)}` : "");
  }

  focusOn(name) {
    if (this.current === name) return;
    const before = this.tiles.get(this.current);
    if (before) attr(before.root, "tabindex", "-1");
    this.current = name;
    attr(this.tiles.get(name).root, "tabindex", "0");
  }

  move(event) {
    const tiles = [...this.grid.children];
    const at = tiles.indexOf(document.activeElement);
    if (at < 0) return;
    const top = tiles[0].offsetTop;
    const columns = Math.max(1, tiles.filter((tile) => tile.offsetTop === top).length);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: tiles.length - 1 - at };
    if (!(event.key in steps)) return;
    event.preventDefault();
    tiles[at + steps[event.key]]?.focus();
  }

  showTable(found) {
    arrange(this.body, found.map(([name, worker]) => {
      if (!this.rows.has(name)) {
        const cells = COLUMNS.map(([, , kind]) => h("td", { class: kind === "text" ? null : "num" }));
        this.rows.set(name, { row: h("tr", {}, h("th", { scope: "row" }, h("button", { type: "button", class: "link", on: { click: () => this.open(name) } }, h("i", { class: "swatch", "aria-hidden": "true" }), name)), cells), cells });
      }
      const { row, cells } = this.rows.get(name);
      attr(row, "data-role", worker.role);
      attr(row, "data-health", health(worker).split(" ")[0] || "ready");
      COLUMNS.forEach(([, value], index) => say(cells[index], value(worker)));
      return row;
    }));
    for (const name of this.rows.keys()) if (!this.store.workers.has(name)) this.rows.delete(name);
  }

  open(name) {
    if (!this.store.workers.has(name)) return;
    this.opened = name;
    this.dialog.replaceChildren();
    this.tell(name);
    if (!this.dialog.open) this.dialog.showModal();
  }

  tell(name) {
    const worker = this.store.workers.get(name);
    if (!worker) {
      this.dialog.close();
      return;
    }
    const facts = {
      Role: worker.becoming ? `${worker.role}, becoming ${worker.becoming}` : worker.role,
      Health: health(worker) || "ready",
      Model: worker.model,
      Engine: worker.engine,
      "Up for": `${ago(this.store.at - worker.started_at)}, since ${clock(worker.started_at)}`,
      "Prefill, decode": `${count(worker.prefill_tokens_per_s)} and ${count(worker.decode_tokens_per_s)} tokens/s`,
      Requests: `${worker.num_running} running of ${worker.max_batch}, ${worker.num_waiting} waiting; ${worker.num_streams} of this gateway`,
      Queue: `${seconds(worker.queue_s)}, ${count(worker.waiting_prefill_tokens)} prompt tokens to compute`,
      "KV blocks": `${count(worker.num_blocks - worker.free_blocks)} in use, ${count(worker.num_cached)} cached, of ${count(worker.num_blocks)}`,
      "A block": `${worker.block_size} tokens, ${bytes(worker.bytes_per_block)}`,
      "Tokens held": count(worker.kv_tokens),
      "Hit rate": `${percent(worker.hit_tokens, worker.prompt_tokens)} of ${count(worker.prompt_tokens)} prompt tokens computed here`,
      Busy: percent(worker.utilisation, 1),
      Slowdown: `× ${worker.speed.toFixed(2)} of what was learned`,
      Context: `${count(worker.context_length)} tokens`,
      Index: worker.is_exact ? "exact" : "waits for a snapshot",
      "Model card": worker.card,
      "KV layout": worker.layout || "unknown",
    };
    if (worker.refused_because) facts["Refused because"] = worker.refused_because;
    if (!this.dialog.firstChild) {
      this.values = new Map();
      const close = h("button", { type: "button", class: "plain", on: { click: () => this.dialog.close() } }, "Close");
      this.dialog.append(h("header", { class: "panel-head" }, h("h2", { id: "worker-title" }, name), close), this.list = h("dl", { class: "facts" }));
    }
    for (const [label, value] of Object.entries(facts)) {
      if (!this.values.has(label)) {
        const told = h("dd");
        this.values.set(label, told);
        this.list.append(h("dt", {}, label), told);
      }
      say(this.values.get(label), value);
    }
  }
}
