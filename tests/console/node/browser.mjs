/** The console in a real browser.  node browser.mjs FOLDER NAME=ADDRESS …
 *
 * NAME is `fleet` (real workers, under load), `many` (200 made-up ones) or `keys` (a gateway that has no playground and asks for a
 * key, which is in HEADRACE_KEY); HEADRACE_MANY_PID is the process of the second. Prints what was seen; exit status 1 and what is wrong, if anything is.
 */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const VIEWS = ["fleet", "requests", "router", "playground"];
const SIZES = [[390, 844], [1280, 800], [2560, 1300]];
const [folder, ...places] = process.argv.slice(2);
const addresses = Object.fromEntries(places.map((each) => each.split(/=(.*)/s).slice(0, 2)));
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox"] });
let failed = 0;

/** A page whose every complaint is kept; `allowed` says which are meant to be there. */
async function opened(address, options = {}, allowed = () => false) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 800 }, reducedMotion: "reduce", ...options });
  page.setDefaultTimeout(30000);
  page.complaints = [];
  const complain = (text) => { if (!allowed(text)) page.complaints.push(text); };
  page.on("console", (message) => { if (["error", "warning"].includes(message.type())) complain(message.text()); });
  page.on("pageerror", (error) => complain(`uncaught: ${error.message}`));
  page.on("request", (request) => { if (!request.url().startsWith(address)) complain(`asked elsewhere: ${request.url()}`); });
  await page.goto(`${address}/console`);
  return page;
}

async function closed(page) {
  assert.deepEqual(page.complaints, [], "the browser complained");
  await page.close();
}

const live = (page) => page.waitForSelector("#live[data-state=live]");

/** Until `look`, run in the page, gives something true. */
const until = (page, look, argument) => page.waitForFunction(look, argument, { timeout: 30000 });

async function accessible(page, where) {
  await page.evaluate(AXE);
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  assert.deepEqual(found.violations.map((each) => `${each.id}: ${each.nodes.slice(0, 3).map((node) => `${node.target} ${node.any?.[0]?.message ?? ""}`).join(" | ")}`), [], `axe-core, ${where}`);
}

async function noWider(page, where) {
  const [inner, outer] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.ok(inner <= outer, `${where} is ${inner} px wide on ${outer}`);
}

const checks = {
  async "updates arrive by themselves"() {
    const page = await opened(addresses.fleet);
    await live(page);
    await until(page, () => document.querySelectorAll(".tile").length === 4);
    const before = await page.evaluate(() => document.querySelector(".tiles").textContent);
    await until(page, (text) => document.querySelector(".tiles").textContent !== text, before);
    await until(page, () => document.querySelectorAll(".flow-list tbody tr").length > 0);
    await until(page, () => [...document.querySelectorAll(".chart .keys b")].slice(0, 3).every((each) => each.textContent !== "–"));
    await closed(page);
  },

  async "a request tells where its time went, and why it went there"() {
    const page = await opened(addresses.fleet);
    await live(page);
    await page.keyboard.press("2");
    const link = page.locator("#view-requests tbody tr", { hasText: "→" }).locator("a").first();
    await page.getByLabel("Hold still").check();
    await link.click();
    await page.waitForSelector(".gantt");
    const stages = await page.locator(".gantt tbody th").allTextContents();
    for (const stage of ["prefill", "handover", "decode"]) assert.ok(stages.includes(stage), `${stage} in ${stages}`);
    assert.equal(await page.locator(".detail .candidates .chosen").count(), 1);
    assert.ok((await page.locator(".detail .candidates li").count()) > 1);
    await closed(page);
  },

  async "the router says what it would do"() {
    const page = await opened(addresses.fleet);
    await live(page);
    await page.keyboard.press("3");
    await page.getByLabel("Prompt", { exact: true }).fill("A prompt of some length. ".repeat(100));
    await page.locator("#view-router").getByLabel("Handover").selectOption("always");
    await page.getByRole("button", { name: "Ask the router" }).click();
    await page.waitForSelector(".verdict");
    assert.match(await page.locator(".verdict").textContent(), /prefill-\d computes the prompt and hands over to decode-\d/);
    await closed(page);
  },

  async "the playground streams and tells which workers served"() {
    const page = await opened(addresses.fleet);
    await live(page);
    await page.keyboard.press("4");
    await page.locator("#view-playground").getByLabel("Handover").selectOption("always");
    await page.getByLabel("Message").fill("Hello");
    await page.keyboard.press("Enter");
    await page.waitForSelector(".chip[data-role=prefill]");
    assert.match(await page.locator(".chip[data-role=decode]").textContent(), /decode decode-\d/);
    assert.ok((await page.locator(".turn:not(.user) .said").textContent()).length > 20);
    await page.getByRole("link", { name: "timeline" }).click();
    await page.waitForSelector(".gantt");
    await closed(page);
  },

  async "all of it works by keyboard"() {
    const page = await opened(addresses.many);
    await live(page);
    await until(page, () => document.querySelectorAll(".tile").length === 200);
    await page.keyboard.press("/");
    await page.keyboard.type("decode-1");
    await until(page, () => document.querySelectorAll(".tile").length < 100);
    for (let press = 0; press < 8 && !(await page.evaluate(() => document.activeElement.classList.contains("tile"))); press += 1) await page.keyboard.press("Tab");
    const focused = () => page.evaluate(() => document.activeElement.querySelector(".tile-name")?.textContent);
    const first = await focused();
    await page.keyboard.press("ArrowRight");
    const second = await focused();
    assert.ok(first && second && first !== second, `${first}, then ${second}`);
    const then = await page.evaluate(() => document.querySelector(".tiles").textContent);
    await until(page, (text) => document.querySelector(".tiles").textContent !== text, then);
    assert.equal(await focused(), second, "updates leave the focus alone");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#worker-dialog[open]");
    assert.equal(await page.locator("#worker-title").textContent(), second);
    await page.keyboard.press("Escape");
    await page.waitForSelector("#worker-dialog", { state: "hidden" });
    assert.equal(await focused(), second, "the focus comes back");
    await page.locator("#main").focus();
    for (const [index, view] of VIEWS.entries()) {
      await page.keyboard.press(String(index + 1));
      await page.waitForSelector(`#view-${view}`);
    }
    await closed(page);
  },

  async "filter, role, sorting and table"() {
    const page = await opened(addresses.many);
    await live(page);
    await page.getByRole("button", { name: /^Prefill/ }).click();
    await until(page, () => document.querySelectorAll(".tile").length === 50);
    await page.getByRole("button", { name: "Table" }).click();
    await page.getByLabel("Sort workers").selectOption("health");
    await until(page, () => document.querySelector("[aria-label='Workers as a table'] tbody tr").dataset.health !== "ready");
    await page.getByRole("searchbox", { name: "Filter workers" }).fill("no such worker");
    await page.getByText("No worker matches.").waitFor();
    await closed(page);
  },

  async "a lost gateway is told, and found again"() {
    const page = await opened(addresses.many);
    await live(page);
    process.kill(Number(process.env.HEADRACE_MANY_PID), "SIGSTOP");
    try {
      await page.waitForSelector("#live[data-state=lost]");
      assert.match(await page.locator("#banner").textContent(), /What you see is from \d\d:\d\d:\d\d/);
    } finally {
      process.kill(Number(process.env.HEADRACE_MANY_PID), "SIGCONT");
    }
    await live(page);
    await page.waitForSelector("#banner", { state: "hidden" });
    await closed(page);
  },

  async "a key is asked for, kept in the session alone, and forgotten"() {
    const page = await opened(addresses.keys, {}, (text) => text.includes("401") || text.includes("403"));
    await page.waitForSelector("#key-dialog[open]");
    await accessible(page, "the question for a key");
    await page.getByLabel("API key").fill("sk-wrong");
    await page.keyboard.press("Enter");
    await until(page, () => document.getElementById("key-error").textContent.length > 0 && document.getElementById("key-dialog").open);
    await page.getByLabel("API key").fill(process.env.HEADRACE_KEY);
    await page.keyboard.press("Enter");
    await live(page);
    const kept = await page.evaluate(() => [JSON.stringify({ ...localStorage }), document.cookie, Object.values(sessionStorage)]);
    assert.deepEqual(kept, ["{}", "", [process.env.HEADRACE_KEY]]);
    await page.waitForSelector("[data-view=playground]", { state: "hidden" });
    await page.keyboard.press("4");
    await page.waitForSelector("#view-fleet");
    await page.getByRole("button", { name: "Forget key" }).click();
    await page.waitForSelector("#key-dialog[open]");
    assert.deepEqual(await page.evaluate(() => Object.values(sessionStorage)), []);
    await closed(page);
  },
};

/** Every view at every size in light and dark: accessible, no wider than the screen, and a picture of it. */
for (const name of ["fleet", "many"]) {
  for (const colorScheme of ["light", "dark"]) {
    checks[`${name}, ${colorScheme}: accessible and no wider than the screen`] = async () => {
      const page = await opened(addresses[name], { colorScheme });
      await live(page);
      await until(page, () => document.querySelectorAll(".tile").length > 0 && document.querySelectorAll(".flow-list tbody tr").length > 0);
      for (const [width, height] of SIZES) {
        await page.setViewportSize({ width, height });
        for (const view of VIEWS) {
          await page.goto(`${addresses[name]}/console#${view}`);
          await page.waitForSelector(`#view-${view}`);
          const where = `${name} ${view} ${width} ${colorScheme}`;
          await noWider(page, where);
          if (width !== 2560) await accessible(page, where);
          await page.screenshot({ path: `${folder}/${name}-${view}-${width}-${colorScheme}.png` });
        }
      }
      await page.goto(`${addresses[name]}/console#fleet`);
      await page.locator(".tile").first().click();
      await page.waitForSelector("#worker-dialog[open]");
      await accessible(page, `${name}, one worker, ${colorScheme}`);
      await closed(page);
    };
  }
}

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n${error.message}`);
  }
}
await browser.close();
process.exit(failed ? 1 : 0);
