// Reads the metadata of an ONNX file: onnxruntime-web runs the graph but does not give its `metadata_props` out.
//
// An ONNX file is one protobuf message, a sequence of (tag, value) pairs. Field 14 of the model is
// `repeated StringStringEntryProto metadata_props`, whose field 1 is the key and field 2 the value. Every other
// field, the weights among them, is skipped by its length.

const METADATA_PROPS = 14;
const VARINT = 0;
const FIXED64 = 1;
const LENGTH_DELIMITED = 2;
const FIXED32 = 5;

/**
 * @param {Uint8Array} bytes an ONNX file
 * @returns {Map<string, string>} its metadata, empty when it has none
 * @throws {RangeError} the bytes are no protobuf message
 */
export function readMetadata(bytes) {
  const metadata = new Map();
  for (const [field, entry] of fields(bytes)) {
    if (field !== METADATA_PROPS) continue;
    const texts = new Map([...fields(entry)].map(([key, value]) => [key, new TextDecoder().decode(value)]));
    metadata.set(texts.get(1) ?? "", texts.get(2) ?? "");
  }
  return metadata;
}

/** Yields [number, bytes] of each field that has a length; the others, numbers, are passed over. */
function* fields(bytes) {
  let at = 0;

  function varint() {
    let value = 0;
    // Multiplied instead of shifted: JavaScript shifts 32 bits, and a length may need more.
    for (let scale = 1; scale < 2 ** 70; scale *= 128) {
      if (at >= bytes.length) throw new RangeError("the file ends within a number");
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
    throw new RangeError("a number has more than ten bytes");
  }

  while (at < bytes.length) {
    const tag = varint();
    const type = tag % 8;
    if (type === VARINT) {
      varint();
      continue;
    }
    const length = { [FIXED64]: 8, [FIXED32]: 4 }[type] ?? (type === LENGTH_DELIMITED ? varint() : Infinity);
    if (length > bytes.length - at) throw new RangeError("a field is longer than the file");
    if (type === LENGTH_DELIMITED) yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
    at += length;
  }
}
