/** Charts of the last minutes, drawn by uPlot; beneath each the newest values as text, which is what readers of screens get. */

import uPlot from "./vendor/uplot.js";
import { h, say } from "./dom.js";
import { clock, plain } from "./format.js";
import { WINDOW_S } from "./store.js";

const charts = new Set();

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** One chart. series: [{label, colour (a CSS variable's name), width?, dash?}]; format: of a value. */
export class Chart {
  constructor(title, series, format, { slo = false } = {}) {
    this.series = slo ? [...series, { label: "SLO", colour: "bad", dash: [5, 4], slo: true }] : series;
    this.format = format;
    this.title = title;
    this.values = this.series.map(() => h("b", {}, "–"));
    this.plot = h("div", { class: "plot", role: "img", "aria-label": `${title}, the last five minutes` });
    this.empty = h("p", { class: "plot-empty" }, "No request has ended yet");
    this.items = this.series.map((each, index) =>
      h("span", { class: `key key-${each.colour}${each.slo ? " key-dash" : ""}` }, h("i", { "aria-hidden": "true" }), `${each.label} `, this.values[index]));
    this.root = h("figure", { class: "chart panel" }, h("figcaption", {}, h("h2", {}, title), h("div", { class: "keys" }, this.items)), h("div", { class: "plot-box" }, this.plot, this.empty));
    charts.add(this);
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  resize() {
    const [width, height] = this.size();
    if (!width || !this.data) return;
    if (!this.uplot) this.draw();
    else if (this.uplot.width !== width || this.uplot.height !== height) this.uplot.setSize({ width, height });
  }

  size() {
    return [Math.floor(this.plot.clientWidth), Math.floor(this.plot.clientHeight)];
  }

  rebuild() {
    this.uplot?.destroy();
    this.uplot = null;
    if (this.data) this.draw();
  }

  /** data: times, then a list of values per series (but for the SLO). */
  show(data, now, slo = null) {
    const columns = [...data];
    if (this.series.at(-1).slo) {
      columns.push(data[0].map(() => slo));
      this.items.at(-1).hidden = slo === null;
    }
    this.data = columns;
    this.now = now;
    const first = data[0].find((_, index) => data.slice(1).some((column) => column[index] !== null));
    this.begin = Math.max(now - WINDOW_S, Math.min(first ?? now, now - 60));
    columns.slice(1).forEach((column, index) => {
      const last = column.findLast((value) => value !== null);
      say(this.values[index], last === undefined || last === null ? "–" : (this.series[index].slo ? plain : this.format)(last));
    });
    this.empty.hidden = data.slice(1).some((column) => column.some((value) => value !== null));
    this.draw();
  }

  draw() {
    const [width, height] = this.size();
    if (!width) return;
    if (!this.uplot) this.uplot = new uPlot(this.options(width, height), this.data, this.plot);
    else this.uplot.setData(this.data);
  }

  options(width, height) {
    const axis = { stroke: colour("muted"), font: "11px system-ui, sans-serif", ticks: { show: false } };
    const grid = { stroke: colour("line"), width: 1 };
    return {
      width,
      height,
      legend: { show: false },
      cursor: { show: false },
      padding: [6, 4, 0, 0],
      scales: {
        x: { time: true, range: () => [this.begin, this.now] },
        y: { range: (_, __, most) => [0, most > 0 ? most * 1.12 : 1] },
      },
      axes: [
        { ...axis, grid: { show: false }, space: 70, size: 24, values: (_, ticks) => ticks.map((at) => clock(at).slice(0, this.now - this.begin < 200 ? 8 : 5)) },
        { ...axis, grid, space: 34, size: 58, values: (_, ticks) => ticks.map((value) => this.format(value)) },
      ],
      series: [
        {},
        ...this.series.map((each) => ({ stroke: colour(each.colour), width: each.width ?? 1.5, dash: each.dash, points: { show: false }, spanGaps: false })),
      ],
    };
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.rebuild()));
