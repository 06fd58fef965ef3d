// What the page asks the server, and how a refusal becomes one sentence.

export class Refusal extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status; // of HTTP; undefined when there was no answer
  }
}

/** The response to `path`, with the key that the visitor gave. Throws a `Refusal` that says why there is none. */
export async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { "X-API-Key": key } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Refusal("The server cannot be reached.");
  }
  if (!response.ok) throw new Refusal(await reason(response), response.status);
  return response;
}

async function reason(response) {
  const again = response.headers.get("Retry-After");
  const problem = await response.json().catch(() => ({}));
  return sentence({ detail: response.statusText, ...problem, status: response.status }, again);
}

/** The answers of several tasks, each an answer or a problem that names its task, and the seconds that they took. */
export async function predict(tasks, topK, image) {
  const form = new FormData();
  for (const task of tasks) form.append("task", task);
  if (topK !== null) form.append("top_k", topK); // masks have all classes
  form.append("image", image.file, image.name);
  const began = performance.now();
  const answers = await (await ask("predict", { method: "POST", body: form })).json();
  return { answers: [answers].flat(), seconds: (performance.now() - began) / 1000 };
}

/** A problem (RFC 9457) as one sentence. */
export function sentence(problem, again = null) {
  const wait = again ? ` (worth another try in ${again} s)` : "";
  return `${problem.status} ${problem.title ?? ""}: ${problem.detail}${wait}`;
}

/** Where the adapter of a task looks in the image: {block, most, picture}, see `POST /attention/{task}`. */
export async function attention(task, image) {
  return (await ask(`attention/${encodeURIComponent(task)}`, { method: "POST", body: image.file })).json();
}

const FACTS = [
  ["gpt_serve_in_flight", "Requests being answered", (value) => value],
  ["gpt_serve_resident_adapters", "Adapters on the device", (value) => value],
  ["gpt_serve_host_adapters", "Adapters in host memory", (value) => value],
  ["gpt_serve_bank_used_bytes", "Device memory that they take", (value) => `${(value / 2 ** 20).toFixed(1)} MiB`],
  ["gpt_serve_worker_restarts", "Restarts of the worker", (value) => value],
];

/** The metrics as text; empty for a key that does not open them. */
async function metrics() {
  try {
    return await (await ask("metrics")).text();
  } catch (refusal) {
    if (refusal.status === 403) return "";
    throw refusal;
  }
}

/** The state of the server as pairs of what and how much. */
export async function state() {
  const ready = await (await ask("ready")).json();
  const text = await metrics();
  const values = new Map([...text.matchAll(/^(\w+) (\S+)$/gm)].map(([, name, value]) => [name, Number(value)]));
  const known = FACTS.filter(([name]) => values.has(name));
  return [["Backbone", ready.backbone], ...known.map(([name, what, show]) => [what, show(values.get(name))])];
}
