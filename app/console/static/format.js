/** Numbers as people read them, always as many characters as they need and no more. */

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1e6) return `${(value / 1e6).toFixed(value >= 1e7 ? 0 : 1)} M`;
  if (value >= 1e5) return `${(value / 1e3).toFixed(0)} k`;
  return whole.format(value);
}

/** In few characters, for what is small. */
export function brief(value) {
  return value >= 1e4 && value < 1e6 ? `${(value / 1e3).toFixed(value >= 1e5 ? 0 : 1)} k` : count(value);
}

export function seconds(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value >= 100) return `${value.toFixed(0)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  if (value >= 0.01) return `${(value * 1e3).toFixed(0)} ms`;
  if (value >= 0.0001) return `${(value * 1e3).toFixed(1)} ms`;
  return value > 0 ? `${(value * 1e6).toFixed(0)} µs` : "0 s";
}

/** Of objectives: as few characters as they have. */
export function plain(value) {
  return value >= 1 ? `${Number(value.toPrecision(3))} s` : `${Number((value * 1000).toPrecision(3))} ms`;
}

export function bytes(value) {
  if (!value) return "0 B";
  const units = ["B", "KB", "MB", "GB", "TB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log10(value) / 3));
  const scaled = value / 1000 ** step;
  return `${scaled >= 100 || step === 0 ? scaled.toFixed(0) : scaled.toFixed(1)} ${units[step]}`;
}

export function percent(part, all) {
  return all > 0 ? `${Math.round((100 * part) / all)} %` : "–";
}

export function clock(unix) {
  return new Date(unix * 1000).toLocaleTimeString("en-GB");
}

export function ago(s) {
  if (s < 90) return `${Math.max(0, Math.round(s))} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 129600) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} d`;
}
