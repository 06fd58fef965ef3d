// Drives the page in a headless Chromium: node test.mjs CHROMIUM URL PROFILE < steps.json
//
// Each step is {"query": "?graph=..."} and, for an image, "file" and "how", which is "choose" or "drop". Prints a JSON
// list of what the page showed after each step: {"task", "status", "error", "classes": [[label, value, text], ...]}.

import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const [executablePath, url, profile] = process.argv.slice(2);
const FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run"];
FLAGS.push("--disable-background-networking", "--disable-component-update", "--disable-sync");

const browser = await chromium.launchPersistentContext(profile, {
  executablePath,
  args: FLAGS,
  chromiumSandbox: false, // it cannot be had as root or in a container, and the pages are our own
});
try {
  const page = await browser.newPage();
  const shown = [];
  for (const step of JSON.parse(readFileSync(0, "utf8"))) shown.push(await run(page, step));
  console.log(JSON.stringify(shown));
} finally {
  await browser.close();
}

async function run(page, { query, file, how }) {
  await page.goto(url + query);
  await settled(page, /^Ready/);
  if (how === "choose") await page.setInputFiles("#file", file);
  if (how === "drop") await drop(page, file);
  if (file) await settled(page, /%\.$/);
  return {
    task: await page.textContent("#task"),
    status: await page.textContent("#status"),
    error: await page.textContent("#error"),
    classes: await page.$$eval("#answer:not([hidden]) li", (rows) =>
      rows.map((row) => {
        const [label, share] = [row.querySelector(".label"), row.querySelector("data")];
        return [label.innerText, share.value, share.innerText];
      }),
    ),
  };
}

/** Waits until the page reports what `done` matches, or an error. */
async function settled(page, done) {
  const said = (source) => {
    const text = (id) => document.getElementById(id).textContent;
    return text("error") || new RegExp(source).test(text("status"));
  };
  await page.waitForFunction(said, done.source, { timeout: 60_000 });
}

async function drop(page, file) {
  const devtools = await page.context().newCDPSession(page);
  for (const type of ["dragEnter", "dragOver", "drop"]) {
    const data = { items: [], files: [file], dragOperationsMask: 1 };
    await devtools.send("Input.dispatchDragEvent", { type, x: 5, y: 5, data });
  }
}
