/** A chat, streamed, that shows which workers served each answer. */

import { h, say } from "./dom.js";
import { seconds } from "./format.js";
import { ModelSelect, field, handoverSelect } from "./router.js";
import { ask, events } from "./stream.js";

export class Playground {
  constructor(root, store) {
    this.store = store;
    this.messages = [];
    this.abort = null;
    this.model = new ModelSelect();
    this.most = h("input", { type: "number", min: "1", max: "1000000", value: "128", inputmode: "numeric" });
    this.temperature = h("input", { type: "number", min: "0", max: "2", step: "0.1", value: "0.7", inputmode: "decimal" });
    this.handover = handoverSelect();
    this.text = h("textarea", { rows: "3", required: true, placeholder: "Say something", on: { keydown: (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); } } } });
    this.button = h("button", { type: "submit", class: "primary" }, "Send");
    this.stop = h("button", { type: "button", class: "plain", disabled: true, on: { click: () => this.abort?.abort() } }, "Stop");
    this.clear = h("button", { type: "button", class: "plain", on: { click: () => this.forget() } }, "New chat");
    this.thread = h("div", { class: "thread", tabindex: "0", role: "log", "aria-label": "Chat" }, this.hint());
    const form = h("form", { class: "panel form composer", on: { submit: (event) => { event.preventDefault(); this.send(); } } }, field("Message", this.text), h("div", { class: "actions" }, this.button, this.stop, this.clear, h("span", { class: "muted" }, "Enter sends, Shift+Enter is a new line")));
    const settings = h("section", { class: "panel form", "aria-label": "Settings" }, h("h2", {}, "Settings"), field("Model", this.model.root), field("Most tokens", this.most), field("Temperature", this.temperature), field("Handover", this.handover));
    root.append(h("div", { class: "split split-chat" }, h("div", { class: "chat" }, h("section", { class: "panel" }, h("header", { class: "panel-head" }, h("h2", {}, "Playground")), this.thread), form), settings));
  }

  hint() {
    return h("p", { class: "empty" }, "Each answer tells which worker computed the prompt and which one decoded it.");
  }

  show() {
    this.model.show(this.store.models, this.store.model);
  }

  forget() {
    this.abort?.abort();
    this.messages = [];
    this.thread.replaceChildren(this.hint());
    this.text.focus();
  }

  async send() {
    const content = this.text.value.trim();
    if (!content || this.abort) return;
    if (!this.messages.length) this.thread.replaceChildren();
    this.messages.push({ role: "user", content });
    this.text.value = "";
    const answer = h("p", { class: "said" });
    const facts = h("p", { class: "served" }, h("span", { class: "muted" }, "Waiting for the first token …"));
    this.thread.append(h("div", { class: "turn user" }, h("p", { class: "said" }, content)), h("div", { class: "turn" }, answer, facts));
    this.thread.scrollTop = this.thread.scrollHeight;
    this.abort = new AbortController();
    this.button.disabled = true;
    this.stop.disabled = false;
    const begun = performance.now();
    let said = "";
    try {
      const body = { model: this.model.root.value, messages: this.messages, max_tokens: Number(this.most.value), temperature: Number(this.temperature.value), stream: true, stream_options: { include_usage: true } };
      const response = await ask("v1/chat/completions", { method: "POST", body, headers: { "x-headrace-handover": this.handover.value }, signal: this.abort.signal });
      let first = null;
      let usage = null;
      for await (const { data } of events(response)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        const piece = chunk.choices?.[0]?.delta?.content;
        if (piece) {
          first ??= performance.now();
          said += piece;
          const isAtEnd = this.thread.scrollHeight - this.thread.scrollTop - this.thread.clientHeight < 40;
          say(answer, said);
          if (isAtEnd) this.thread.scrollTop = this.thread.scrollHeight;
        }
        usage = chunk.usage ?? usage;
      }
      this.served(facts, response, { begun, first, ended: performance.now(), usage });
    } catch (error) {
      facts.replaceChildren(h("span", { class: error.name === "AbortError" ? "muted" : "tone-bad" }, error.name === "AbortError" ? "Stopped." : error.message));
    } finally {
      this.messages.push({ role: "assistant", content: said });
      this.abort = null;
      this.button.disabled = false;
      this.stop.disabled = true;
      this.thread.scrollTop = this.thread.scrollHeight;
    }
  }

  served(facts, response, { begun, first, ended, usage }) {
    const prefill = response.headers.get("x-headrace-prefill");
    const decode = response.headers.get("x-headrace-decode");
    const id = response.headers.get("x-request-id");
    const tokens = usage?.completion_tokens ?? 0;
    const spent = (ended - (first ?? begun)) / 1000;
    const chip = (role, name) => h("span", { class: "chip", data: { role } }, h("i", { class: "swatch", "aria-hidden": "true" }), `${role} ${name}`);
    facts.replaceChildren(
      ...(prefill === decode ? [chip("both", decode)] : [chip("prefill", prefill), h("span", { "aria-label": "then" }, "→"), chip("decode", decode)]),
      h("span", { class: "num" }, `first token ${seconds(first === null ? null : (first - begun) / 1000)}`),
      h("span", { class: "num" }, `${tokens} tokens${tokens > 1 && spent > 0 ? `, ${((tokens - 1) / spent).toFixed(0)} tok/s` : ""}`),
      id ? h("a", { href: `#requests/${encodeURIComponent(id)}` }, "timeline") : "");
  }
}
