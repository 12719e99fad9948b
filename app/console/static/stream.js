/** The gateway's routes: JSON, and server-sent events read with fetch, for EventSource can send no key. */

const KEY = "headrace.key";
export const BASE = new URL("..", import.meta.url);

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, { method = "GET", body, headers = {}, signal } = {}) {
  const all = { ...headers };
  if (key.get()) all.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) all["content-type"] = "application/json";
  const response = await fetch(new URL(path, BASE), {
    method, headers: all, signal, cache: "no-store", credentials: "omit", body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) throw new Refused(response.status, await reason(response));
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The gateway answered ${response.status}.`;
  }
}

/** Events of a streamed answer: {event, data}, in order. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const found = { event: "message", data: "" };
      for (const line of held.slice(0, end).split("\n")) {
        if (line.startsWith("event: ")) found.event = line.slice(7);
        else if (line.startsWith("data: ")) found.data += line.slice(6);
      }
      held = held.slice(end + 2);
      if (found.data) yield found;
    }
  }
}

const SILENT_MS = 6000;
const HIDDEN_MS = 30000;

/** Keeps the live stream open while somebody looks. on: state(frame), delta(frame), status(name, detail), refused(error). */
export class LiveStream {
  constructor(on) {
    this.on = on;
    this.abort = null;
    this.retry = null;
    this.pause = 1000;
    document.addEventListener("visibilitychange", () => this.visible());
  }

  start() {
    clearTimeout(this.retry);
    this.abort?.abort();
    this.abort = new AbortController();
    this.run(this.abort);
  }

  visible() {
    clearTimeout(this.hiding);
    if (document.hidden) this.hiding = setTimeout(() => this.rest(), HIDDEN_MS);
    else if (this.isResting) this.start();
  }

  rest() {
    this.isResting = true;
    clearTimeout(this.retry);
    this.abort?.abort();
    this.on.status("paused");
  }

  async run(abort) {
    this.isResting = false;
    const silence = () => {
      clearTimeout(this.watchdog);
      this.watchdog = setTimeout(() => abort.abort(), SILENT_MS);
    };
    silence();
    try {
      const response = await ask("console/state", { signal: abort.signal });
      for await (const { event, data } of events(response)) {
        silence();
        this.pause = 1000;
        if (event === "state" || event === "delta") this.on[event](JSON.parse(data));
      }
      this.again("The gateway ended the stream.");
    } catch (error) {
      if (abort !== this.abort || this.isResting) return;
      if (error.status === 401 || error.status === 403) this.on.refused(error);
      else this.again(error.status ? error.message : "The gateway does not answer.");
    } finally {
      clearTimeout(this.watchdog);
    }
  }

  again(why) {
    this.on.status("lost", why);
    clearTimeout(this.retry);
    this.retry = setTimeout(() => this.start(), this.pause);
    this.pause = Math.min(10000, this.pause * 1.7);
  }
}
