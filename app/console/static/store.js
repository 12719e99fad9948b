/** What is known: the fleet now, and the last minutes. */

export const WINDOW_S = 300;
const SAMPLE_S = 15;
const FLOW_S = 30;
const MOST_REQUESTS = 500;
const EMPTY = () => ({ prefill: 0, decode: 0, running: 0, waiting: 0 });

export class Store {
  constructor() {
    this.workers = new Map();
    this.requests = new Map();
    this.samples = [];
    this.points = [];
    this.flows = [];
    this.endings = [];
    this.totals = null;
    this.about = {};
    this.at = 0;
    this.model = "";
  }

  state(frame) {
    this.about = frame.about;
    this.workers = new Map(Object.entries(frame.workers));
    for (const request of frame.requests) this.request(request);
    this.samples.sort((one, other) => one.at - other.at);
    this.finish(frame);
  }

  delta(frame) {
    for (const [name, fields] of Object.entries(frame.workers)) this.workers.set(name, { ...this.workers.get(name), ...fields });
    for (const name of frame.gone) this.workers.delete(name);
    for (const request of frame.requests) this.request(request);
    this.flows.push({ at: frame.at, rows: frame.handovers });
    this.endings.push({ at: frame.at, interval_s: frame.interval_s, ...frame.ended });
    this.flows = this.flows.filter((flow) => flow.at > frame.at - FLOW_S);
    this.endings = this.endings.filter((ending) => ending.at > frame.at - FLOW_S);
    this.finish(frame);
    this.point(frame.at);
  }

  finish(frame) {
    this.totals = frame.totals;
    this.at = frame.at;
    while (this.requests.size > MOST_REQUESTS) this.requests.delete(this.requests.keys().next().value);
    const from = frame.at - WINDOW_S - SAMPLE_S;
    if (this.samples.length && this.samples[0].at < from) this.samples = this.samples.filter((sample) => sample.at >= from);
  }

  request(row) {
    if (this.requests.has(row.id)) return;
    this.requests.set(row.id, row);
    if (row.ttft_s !== null) this.samples.push({ at: row.received_at + row.end_s, model: row.model, ttft: row.ttft_s, itl: row.itl_s });
  }

  point(at) {
    const sums = new Map();
    for (const worker of this.workers.values()) {
      if (!sums.has(worker.model)) sums.set(worker.model, EMPTY());
      const sum = sums.get(worker.model);
      sum.prefill += worker.prefill_tokens_per_s;
      sum.decode += worker.decode_tokens_per_s;
      sum.running += worker.num_running;
      sum.waiting += worker.num_waiting;
    }
    this.points.push({ at, sums, queued: this.totals.num_waiting });
    while (this.points.length && this.points[0].at < at - WINDOW_S) this.points.shift();
  }

  get models() {
    return [...new Set([...this.workers.values()].map((worker) => worker.model))].sort();
  }

  shown() {
    return [...this.workers].filter(([, worker]) => !this.model || worker.model === this.model);
  }

  shownRequests() {
    return [...this.requests.values()].filter((row) => !this.model || row.model === this.model).reverse();
  }

  /** Columns for the charts of load: times, then a list per name. */
  load(...names) {
    const columns = [this.points.map((point) => point.at), ...names.map(() => [])];
    for (const point of this.points) {
      const sums = this.model ? [point.sums.get(this.model) || EMPTY()] : [...point.sums.values()];
      names.forEach((name, index) => {
        columns[index + 1].push(name === "queued" ? point.queued : sums.reduce((sum, each) => sum + each[name], 0));
      });
    }
    return columns;
  }

  /** Percentiles of "ttft" or "itl" over time: of the requests that ended in the 15 seconds before each instant. */
  percentiles(name, shares, step = 3) {
    const samples = this.samples.filter((sample) => sample[name] !== null && (!this.model || sample.model === this.model));
    const columns = [[], ...shares.map(() => [])];
    let begin = 0;
    let end = 0;
    for (let at = Math.ceil((this.at - WINDOW_S) / step) * step; at <= this.at; at += step) {
      while (end < samples.length && samples[end].at <= at) end += 1;
      while (begin < end && samples[begin].at <= at - SAMPLE_S) begin += 1;
      const values = samples.slice(begin, end).map((sample) => sample[name]).sort((one, other) => one - other);
      columns[0].push(at);
      shares.forEach((each, index) => columns[index + 1].push(values.length ? quantile(values, each) : null));
    }
    return columns;
  }

  /** Of the last 30 seconds. */
  recent(name, share) {
    const values = this.samples
      .filter((sample) => sample.at > this.at - FLOW_S && sample[name] !== null && (!this.model || sample.model === this.model))
      .map((sample) => sample[name])
      .sort((one, other) => one - other);
    return values.length ? quantile(values, share) : null;
  }

  slo(name) {
    const slos = this.totals?.slos;
    if (!slos) return null;
    const models = this.models;
    const model = this.model || (models.length === 1 ? models[0] : "");
    return slos.models[model]?.[`${name}_s`] ?? slos[`${name}_s`] ?? null;
  }

  /** Handovers by pair of workers over the last 30 seconds, those that move most first. */
  pairs() {
    const span = this.flows.length ? Math.max(1, this.endings.reduce((sum, each) => sum + each.interval_s, 0)) : 1;
    const pairs = new Map();
    for (const { rows } of this.flows) {
      for (const [source, worker, count, bytes, seconds] of rows) {
        if (this.model && this.workers.get(worker)?.model !== this.model) continue;
        const id = `${source}\n${worker}`;
        const pair = pairs.get(id) || { id, source, worker, count: 0, bytes: 0, seconds: 0 };
        pair.count += count;
        pair.bytes += bytes;
        pair.seconds += seconds;
        pairs.set(id, pair);
      }
    }
    const found = [...pairs.values()];
    for (const pair of found) {
      pair.bytes_per_s = pair.bytes / span;
      pair.mean_s = pair.seconds / pair.count;
    }
    return found.sort((one, other) => other.bytes - one.bytes || one.id.localeCompare(other.id));
  }

  ended() {
    const seconds = this.endings.reduce((sum, each) => sum + each.interval_s, 0);
    const sum = (name) => this.endings.reduce((all, each) => all + each[name], 0);
    return { per_s: seconds ? sum("count") / seconds : 0, failed: sum("failed") };
  }
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(share * sorted.length) - 1))];
}
