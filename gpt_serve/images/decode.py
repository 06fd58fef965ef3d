"""The one decoder, for training, serving and export: from the bytes of a file to a uint8 (3, h, w) RGB tensor.

Image bytes come from strangers, so `decode` bounds what a file can cost before Pillow decodes it, and every failure is
an `ImageError`. Nothing here changes a process-wide setting of Pillow or Python (warning filters, pixel limits), so it
may run in many threads at once.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from gpt_serve.errors import ImageError, ImageTooLarge, UndecodableImage, UnsupportedImage
from gpt_serve.images.headers import check_jpeg, check_png, identify, orientation, webp_size

_MEBI = 2**20

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageLimits:
    """Limits of what one image may cost.

    Attributes:
        max_bytes: most bytes of the file.
        max_pixels: most pixels, width times height. Decoding takes 10 to 24 bytes of memory per pixel.
    """

    max_bytes: int = 10 * _MEBI
    max_pixels: int = 50_000_000


LOCAL_LIMITS = ImageLimits(max_bytes=256 * _MEBI, max_pixels=250_000_000)
"""Limits for files that the user's own command line names, instead of strangers' requests."""


def decode(data: bytes, limits: ImageLimits = ImageLimits(), *, exif: bool = True) -> Tensor:
    """Decode a JPEG, PNG or WebP file; of an animation, its first frame.

    Args:
        data: the file's bytes.
        limits: checked before anything is decoded.
        exif: whether to apply the EXIF orientation.

    Returns:
        uint8 (3, h, w) RGB, see `from_pil`.

    Raises:
        ImageTooLarge: more bytes or pixels than ``limits`` allow.
        UnsupportedImage: not JPEG, PNG or WebP.
        UndecodableImage: one of these, but damaged or truncated.
    """
    check_bytes(data, limits)
    name = identify(data)
    with pillow_errors(name), _open(name, data, limits) as image:
        check_pixels(image.size, limits)
        return from_pil(image, exif=exif)


def from_pil(image: Image.Image, *, exif: bool = True) -> Tensor:
    """Convert a Pillow image.

    16-bit grey is scaled to 8 bits, transparency is composited on white, CMYK is converted without a
    colour profile.

    Args:
        image: loaded if it is not yet.
        exif: whether to apply the orientation in ``image.info["exif"]``.

    Returns:
        uint8 (3, h, w) RGB, a view of (h, w, 3) memory: the layout in which scaling is fastest.

    Raises:
        UnsupportedImage: the mode has no fixed range (``F``).
        UndecodableImage: Pillow cannot load it or convert its mode to RGB.
    """
    with pillow_errors(image.format or "Pillow"):
        image.load()
        rgb = _to_rgb(image)
        method = _TRANSPOSE.get(orientation(image.info.get("exif"))) if exif else None
        if method is not None:
            rgb = rgb.transpose(method)
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


@contextmanager
def pillow_errors(name: str) -> Iterator[None]:
    """Make whatever the Pillow code inside raises an `ImageError`.

    Pillow promises no closed list: damaged files have raised OSError, SyntaxError, ValueError, TypeError, EOFError,
    struct.error, zlib.error, IndexError, KeyError, OverflowError, RuntimeError and, under ``-W error``, warnings.
    """
    try:
        yield
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageTooLarge("image needs more memory than there is: send a smaller one") from error
    except Exception as error:
        raise UndecodableImage(f"{name} image is damaged or truncated: save it anew and send that") from error


class _QuietJpeg(JpegImageFile):
    """A JPEG whose resolution is not looked up in EXIF, where damaged entries would make Pillow warn."""

    def _read_dpi_from_exif(self) -> None:
        pass


def _open(name: str, data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    """Let Pillow read the header.

    Pillow's classes are called directly: ``Image.open`` would also try multi-picture files, and warns, which cannot
    be caught without changing the filters of all threads.
    """
    stream = io.BytesIO(data)
    if name == "PNG":
        check_png(data)
        return PngImageFile(stream)
    if name == "WebP":
        # The constructor allocates two canvases, so the size must be known before.
        check_pixels(webp_size(data), limits)
        return WebPImageFile(stream)
    check_jpeg(data)
    return _QuietJpeg(stream)


def check_bytes(data: bytes, limits: ImageLimits) -> None:
    """Raise `ImageTooLarge` if the file has more bytes than allowed."""
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"image has {len(data) / _MEBI:.1f} MiB, more than the {limits.max_bytes / _MEBI:.1f} MiB allowed: "
            "send a smaller file"
        )


def check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    """Raise `ImageTooLarge` if (width, height) come to more pixels than allowed."""
    if size[0] * size[1] > limits.max_pixels:
        raise ImageTooLarge(
            f"image has {size[0]} x {size[1]} pixels, more than the {limits.max_pixels} allowed: scale it down first"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image to RGB without transparency."""
    if image.mode == "F":
        raise UnsupportedImage("image of mode F has no fixed range: convert it to RGB first")
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    rgb = Image.new("RGB", image.size, "white")
    rgb.paste(rgba, mask=rgba.getchannel("A"))
    return rgb


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Keep the upper 8 of 16 bits, as Pillow does for colour; its own conversion of grey would saturate."""
    wide = np.asarray(image)
    grey = (wide.clip(0, 65535) >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[wide == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")
