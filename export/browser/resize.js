// Scales and crops an image as the server does, to the same bytes.
//
// A canvas would scale it in whatever way the browser likes, which moves the answers of a model with a small input.
// This is the antialiased filter that `gpt_serve/images/preprocess.py` runs: torch's for uint8, in fixed-point numbers, first
// along the rows, then along the columns.

const FILTERS = {
  bilinear: { radius: 1, weight: (x) => Math.max(0, 1 - x) },
  bicubic: {
    radius: 2,
    weight: (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0),
  },
};
// A side that scaling would make longer than this many times what it must cover loses its ends first.
const MAX_STRETCH = 50;

/**
 * Says how much of an image's centre is scaled at all: everything, unless it is extremely long.
 *
 * @param {[number, number]} size height and width of the image in pixels
 * @param {object} preprocess as in the graph's metadata
 * @returns {[number, number]} height and width to hand to `scaleAndCrop`
 */
export function keptSize(size, preprocess) {
  if (preprocess.crop_mode === "squash") return size;
  const cover = coveredSize(preprocess);
  const ratio = Math.min(size[0] / cover[0], size[1] / cover[1]);
  return size.map((side, axis) => {
    const longest = Math.ceil(cover[axis] * ratio * MAX_STRETCH);
    return side <= longest ? side : longest + ((side - longest) % 2);
  });
}

/**
 * @param {{data: Uint8ClampedArray, height: number, width: number}} image RGBA, of the size that `keptSize` gives
 * @param {object} preprocess as in the graph's metadata
 * @returns {Uint8ClampedArray} (H, W, 3) RGB of `preprocess.input_size`
 */
export function scaleAndCrop(image, preprocess) {
  const [height, width] = preprocess.input_size;
  const scaled = scaledSize([image.height, image.width], preprocess);
  const filter = FILTERS[preprocess.interpolation];
  const columns = centralTaps(image.width, scaled[1], width, filter);
  const rows = centralTaps(image.height, scaled[0], height, filter);
  const narrow = filterAxis(image.data, { lines: image.height, line: 4 * image.width, step: 4, values: 3 }, columns);
  return filterAxis(narrow, { lines: 1, line: 0, step: 3 * width, values: 3 * width }, rows);
}

/** Height and width that the scaled image must cover. */
const coveredSize = ({ input_size, crop_pct }) => input_size.map((side) => Math.floor(side / crop_pct));

/** Height and width after scaling, before the crop, rounded as timm does. */
function scaledSize(size, preprocess) {
  if (preprocess.crop_mode === "squash") return preprocess.input_size;
  const cover = coveredSize(preprocess);
  if (cover[0] === cover[1]) return size.map((side) => Math.floor((cover[0] * side) / Math.min(...size)));
  const ratio = Math.min(size[0] / cover[0], size[1] / cover[1]);
  return size.map((side) => roundHalfEven(side / ratio));
}

const roundHalfEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/**
 * The filter for the central `crop` of `to` pixels that a line of `from` pixels is scaled to.
 *
 * Weights become integers of at most 15 bits; `precision` is how many of these are behind the point.
 */
function centralTaps(from, to, crop, filter) {
  const taps = Array.from({ length: to }, (_, index) => tap(index, from, from / to, filter));
  const largest = taps.reduce((most, { weights }) => Math.max(most, ...weights), 0);
  let precision = 0;
  while (precision < 22 && Math.trunc(0.5 + largest * 2 ** (precision + 1)) < 2 ** 15) precision++;
  const first = roundHalfEven((to - crop) / 2);
  const kept = taps.slice(first, first + crop).map(({ start, weights }) => ({
    start,
    weights: Int32Array.from(weights, (weight) => Math.trunc(weight * 2 ** precision + (weight < 0 ? -0.5 : 0.5))),
  }));
  return { taps: kept, precision };
}

/** The pixels `start`... of a line that make up pixel `index` of the scaled line, and their weights, which sum to 1. */
function tap(index, from, scale, { radius, weight }) {
  const center = scale * (index + 0.5);
  const stretch = Math.max(scale, 1);
  const start = Math.max(Math.trunc(center - radius * stretch + 0.5), 0);
  const end = Math.min(Math.trunc(center + radius * stretch + 0.5), from);
  const weights = Array.from({ length: end - start }, (_, k) => weight(Math.abs((k + start - center + 0.5) / stretch)));
  const total = weights.reduce((sum, value) => sum + value, 0);
  return { start, weights: weights.map((value) => value / total) };
}

/** Filters each of the `lines`, whose pixels of `values` numbers lie `step` apart. */
function filterAxis(source, { lines, line, step, values }, { taps, precision }) {
  const result = new Uint8ClampedArray(lines * taps.length * values);
  let at = 0;
  for (let index = 0; index < lines; index++) {
    for (const { start, weights } of taps) {
      for (let value = 0; value < values; value++) {
        let sum = 2 ** (precision - 1);
        let from = index * line + start * step + value;
        for (const weight of weights) {
          sum += weight * source[from];
          from += step;
        }
        result[at++] = sum >> precision;
      }
    }
  }
  return result;
}
