/** What would the router do with this prompt? Nothing is run. */

import { h } from "./dom.js";
import { reasons, verdict } from "./reasons.js";
import { ask } from "./stream.js";

export function field(label, control, note) {
  const id = `f${Math.random().toString(36).slice(2)}`;
  control.id = id;
  return h("div", { class: "field" }, h("label", { for: id }, label), control, note && h("span", { class: "muted note" }, note));
}

/** A select of models that follows the fleet. */
export class ModelSelect {
  constructor() {
    this.root = h("select");
  }

  show(models, preferred) {
    if (this.models === models.join("\n")) return;
    this.models = models.join("\n");
    const before = this.root.value || preferred;
    this.root.replaceChildren(...models.map((model) => h("option", { value: model }, model)));
    if (models.includes(before)) this.root.value = before;
  }
}

export function handoverSelect() {
  return h("select", {}, h("option", { value: "auto" }, "As the router decides"), h("option", { value: "always" }, "Always two workers"), h("option", { value: "never" }, "Never"));
}

export class RouterView {
  constructor(root, store) {
    this.store = store;
    this.model = new ModelSelect();
    this.prompt = h("textarea", { rows: "8", required: true, placeholder: "A prompt" });
    this.most = h("input", { type: "number", min: "1", max: "1000000", value: "256", inputmode: "numeric" });
    this.handover = handoverSelect();
    this.button = h("button", { type: "submit", class: "primary" }, "Ask the router");
    this.result = h("section", { class: "panel", "aria-live": "polite", "aria-label": "The router's answer" }, h("p", { class: "empty" }, "The router's answer appears here: every way to serve the prompt, and what each would cost in seconds."));
    const form = h("form", { class: "panel form", on: { submit: (event) => { event.preventDefault(); this.send(); } } }, h("h2", {}, "What would the router do with this prompt?"),
      field("Model", this.model.root), field("Prompt", this.prompt), h("div", { class: "fields" }, field("Most tokens of the answer", this.most), field("Handover", this.handover)), h("div", { class: "actions" }, this.button, h("span", { class: "muted" }, "Nothing is run.")));
    root.append(h("div", { class: "split split-form" }, form, this.result));
  }

  show() {
    this.model.show(this.store.models, this.store.model);
  }

  async send() {
    this.button.disabled = true;
    const body = { model: this.model.root.value, messages: [{ role: "user", content: this.prompt.value }], max_tokens: Number(this.most.value) };
    try {
      const told = await (await ask("v1/routes", { method: "POST", body, headers: { "x-headrace-handover": this.handover.value } })).json();
      this.result.replaceChildren(h("header", { class: "panel-head" }, h("h2", {}, "The router's answer"), h("span", { class: "muted" }, `${told.policy}, ${told.prompt_tokens} prompt tokens`)), h("p", { class: "verdict" }, verdict(told)), reasons(told));
    } catch (error) {
      this.result.replaceChildren(h("p", { class: "error" }, error.message));
    } finally {
      this.button.disabled = false;
    }
  }
}
