"""Images that must be refused: seeded, small, each with the errors that may answer it.

for case in hostile_images(1000, seed=0):
    with pytest.raises(case.expected):
        decode(case.data)
"""

import functools
import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from gpt_serve.errors import ImageError, ImageTooLarge, UndecodableImage, UnsupportedImage


class Hostile(NamedTuple):
    """One case: ``expected`` are the errors that `decode` may raise for ``data`` with its default limits."""

    name: str
    data: bytes
    expected: tuple[type[ImageError], ...]


def hostile_images(count: int, seed: int = 0) -> Iterator[Hostile]:
    """``count`` hostile images: first every fixed case, then random ones, all decided by ``seed``."""
    rng = random.Random(seed)
    makers = itertools.cycle(_RANDOM_CASES)
    random_cases = (Hostile(f"{index}-{maker.__name__}", *maker(rng)) for index, maker in enumerate(makers))
    return itertools.islice(itertools.chain(fixed_cases(), random_cases), count)


@functools.cache
def fixed_cases() -> tuple[Hostile, ...]:
    """One of each wrong format, each bomb and each kind of damage."""
    formats = [Hostile(f"format-{name}", data, (UnsupportedImage,)) for name, data in _other_formats().items()]
    return (*formats, *_bombs(), *_damaged())


def _bombs() -> Iterator[Hostile]:
    yield Hostile("bomb-png-pixels", png_bomb(20_000, 20_000), (ImageTooLarge,))
    yield Hostile("bomb-jpeg-scans", jpeg_scan_bomb(1000), (UndecodableImage,))
    yield Hostile("bomb-jpeg-segments", b"\xff\xd8" + b"\xff\xfe\x00\x02" * 100_000, (UndecodableImage,))
    yield Hostile("bomb-jpeg-padding", b"\xff\xd8" + b"\xff" * 10**6, (UndecodableImage,))
    yield Hostile("bomb-png-text", png_text_bomb(2 * 2**20, 1), (UndecodableImage,))
    yield Hostile("bomb-png-texts", png_text_bomb(2**20, 100), (UndecodableImage,))
    yield Hostile("too-many-bytes", encode("PNG") + bytes(10 * 2**20), (ImageTooLarge,))


def _damaged() -> Iterator[Hostile]:
    yield Hostile("png-no-pixels", png_file(0, 4, b""), (UndecodableImage,))
    yield Hostile("png-no-data", png_file(4, 4, None), (UndecodableImage,))
    yield Hostile("png-unknown-filter", png_file(4, 2, b"\x09abcd" * 2), (UndecodableImage,))
    yield Hostile("jpeg-no-quantization", _without_segment(encode("JPEG"), 0xDB), (UndecodableImage,))
    yield Hostile("jpeg-no-scan", b"\xff\xd8\xff\xd9", (UndecodableImage,))
    yield Hostile("webp-no-chunk", b"RIFF\x04\0\0\0WEBP", (UndecodableImage,))
    yield Hostile("webp-unknown-chunk", b"RIFF\x1e\0\0\0WEBPVP9 " + bytes(22), (UndecodableImage,))


def photo(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """A smooth RGB image with some noise, so that it compresses like a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + rng.integers(-12, 13, (height, width, 3), dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    """``image`` as a file of format ``kind``; without one, a small photo."""
    buffer = io.BytesIO()
    (image or photo()).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_file(
    width: int, height: int, rows: bytes | None, *, depth: int = 8, color: int = 0, before: bytes = b""
) -> bytes:
    """A PNG of raw ``rows`` (each with its filter byte), with the chunks ``before`` the data; None: no data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = b"" if rows is None else png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + png_chunk(b"IEND", b"")


def png_bomb(width: int, height: int) -> bytes:
    """A complete black PNG, one bit per pixel: a few kilobytes that decode to ``width * height`` bytes."""
    return png_file(width, height, bytes((width // 8 + 1) * height), depth=1)


def png_text_bomb(size: int, count: int) -> bytes:
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(size), 9))
    return png_file(4, 2, b"\0abcd" * 2, before=text * count)


def jpeg_scan_bomb(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, each making the decoder walk the whole image."""
    data = encode("JPEG", Image.new("L", (512, 512), 128), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + b"\xff\xd9"


def _other_formats() -> dict[str, bytes]:
    saved = {name.lower(): encode(name) for name in ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PDF")}
    animated = encode("GIF", photo(), save_all=True, append_images=[photo(seed=1)])
    made = {
        "empty": b"",
        "one-byte": b"\xff",
        "zeros": bytes(1000),
        "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "html": b"<!doctype html><html><body><script>alert(1)</script></body></html>",
        "json": b'{"image": "nothing"}',
        "text": "Grüße, no image\n".encode(),
        "zip": b"PK\x03\x04" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "heic": b"\0\0\0\x18ftypheic" + bytes(100),
        "avif": b"\0\0\0\x18ftypavif" + bytes(100),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "pickle": b"\x80\x04\x95" + bytes(100),
        "wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
        "half-magic": b"\x89PNG\r\n",
        "newline-then-jpeg": b"\n" + encode("JPEG"),
        "base64-png": b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ",
    }
    return saved | {"animated-gif": animated} | made


def _without_segment(jpeg: bytes, marker: int) -> bytes:
    """Drop the first segment with ``marker`` and those that follow it at once."""
    while (start := jpeg.find(bytes([0xFF, marker]))) >= 0:
        length = int.from_bytes(jpeg[start + 2 : start + 4], "big")
        jpeg = jpeg[:start] + jpeg[start + 2 + length :]
    return jpeg


Case = tuple[bytes, tuple[type[ImageError], ...]]


def _random_bytes(rng: random.Random) -> Case:
    return b"\0" + rng.randbytes(rng.randrange(4000)), (UnsupportedImage,)


def _magic_then_random(rng: random.Random) -> Case:
    magic = rng.choice([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\x0f\0\0WEBP"])
    return magic + rng.randbytes(rng.randrange(4000)), (UndecodableImage,)


def _webp_chunk_then_random(rng: random.Random) -> Case:
    kind = rng.choice([b"VP8 ", b"VP8L", b"VP8X"])
    return b"RIFF\xff\x0f\0\0WEBP" + kind + rng.randbytes(rng.randrange(4000)), (UndecodableImage, ImageTooLarge)


def _truncated(rng: random.Random) -> Case:
    kind = rng.choice(["JPEG", "PNG", "WEBP"])
    options = rng.choice([{}, {"progressive": True}, {"lossless": True}])
    data = encode(kind, photo(seed=rng.randrange(8)), **options)
    return data[: rng.randrange(int(len(data) * 0.9))], (UnsupportedImage, UndecodableImage)


def _truncated_animation(rng: random.Random) -> Case:
    data = encode("WEBP", photo(), save_all=True, append_images=[photo(seed=1), photo(seed=2)])
    return data[: rng.randrange(int(len(data) * 0.9))], (UnsupportedImage, UndecodableImage)


def _huge_png(rng: random.Random) -> Case:
    return png_file(rng.randrange(10_000, 2**31), rng.randrange(10_000, 2**31), b"\0"), (ImageTooLarge,)


def _huge_jpeg(rng: random.Random) -> Case:
    data = bytearray(encode("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", rng.randrange(10_000, 65_536), rng.randrange(10_000, 65_536))
    return bytes(data), (ImageTooLarge,)


def _huge_webp(rng: random.Random) -> Case:
    data = bytearray(encode("WEBP", photo(), save_all=True, append_images=[photo(seed=1)]))
    data[24:27] = rng.randrange(10_000, 2**24).to_bytes(3, "little")
    data[27:30] = rng.randrange(10_000, 2**24).to_bytes(3, "little")
    return bytes(data), (ImageTooLarge,)


def _broken_crc(rng: random.Random) -> Case:
    data = bytearray(encode("PNG"))
    data[rng.randrange(29, 33)] ^= 1 << rng.randrange(8)
    return bytes(data), (UndecodableImage,)


def _corrupt_idat(rng: random.Random) -> Case:
    before, body = png_file(4, 2, None)[:33], rng.randbytes(rng.randrange(1, 2000))
    return before + png_chunk(b"IDAT", b"\0" + body) + png_chunk(b"IEND", b""), (UndecodableImage,)


_RANDOM_CASES: list[Callable[[random.Random], Case]] = [
    _random_bytes,
    _magic_then_random,
    _webp_chunk_then_random,
    _truncated,
    _truncated_animation,
    _huge_png,
    _huge_jpeg,
    _huge_webp,
    _broken_crc,
    _corrupt_idat,
]
