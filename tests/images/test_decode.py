"""Decoding: every format, mode and orientation, and every refusal."""

import io
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, WebPImagePlugin
from PIL.ImageFile import ImageFile

from gpt_serve.errors import ImageError, ImageTooLarge, UndecodableImage, UnsupportedImage
from gpt_serve.images.decode import ImageLimits, decode, from_pil
from tests.hostile_images import encode, fixed_cases, hostile_images, photo, png_bomb, png_chunk, png_file


def pixels(image: Image.Image) -> torch.Tensor:
    """The slow, obvious conversion of an RGB image."""
    return torch.tensor(np.array(image)).permute(2, 0, 1)


def oriented(kind: str, orientation: int, image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(kind, image, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


# decode: formats and modes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decode_gives_the_pixels_that_pillow_gives(kind):
    data = encode(kind)
    image = decode(data)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 48, 64)
    assert torch.equal(image, pixels(Image.open(io.BytesIO(data)).convert("RGB")))


def test_decode_is_deterministic():
    data = encode("JPEG", photo(200, 150))
    assert torch.equal(decode(data), decode(data))


def test_decode_progressive_jpeg():
    data = encode("JPEG", photo(200, 150), progressive=True)
    assert torch.equal(decode(data), pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("kind", ["PNG"])
def test_decode_grey_and_palette(mode, kind):
    image = photo().convert(mode)
    assert torch.equal(decode(encode(kind, image)), pixels(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decode_composites_alpha_on_white(mode, kind):
    image = photo().convert(mode)
    alpha = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    image.putalpha(Image.fromarray(alpha))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    opacity = torch.tensor(alpha) / 255
    expected = pixels(image.convert("RGB")) * opacity + 255 * (1 - opacity)
    assert (decode(encode(kind, image, **options)) - expected).abs().max() <= 1


def test_decode_palette_with_one_transparent_entry():
    image = photo().quantize(16)
    shown = decode(encode("PNG", image, transparency=3))
    expected = pixels(image.convert("RGB"))
    expected[:, torch.tensor(np.array(image)) == 3] = 255
    assert torch.equal(shown, expected)


def test_decode_palette_with_graded_transparency():
    image = photo().quantize(16)
    shown = decode(encode("PNG", image, transparency=bytes(range(0, 256, 16))))
    opacity = torch.tensor(np.array(image)) * 16 / 255
    assert (shown - (pixels(image.convert("RGB")) * opacity + 255 * (1 - opacity))).abs().max() <= 1


@pytest.mark.parametrize(
    ("depth", "color", "row", "transparent"),
    [
        (8, 0, b"\x07", b"\0\x07"),
        (8, 2, b"\1\2\3", b"\0\1\0\2\0\3"),
        (16, 0, b"\1\2", b"\1\2"),
    ],
)
def test_decode_transparent_colour(depth, color, row, transparent):
    file = png_file(1, 2, b"\0" + row + b"\0" + bytes(len(row)), depth=depth, color=color)
    marked = png_file(
        1, 2, b"\0" + row + b"\0" + bytes(len(row)), depth=depth, color=color, before=png_chunk(b"tRNS", transparent)
    )
    assert decode(file)[:, 0, 0].max() < 8
    assert decode(marked)[:, 0, 0].tolist() == [255, 255, 255]
    assert decode(marked)[:, 1, 0].tolist() == [0, 0, 0]


def test_decode_scales_16_bit_grey():
    wide = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    shown = decode(encode("PNG", Image.fromarray(wide)))
    assert (shown - torch.tensor(wide.astype(np.float32)) / 257).abs().max() <= 1
    assert shown.min() == 0
    assert shown.max() == 255


def test_decode_16_bit_colour_and_grey_agree():
    grey, rgb = struct.pack(">H", 0x81FF), struct.pack(">HHH", 0x81FF, 0x81FF, 0x81FF)
    shown = [
        decode(png_file(1, 1, b"\0" + row, depth=16, color=color)).flatten().tolist()
        for row, color in [(grey, 0), (rgb, 2), (grey + b"\xff\xff", 4)]
    ]
    assert shown == [[0x81] * 3] * 3


def test_decode_cmyk():
    image = photo()
    shown = decode(encode("JPEG", image.convert("CMYK"), quality=95))
    assert (shown.int() - pixels(image).int()).abs().float().mean() < 8


def test_decode_ycck():
    image = photo()
    # Pillow writes CMYK inverted, so inks that are the inverse of the inverted image's YCbCr make a YCCK file.
    inks = [ImageOps.invert(channel) for channel in ImageOps.invert(image).convert("YCbCr").split()]
    data = bytearray(encode("JPEG", Image.merge("CMYK", [*inks, Image.new("L", image.size)]), quality=95))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    assert (decode(bytes(data)).int() - pixels(image).int()).abs().float().mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decode_shows_the_first_frame(kind):
    frames = [photo(seed=seed) for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(kind, frames[0], save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert torch.equal(decode(data), pixels(frames[0]))


# decode: orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_the_orientation(kind, orientation):
    data = oriented(kind, orientation, photo())
    opened = Image.open(io.BytesIO(data))
    assert torch.equal(decode(data), pixels(ImageOps.exif_transpose(opened)))
    assert torch.equal(decode(data, exif=False), pixels(opened))
    assert torch.equal(decode(data), decode(data, exif=False)) == (orientation == 1)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_decode_ignores_an_invalid_orientation(orientation):
    data = oriented("JPEG", orientation, photo())
    assert torch.equal(decode(data), decode(data, exif=False))


def test_decode_finds_the_orientation_behind_the_pixels():
    exif = png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    data = encode("PNG")
    assert decode(data[:-12] + exif + data[-12:]).shape == (3, 64, 48)


def test_decode_survives_damaged_exif():
    data = encode("JPEG", photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x1a\0\x05" * 9)
    assert decode(data).shape == (3, 48, 64)


# decode: refusals


@pytest.mark.parametrize("case", fixed_cases(), ids=lambda case: case.name)
def test_decode_refuses(case):
    with pytest.raises(case.expected) as refusal:
        decode(case.data)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 160


def test_decode_refuses_a_thousand_hostile_images():
    wrong = []
    for case in hostile_images(1000, seed=1):
        try:
            decode(case.data)
            wrong.append((case.name, "decoded"))
        except ImageError as error:
            if not isinstance(error, case.expected):
                wrong.append((case.name, repr(error)))
    assert wrong == []


def test_hostile_images_depend_on_the_seed_alone():
    assert list(hostile_images(80, seed=3)) == list(hostile_images(80, seed=3))
    assert list(hostile_images(80, seed=3)) != list(hostile_images(80, seed=4))


def test_decode_raises_nothing_but_image_errors_for_mutated_images():
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encode(kind, photo(), exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    files += [encode("PNG", photo().convert(mode)) for mode in ("P", "LA", "1")]
    files += [encode("JPEG", photo(), progressive=True), encode("JPEG", photo().convert("CMYK"))]
    outcomes = set()
    for _ in range(600):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data) if rng.random() < 0.5 else 200)] = rng.randrange(256)
        try:
            assert decode(bytes(data)).dtype == torch.uint8
            outcomes.add("decoded")
        except ImageError as error:
            outcomes.add(type(error).__name__)
    assert {"decoded", "UndecodableImage", "UnsupportedImage"} <= outcomes


@pytest.mark.parametrize("error", [MemoryError(), Image.DecompressionBombError("big"), RuntimeError("x"), KeyError(0)])
def test_decode_translates_whatever_pillow_raises(monkeypatch, error):
    def fail(*_):
        raise error

    data = encode("PNG")
    monkeypatch.setattr(ImageFile, "load_prepare", fail)
    memory = isinstance(error, MemoryError | Image.DecompressionBombError)
    with pytest.raises(ImageTooLarge if memory else UndecodableImage) as refusal:
        decode(data)
    assert refusal.value.__cause__ is error


def test_decode_limits_bytes():
    data = encode("PNG")
    assert decode(data, ImageLimits(max_bytes=len(data))).shape == (3, 48, 64)
    with pytest.raises(ImageTooLarge, match="MiB allowed"):
        decode(data, ImageLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_decode_limits_pixels(kind):
    data = encode(kind)
    assert decode(data, ImageLimits(max_pixels=64 * 48)).shape == (3, 48, 64)
    with pytest.raises(ImageTooLarge, match="64 x 48 pixels"):
        decode(data, ImageLimits(max_pixels=64 * 48 - 1))


def test_decode_refuses_a_bomb_before_allocating(monkeypatch):
    bomb = png_bomb(20_000, 20_000)
    assert len(bomb) < 100_000
    monkeypatch.setattr(ImageFile, "load_prepare", lambda _: pytest.fail("allocated"))
    with pytest.raises(ImageTooLarge, match="20000 x 20000"):
        decode(bomb)


def test_decode_checks_a_webp_canvas_before_the_decoder_allocates_it(monkeypatch):
    data = encode("WEBP", photo(), save_all=True, append_images=[photo(seed=1)])
    data = data[:24] + (7999).to_bytes(3, "little") * 2 + data[30:]
    monkeypatch.setattr(WebPImagePlugin._webp, "WebPAnimDecoder", lambda _: pytest.fail("allocated"))
    with pytest.raises(ImageTooLarge, match="8000 x 8000"):
        decode(data)


def test_decode_in_threads():
    good = [encode(kind, photo(100, 80, seed)) for seed, kind in enumerate(["JPEG", "PNG", "WEBP"] * 20)]
    bad = [case.data for case in hostile_images(120, seed=2)]
    jobs = [data for pair in zip(good, bad[::2], bad[1::2], strict=True) for data in pair]

    def attempt(data: bytes) -> torch.Tensor | type[ImageError]:
        try:
            return decode(data)
        except ImageError as error:
            return type(error)

    expected = [attempt(data) for data in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(attempt, jobs))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one is other


# from_pil


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"])
def test_from_pil_takes_every_8_bit_mode(mode):
    via = {"PA": "P", "RGBa": "RGBA", "LAB": None}.get(mode, "RGB")
    image = Image.new("LAB", (64, 48), "grey") if via is None else photo().convert(via).convert(mode)
    assert from_pil(image).shape == (3, 48, 64)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_from_pil_scales_wide_grey(mode):
    image = Image.fromarray(np.array([[0, 0x80FF, 65535]], dtype=np.int32)).convert(mode)
    assert image.mode == mode
    assert from_pil(image).tolist() == [[[0, 0x80, 255]]] * 3


def test_from_pil_refuses_float():
    with pytest.raises(UnsupportedImage, match="convert it to RGB"):
        from_pil(Image.new("F", (4, 4)))


def test_from_pil_of_a_truncated_file():
    with Image.open(io.BytesIO(encode("JPEG")[:-100])) as image, pytest.raises(UndecodableImage, match="JPEG"):
        from_pil(image)


def test_from_pil_leaves_the_image_alone():
    image = photo().convert("RGBA")
    before = image.copy()
    from_pil(image).fill_(0)
    assert image == before
