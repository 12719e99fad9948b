/** Puts the views together and keeps them told. */

import { attr, h, say } from "./dom.js";
import { Fleet } from "./fleet.js";
import { clock } from "./format.js";
import { Playground } from "./playground.js";
import { Requests } from "./requests.js";
import { RouterView } from "./router.js";
import { Store } from "./store.js";
import { LiveStream, key } from "./stream.js";

const VIEWS = ["fleet", "requests", "router", "playground"];
const $ = (id) => document.getElementById(id);
const link = (view) => document.querySelector(`[data-view=${view}]`);

const store = new Store();
const views = {
  fleet: new Fleet($("view-fleet"), store),
  requests: new Requests($("view-requests"), store),
  router: new RouterView($("view-router"), store),
  playground: new Playground($("view-playground"), store),
};
let shown = "";
let painting = 0;

function paint() {
  painting ||= requestAnimationFrame(() => {
    painting = 0;
    models();
    views[shown].show();
  });
}

function models() {
  const names = store.models;
  $("model-field").hidden = names.length < 2 && !store.model;
  if ($("model").dataset.names === names.join("\n")) return;
  $("model").dataset.names = names.join("\n");
  $("model").replaceChildren(h("option", { value: "" }, "All"), ...names.map((name) => h("option", { value: name }, name)));
  if (store.model && !names.includes(store.model)) store.model = "";
  $("model").value = store.model;
}

function route() {
  const [view, ...rest] = location.hash.slice(1).split("/");
  shown = VIEWS.includes(view) && !link(view).hidden ? view : "fleet";
  for (const each of VIEWS) {
    $(`view-${each}`).hidden = each !== shown;
    attr(link(each), "aria-current", each === shown ? "page" : null);
  }
  if (shown === "requests") views.requests.open(decodeURIComponent(rest.join("/")));
  paint();
}

function status(name, why = "") {
  $("live").dataset.state = name;
  say($("live-text"), { live: "Live", lost: "Reconnecting", paused: "Paused", connecting: "Connecting", locked: "No access" }[name]);
  const banner = $("banner");
  banner.hidden = name !== "lost";
  document.body.classList.toggle("stale", name === "lost" && store.at > 0);
  if (name === "lost") say(banner, `${why} Trying again.${store.at ? ` What you see is from ${clock(store.at)}.` : ""}`);
}

function told(frame) {
  status("live");
  $("forget").hidden = !key.get();
  const { version, namespace, has_playground: hasPlayground } = store.about;
  link("playground").hidden = !hasPlayground;
  if (link(shown).hidden) route();
  say($("about"), `Headrace ${version} · namespace ${namespace} · ${location.host} · policy ${frame.totals.policy}`);
  paint();
}

const stream = new LiveStream({
  state: (frame) => { store.state(frame); told(frame); },
  delta: (frame) => { store.delta(frame); told(frame); },
  status,
  refused: (error) => {
    status("locked");
    say($("key-error"), key.get() ? error.message : "");
    key.forget();
    if (!$("key-dialog").open) $("key-dialog").showModal();
  },
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key").value = "";
  $("key-dialog").close();
  stream.start();
});
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
$("forget").addEventListener("click", () => { key.forget(); location.reload(); });
$("model").addEventListener("change", () => { store.model = $("model").value; paint(); });
addEventListener("hashchange", () => { route(); $("main").focus({ preventScroll: true }); });
addEventListener("keydown", (event) => {
  const isTyping = event.target.closest?.("input, textarea, select, dialog");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key >= "1" && event.key <= "4") location.hash = VIEWS[Number(event.key) - 1];
  const filter = { fleet: "worker-filter", requests: "request-filter" }[shown];
  if (event.key === "/" && filter) {
    event.preventDefault();
    $(filter).focus();
  }
});

route();
stream.start();
