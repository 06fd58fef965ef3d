"""Bytes to uint8 tensor: the one decoder and the one preprocessing, for training, serving and export.

    decode or from_pil -> uint8 (3, h, w) RGB -> preprocess_image -> uint8 (3, H, W) -> batch -> normalize -> float32

Image bytes come from strangers, so `decode` bounds what a file can cost before Pillow decodes it, and every failure is
an `ImageError`. Nothing here changes a process-wide setting of Pillow or Python (warning filters, pixel limits), so it
may run in many threads at once.

Scaling follows timm's evaluation transform, but runs on the uint8 tensor, where it is five to eight times as fast as
Pillow. The two round differently: about 1 value in 250 differs by one level of 255, 1 in 100,000 by two.
"""

import io
import math
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
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from gpt_serve.errors import ImageError, ImageTooLarge, UndecodableImage, UnsupportedImage
from gpt_serve.images.headers import check_jpeg, identify, orientation, webp_size
from gpt_serve.specs import Preprocess

_MEBI = 2**20
# Scaling the shorter side of a 1 x 50,000 image up to 256 would make 12.8 million columns, of which the centre crop
# keeps 256. The ends of a side that would become longer than this many times what it must cover are cut off first.
_MAX_STRETCH = 50

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
    """What one image may cost.

    Attributes:
        max_bytes: size of the file.
        max_pixels: width times height. Decoding takes 10 to 24 bytes of memory per pixel.
    """

    max_bytes: int = 10 * _MEBI
    max_pixels: int = 50_000_000


LOCAL_LIMITS = ImageLimits(max_bytes=256 * _MEBI, max_pixels=250_000_000)
"""For files that the user's own command line names, rather than strangers' requests."""


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
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"image has {len(data) / _MEBI:.1f} MiB, more than the {limits.max_bytes / _MEBI:.1f} MiB allowed: "
            "send a smaller file"
        )
    name = identify(data)
    with _pillow_errors(name), _open(name, data, limits) as image:
        _check_pixels(image.size, limits)
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
    with _pillow_errors(image.format or "Pillow"):
        image.load()
        rgb = _to_rgb(image)
        method = _TRANSPOSE.get(orientation(image.info.get("exif"))) if exif else None
        if method is not None:
            rgb = rgb.transpose(method)
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def preprocess_image(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Scale and crop an image to the backbone's input size.

    Args:
        image: uint8 (3, h, w).
        preprocess: how.

    Returns:
        uint8 (3, H, W), contiguous.
    """
    return center_crop(resize(image, preprocess), preprocess).contiguous()


def resize(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Scale an image as timm's evaluation transform does, antialiased.

    ``center`` keeps the aspect ratio and covers ``floor(input_size / crop_pct)``; ``squash`` scales
    both sides to ``input_size``. If ``center`` would make a side longer than 50 times what it covers,
    the ends of that side are cut off first, far outside the later crop, which may move by a pixel.

    Args:
        image: uint8 (3, h, w).
        preprocess: gives the sizes and the interpolation.

    Returns:
        uint8 (3, h', w').
    """
    size = preprocess.input_size
    if preprocess.crop_mode == "center":
        cover = (math.floor(size[0] / preprocess.crop_pct), math.floor(size[1] / preprocess.crop_pct))
        image = _cut_ends(image, cover)
        size = _covering_size((image.shape[1], image.shape[2]), cover)
    mode = InterpolationMode(preprocess.interpolation)
    scaled: Tensor = transforms.resize(image, list(size), mode, antialias=True)  # type: ignore[attr-defined]
    return scaled


def center_crop(image: Tensor, preprocess: Preprocess) -> Tensor:
    """Cut the centre out of a scaled image.

    Args:
        image: uint8 (3, h', w'); a side shorter than the input's is padded with black.
        preprocess: gives the input size.

    Returns:
        uint8 (3, H, W), a view where nothing is padded.
    """
    return _crop(image, preprocess.input_size)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(images / 255 - mean) / std``.

    Args:
        images: uint8 (B, 3, H, W), on any device.
        mean: (3,) for all rows or (B, 3) for each, on the same device.
        std: like ``mean``.

    Returns:
        float32 (B, 3, H, W).
    """
    scaled = images.to(torch.float32) / 255
    return (scaled - mean.to(torch.float32).view(-1, 3, 1, 1)) / std.to(torch.float32).view(-1, 3, 1, 1)


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
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
        return PngImageFile(stream)
    if name == "WebP":
        # The constructor allocates two canvases, so the size must be known before.
        _check_pixels(webp_size(data), limits)
        return WebPImageFile(stream)
    check_jpeg(data)
    return _QuietJpeg(stream)


def _check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    if size[0] * size[1] > limits.max_pixels:
        raise ImageTooLarge(
            f"image has {size[0]} x {size[1]} pixels, more than the {limits.max_pixels} allowed: scale it down first"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as RGB, without transparency."""
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
    """Keep the high byte, as Pillow itself does for 16-bit colour; its conversion of grey saturates."""
    wide = np.asarray(image)
    grey = (wide.clip(0, 65535) >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[wide == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _cut_ends(image: Tensor, cover: tuple[int, int]) -> Tensor:
    """Cut a side that scaling would make longer than ``_MAX_STRETCH`` times what it has to cover."""
    ratio = min(image.shape[1] / cover[0], image.shape[2] / cover[1])

    def keep(side: int, cover: int) -> int:
        longest = math.ceil(cover * ratio * _MAX_STRETCH)
        # An even number of pixels goes, so that the centre stays where it is.
        return side if side <= longest else longest + (side - longest) % 2

    return _crop(image, (keep(image.shape[1], cover[0]), keep(image.shape[2], cover[1])))


def _crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    cropped: Tensor = transforms.center_crop(image, list(size))  # type: ignore[attr-defined]
    return cropped


def _covering_size(image: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
    """The size (h', w') that keeps the aspect ratio of ``image`` and just covers ``cover``, rounded as timm does."""
    height, width = image
    if cover[0] != cover[1]:
        ratio = min(height / cover[0], width / cover[1])
        return round(height / ratio), round(width / ratio)
    if height <= width:
        return cover[0], int(cover[0] * width / height)
    return int(cover[0] * height / width), cover[0]
