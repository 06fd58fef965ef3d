"""Local files of formats that the server does not take, against Pillow."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gpt_serve.errors import ImageError, ImageTooLarge, UndecodableImage, UnsupportedImage
from gpt_serve.images import convert
from gpt_serve.images.convert import HEAD_BYTES, is_image, read_image, readable
from gpt_serve.images.decode import ImageLimits, decode, from_pil
from tests.hostile_images import encode, photo

OTHERS = ("AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")


MODES = {  # that Pillow can write
    "AVIF": ("RGB", "L", "RGBA", "P", "CMYK"),
    "BMP": ("RGB", "L", "RGBA", "1", "P"),
    "GIF": ("RGB", "L", "RGBA", "1", "P"),
    "JPEG2000": ("RGB", "L", "RGBA", "CMYK", "I;16"),
    "PPM": ("RGB", "L", "RGBA", "1", "I;16"),
    "TIFF": ("RGB", "L", "RGBA", "1", "P", "CMYK", "I;16"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in OTHERS for mode in MODES[kind]])
def test_pixels_are_those_that_pillow_reads(kind: str, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257)
    else:
        image = photo().convert(mode)
    data = encode(kind, image)
    assert is_image(data[:HEAD_BYTES])
    with Image.open(io.BytesIO(data)) as opened:
        assert torch.equal(decode(readable(data)), from_pil(opened))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_the_server_takes_stays_as_it_is(kind: str) -> None:
    data = encode(kind)
    assert readable(data) is data and is_image(data[:HEAD_BYTES])


@pytest.mark.parametrize("kind", ["AVIF", "TIFF"])
def test_the_orientation_is_kept(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = readable(encode(kind, photo(64, 48), exif=exif))
    assert decode(turned).shape == (3, 64, 48)


@pytest.mark.parametrize("kind", OTHERS)
def test_limits_are_those_of_local_files(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(kind, photo(64, 48))
    monkeypatch.setattr(convert, "LOCAL_LIMITS", ImageLimits(max_pixels=64 * 48 - 1))
    with pytest.raises(ImageTooLarge, match="64 x 48 pixels, more than the 3071 allowed"):
        readable(data)
    monkeypatch.setattr(convert, "LOCAL_LIMITS", ImageLimits(max_bytes=len(data) - 1))
    with pytest.raises(ImageTooLarge, match="MiB allowed"):
        readable(data)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    """A bitmap that claims 400 megapixels and holds none."""
    size = struct.pack("<iiHHIIiiII", 20_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<I", 40) + size
    with pytest.raises(ImageTooLarge, match="20000 x 20000 pixels"):
        readable(data)


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's, of TIFF
@pytest.mark.parametrize("kind", OTHERS)
def test_damage_is_an_error_of_the_image(kind: str) -> None:
    data, rng = encode(kind, photo(64, 48)), np.random.default_rng(0)
    with pytest.raises(UndecodableImage):
        readable(data[: len(data) // 3])
    for _ in range(50):
        broken = bytearray(data)
        for at in rng.integers(HEAD_BYTES, min(len(data), 400), 4):
            broken[at] = rng.integers(256)
        try:
            assert decode(readable(bytes(broken))).shape[0] == 3
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text", [b"", b"BMW and Audi, a list of cars\n", b"P2P networks", b"GIF", b"II", b"%PDF-1.7", b"<svg/>"]
)
def test_text_is_no_image(text: bytes) -> None:
    assert not is_image(text)
    with pytest.raises(
        UnsupportedImage, match="file is (empty|not a JPEG, PNG or WebP image, nor AVIF, BMP.*): replace it$"
    ):
        readable(text)


def test_a_file_that_is_not_there_is_the_disks_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.bmp")
