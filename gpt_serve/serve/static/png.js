// The palette of a PNG: masks are pictures whose pixels are class ids, coloured by it.

/** CSS colours by class id; `base64` is a PNG file with a PLTE chunk. */
export function palette(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  // Eight bytes of signature, then chunks: length, four letters, content, checksum.
  for (let at = 8; at + 8 <= bytes.length; at += view.getUint32(at) + 12) {
    if (String.fromCharCode(...bytes.subarray(at + 4, at + 8)) === "PLTE") {
      return colours(bytes.subarray(at + 8, at + 8 + view.getUint32(at)));
    }
  }
  return [];
}

function colours(bytes) {
  return Array.from({ length: bytes.length / 3 }, (_, id) => `rgb(${bytes.slice(3 * id, 3 * id + 3).join(" ")})`);
}
