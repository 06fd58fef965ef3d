// How an answer is drawn: bars of probabilities, a mask over the image, a warning where the image is a stranger's.

import { element } from "./dom.js";
import { palette } from "./png.js";

const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });

/** `look` asks where the task's adapter looks. */
export function drawAnswer(answer, image, look) {
  const took = `revision ${answer.revision}, ${Math.round(1000 * answer.seconds)} ms`;
  const article = element("article", {}, element("h3", {}, answer.task), element("p", { className: "about" }, took));
  const stranger = strangeness(answer);
  if (stranger) article.append(element("p", { className: "stranger" }, stranger));
  if (answer.predictions) article.append(bars(answer.predictions.map((item) => [item.label, item.probability])));
  if (answer.classes) article.append(...segmentation(answer, image));
  article.append(looking(answer.task, image, look));
  return article;
}

/** A button, and in its place the picture that it asks for. */
function looking(task, image, look) {
  const button = element("button", { type: "button" }, "Where does it look?");
  const refusal = element("p", { className: "problem", role: "alert" });
  const both = element("div", { className: "looking" }, button, refusal);
  button.addEventListener("click", async () => {
    button.disabled = true;
    refusal.textContent = "";
    try {
      const shown = drawLook(task, image, await look());
      both.replaceChildren(shown);
      shown.focus(); // it was on the button, which is gone
    } catch (reason) {
      refusal.textContent = reason.message;
      button.disabled = false;
    }
  });
  return both;
}

function drawLook(task, image, { block, most, picture }) {
  const seen = element("img", { src: `data:image/png;base64,${picture}`, alt: `Where ${task} looks in ${image.name}` });
  const about = `The image as the backbone saw it. The brighter a part, the more attention block ${block} pays to it: at most ${most.toFixed(1)} times an even share.`;
  return element("figure", { tabIndex: -1 }, seen, element("figcaption", {}, about));
}

export function drawRefusal(task, sentence) {
  return element("article", {}, element("h3", {}, task), element("p", { className: "problem" }, sentence));
}

/** What `known` and `unknown` say, where the adapter can tell members of its classes from strangers. */
function strangeness({ known, unknown }) {
  if (!unknown) return "";
  return `Probably none of this task's classes: of the images that it was checked with, ${percent.format(known)} are as unlike what it was trained on.`;
}

function bars(rows, colours = []) {
  const items = rows.map(([label, share], at) => {
    const name = element("span", { className: "label" }, label);
    if (colours[at]) name.prepend(swatch(colours[at]));
    const bar = element("span", { className: "bar", ariaHidden: "true" });
    bar.style.setProperty("--share", `${100 * share}%`);
    return element("li", {}, name, element("span", { className: "value" }, percent.format(share)), bar);
  });
  return element("ol", { className: "bars" }, ...items);
}

function segmentation(answer, image) {
  const colours = answer.mask ? palette(answer.mask) : [];
  const classes = [...answer.classes].sort((one, other) => other.share - one.share);
  const shares = bars(
    classes.map((item) => [item.label, item.share]),
    classes.map((item) => colours[item.id]),
  );
  return answer.mask ? [...overlay(answer, image), shares] : [shares];
}

function swatch(colour) {
  const box = element("span", { className: "swatch", ariaHidden: "true" });
  box.style.setProperty("--colour", colour);
  return box;
}

/** The image with the mask over it, and how much of the mask is seen. */
function overlay(answer, image) {
  const under = element("img", { src: image.url, alt: image.name });
  const mask = element("img", { src: `data:image/png;base64,${answer.mask}`, alt: `Mask of ${answer.task}` });
  const both = element("div", { className: "overlay" }, under, mask);
  const slider = element("input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.6 });
  slider.addEventListener("input", () => both.style.setProperty("--opacity", slider.value));
  return [both, element("label", { className: "row" }, "Mask", slider)];
}
