// The page: choose or drop an image, see the most probable classes.

import { Classifier, UserError } from "./classifier.js";

const TOP = 5;
const element = (id) => document.getElementById(id);
const url = new URLSearchParams(location.search).get("graph") ?? "flowers.onnx";

let classifier;
let work = start();

element("file").addEventListener("change", ({ target }) => {
  if (target.files.length) enqueue(target.files[0]);
  target.value = ""; // so that choosing the same file again is a change
});
// Anywhere on the page, because a browser leaves the page for an image that is dropped beside the target.
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file && !element("file").disabled) enqueue(file);
});

async function start() {
  say(`Loading ${url} …`);
  try {
    classifier = await Classifier.load(url);
  } catch (error) {
    return complain(error);
  }
  element("task").textContent = `${classifier.task} (revision ${classifier.revision})`;
  element("file").disabled = false;
  say("Ready.");
}

/** One image after the other: a session runs one at a time. */
function enqueue(file) {
  work = work.then(() => show(file));
}

async function show(file) {
  say(`Classifying ${file.name} …`);
  element("answer").hidden = true;
  try {
    const { classes, unknown } = await classifier.classify(file);
    element("labels").replaceChildren(...classes.slice(0, TOP).map(row));
    preview(file);
    element("answer").hidden = false;
    const doubt = unknown ? "probably none of these; at best " : "";
    say(`${file.name}: ${doubt}${classes[0].label}, ${percent(classes[0].probability)}.`);
  } catch (error) {
    complain(error);
  }
}

const percent = (probability) => `${(100 * probability).toFixed(1)} %`;

function row({ label, probability }) {
  const item = element("row").content.firstElementChild.cloneNode(true);
  item.querySelector(".label").textContent = label;
  item.querySelector("data").value = probability;
  item.querySelector("data").textContent = percent(probability);
  item.querySelector(".bar").style.inlineSize = `${100 * probability}%`;
  return item;
}

function preview(file) {
  URL.revokeObjectURL(element("preview").src);
  element("preview").src = URL.createObjectURL(file);
}

function say(text) {
  element("status").textContent = text;
  element("error").textContent = "";
}

function complain(error) {
  element("status").textContent = "";
  element("error").textContent = error instanceof UserError ? error.message : `Something went wrong: ${error.message}`;
}
