// The list of tasks: what the server has, which of them are chosen.

import { element } from "./dom.js";

const MOST = 100; // shown at once: there may be thousands

export class TaskList {
  constructor(list, more, filter) {
    this.list = list;
    this.more = more;
    this.filter = filter;
    this.tasks = [];
    this.chosen = new Set();
    filter.addEventListener("input", () => this.draw());
  }

  /** Shows `tasks`, as `GET /tasks` lists them; what was chosen stays so while it exists. */
  show(tasks) {
    if (JSON.stringify(tasks) === JSON.stringify(this.tasks)) return; // or the keyboard's focus would be lost
    this.tasks = tasks;
    const usable = tasks.filter((entry) => !entry.error).map((entry) => entry.task);
    this.chosen = new Set(usable.filter((task) => this.chosen.has(task)));
    if (usable.length && !this.chosen.size) this.chosen.add(usable[0]);
    this.draw();
  }

  /** Whether one of these tasks answers with labels, and not with a mask. */
  label(tasks) {
    return this.tasks.some((entry) => tasks.includes(entry.task) && entry.kind !== "segmentation");
  }

  draw() {
    const wanted = this.filter.value.trim().toLowerCase();
    const found = this.tasks.filter((entry) => entry.task.includes(wanted) || this.chosen.has(entry.task));
    // What is chosen comes first, or it might lie beyond what is shown.
    found.sort((one, other) => this.chosen.has(other.task) - this.chosen.has(one.task));
    this.list.replaceChildren(...found.slice(0, MOST).map((entry) => this.#row(entry)));
    const hidden = found.length - Math.min(found.length, MOST);
    this.more.textContent = hidden ? `${hidden} more: type a part of the name above.` : this.tasks.length ? "" : "There are no tasks yet.";
  }

  #row(entry) {
    const box = element("input", { type: "checkbox", value: entry.task, disabled: Boolean(entry.error) });
    box.checked = this.chosen.has(entry.task);
    box.addEventListener("change", () => (box.checked ? this.chosen.add(entry.task) : this.chosen.delete(entry.task)));
    const about = entry.error ?? `${entry.classes} classes, ${entry.method}`;
    return element("li", {}, element("label", {}, box, entry.task, element("span", { className: "about" }, about)));
  }
}
