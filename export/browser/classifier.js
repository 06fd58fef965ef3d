// A graph that `gpt-serve export` wrote, run in the browser: nothing here knows about the page.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { readMetadata } from "./metadata.js";
import { keptSize, scaleAndCrop } from "./resize.js";

const FORMAT = "gpt-serve-onnx/1";
const MAX_PIXELS = 50_000_000; // the server's limit
const LEAST_KNOWN = 0.05; // an image that fewer of the validation images lie as far out as is a stranger's

/** What the person at the page did, or has to do, in one sentence. */
export class UserError extends Error {}

export class Classifier {
  /** Use `Classifier.load`. */
  constructor(session, { task, revision, labels, preprocess }) {
    this.session = session;
    this.task = task;
    this.revision = revision;
    this.labels = JSON.parse(labels);
    this.preprocess = JSON.parse(preprocess);
  }

  /**
   * @param {string} url of a single-task graph with uint8 input
   * @throws {UserError} there is none, or it is another kind of file
   */
  static async load(url) {
    const bytes = await download(url);
    const metadata = checkedMetadata(url, bytes);
    try {
      const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
      return new Classifier(session, metadata);
    } catch (error) {
      throw new UserError(`${url} cannot be run by this browser: ${error.message}`);
    }
  }

  /**
   * @param {File} file an image in any format that the browser decodes
   * @returns {Promise<{classes: {label: string, probability: number}[], unknown: boolean}>} all classes, the most
   *   probable first, and whether the graph can tell that the image is unlike what its task was trained on
   * @throws {UserError} the file is no image, or too large a one
   */
  async classify(file) {
    const pixels = scaleAndCrop(await decode(file, this.preprocess), this.preprocess);
    const images = new ort.Tensor("uint8", new Uint8Array(pixels.buffer), [1, ...this.preprocess.input_size, 3]);
    const { probabilities, known } = await this.session.run({ images });
    const classes = this.labels
      .map((label, index) => ({ label, probability: probabilities.data[index] }))
      .sort((one, other) => other.probability - one.probability);
    return { classes, unknown: known !== undefined && known.data[0] < LEAST_KNOWN };
  }
}

async function download(url) {
  const response = await fetch(url).catch(() => ({ ok: false }));
  if (response.ok) return new Uint8Array(await response.arrayBuffer());
  throw new UserError(`${url} cannot be fetched: export it into this folder as the README says, and reload the page.`);
}

/** The metadata as an object, if this page can run the graph. */
function checkedMetadata(url, bytes) {
  let metadata;
  try {
    metadata = Object.fromEntries(readMetadata(bytes));
  } catch {
    throw new UserError(`${url} is not an ONNX file: write it with gpt-serve export.`);
  }
  if (metadata.format !== FORMAT) {
    throw new UserError(`${url} is not a graph of format ${FORMAT}: write it with gpt-serve export.`);
  }
  if (metadata.kind !== "single") {
    throw new UserError(`${url} holds several tasks: export one with gpt-serve export --task.`);
  }
  if (metadata.input !== "uint8" || metadata.output !== "probabilities") {
    throw new UserError(`${url} must take uint8 and give probabilities: export it without --input float and --logits.`);
  }
  if (!JSON.parse(metadata.preprocess).exif) {
    throw new UserError(`${url} ignores the EXIF orientation, which browsers always apply: use export/run.py instead.`);
  }
  return metadata;
}

/** RGBA pixels of the centre of an image that `keptSize` names, on white where it is transparent. */
async function decode(file, preprocess) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch(() => {
    throw new UserError(`${file.name} is not an image that this browser can read: choose a JPEG, PNG or WebP file.`);
  });
  if (bitmap.width * bitmap.height > MAX_PIXELS) {
    throw new UserError(`${file.name} has ${bitmap.width} x ${bitmap.height} pixels: scale it down to 50 million.`);
  }
  const [height, width] = keptSize([bitmap.height, bitmap.width], preprocess);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, (width - bitmap.width) / 2, (height - bitmap.height) / 2);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}
