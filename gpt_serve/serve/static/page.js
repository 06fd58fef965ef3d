// The page: an image, some tasks, their answers, and how the server is.

import { drawAnswer, drawRefusal } from "./answers.js";
import { command } from "./curl.js";
import { element } from "./dom.js";
import { takeImages } from "./image.js";
import { ask, attention, predict, sentence, state } from "./server.js";
import { TaskList } from "./tasks.js";

const byId = (id) => document.getElementById(id);
const REFRESH = 5000; // ms between looks at the server while the page is seen

let image = null; // {file, name, url}
const tasks = new TaskList(byId("tasks"), byId("more"), byId("filter"));

function complain(sentence) {
  byId("complaint").textContent = sentence;
}

function take(file, name) {
  image = { file, name, url: URL.createObjectURL(file) };
  byId("preview").src = image.url;
  byId("preview").alt = `The chosen image, ${name}`;
  byId("name").textContent = `${name}, ${(file.size / 1024).toFixed(1)} KiB`;
  byId("chosen").hidden = false;
  complain("");
}

async function answer(event) {
  event.preventDefault();
  const chosen = [...tasks.chosen];
  if (!image) return complain("Choose an image first.");
  if (!chosen.length) return complain("Choose at least one task.");
  complain("");
  byId("ask").disabled = true;
  byId("progress").textContent = `Asking ${count(chosen.length, "task")} …`;
  const asked = image;
  const topK = tasks.label(chosen) ? Number(byId("top-k").value) : null;
  byId("answers").replaceChildren();
  showCommand(chosen, topK, asked.name);
  byId("answers").replaceChildren(...(await drawn(chosen, topK, asked)));
  byId("progress").textContent = `${count(chosen.length, "task")} answered for ${asked.name}.`;
  byId("ask").disabled = false;
  return refresh();
}

/** One request for all tasks; what refuses it as a whole is said of each. */
async function drawn(chosen, topK, asked) {
  try {
    const { answers, seconds } = await predict(chosen, topK, asked);
    return answers.map((answer) =>
      answer.detail
        ? drawRefusal(answer.task, sentence(answer))
        : drawAnswer({ ...answer, seconds }, asked, () => attention(answer.task, asked)),
    );
  } catch (refusal) {
    return chosen.map((task) => drawRefusal(task, refusal.message));
  }
}

function showCommand(chosen, topK, name) {
  byId("curl").textContent = command(chosen, topK, name, Boolean(sessionStorage.getItem("key")));
  byId("command").hidden = false;
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

async function refresh() {
  try {
    tasks.show((await (await ask("tasks")).json()).tasks);
    const facts = [["Tasks", tasks.tasks.length], ...(await state())];
    byId("server").replaceChildren(...facts.flatMap(([what, value]) => [element("dt", {}, what), element("dd", {}, String(value))]));
    say("Ready.");
  } catch (refusal) {
    say(refusal.message);
  }
}

/** Says how the server is, once: a screen reader reads each change. */
function say(sentence) {
  if (byId("state").textContent !== sentence) byId("state").textContent = sentence;
}

byId("question").addEventListener("submit", answer);
byId("key").value = sessionStorage.getItem("key") ?? "";
byId("key").addEventListener("change", (event) => {
  sessionStorage.setItem("key", event.target.value.trim());
  refresh();
});
byId("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(byId("curl").textContent);
  byId("copy").textContent = "Copied";
});
takeImages(take, complain);
refresh();
setInterval(() => document.hidden || refresh(), REFRESH);
