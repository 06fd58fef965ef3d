"""Local image files in formats that the server does not take become PNG, without loss at 8 bits.

A server takes JPEG, PNG and WebP from strangers (`gpt_serve.images.decode`). Data sets hold more, and what reads them
accepts these formats, too, under the same limits of bytes and pixels, which are checked before anything is decoded.
"""

import io
import re
from pathlib import Path

from PIL import Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

from gpt_serve.errors import UnsupportedImage
from gpt_serve.images.decode import LOCAL_LIMITS, check_bytes, check_pixels, from_pil, pillow_errors
from gpt_serve.images.headers import identify

SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"]
    + [".avif", ".bmp", ".gif", ".jp2", ".j2k", ".jpx", ".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff"]
)
"""The usual ends of the names of files that can be read, in lower case."""

_SYSTEM_FOLDERS = {"__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "$recycle.bin", "lost+found", "__pycache__"}
_SYSTEM_FOLDERS |= {"system volume information"}

HEAD_BYTES = 32
"""How many bytes of a file `is_image` needs."""

# How a file begins, and Pillow's class for it. Pillow's own tests are laxer: a text that begins with "BM" would pass.
_FORMATS: dict[str, tuple[re.Pattern[bytes], type[ImageFile.ImageFile]]] = {
    "AVIF": (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), AvifImageFile),
    "BMP": (re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), BmpImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImageFile),
    "JPEG 2000": (re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"), Jpeg2KImageFile),
    "PPM": (re.compile(rb"P[1-6]\s"), PpmImageFile),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
}


def is_of_system(folder: str) -> bool:
    """Whether a folder of this name is hidden, or one that operating systems and programs leave among images."""
    return folder.startswith(".") or folder.lower() in _SYSTEM_FOLDERS


def is_image(head: bytes) -> bool:
    """Whether a file whose first `HEAD_BYTES` are ``head`` is in a format that `readable` takes."""
    try:
        identify(head)
    except UnsupportedImage:
        return _other_format(head) is not None
    return True


def readable(data: bytes) -> bytes:
    """Give a file the form that the decoder takes: JPEG, PNG and WebP stay as they are, others become 8-bit RGB PNG.

    Of an animation or of several pages, the first one. The EXIF orientation is kept.

    Raises:
        ImageTooLarge: more bytes or pixels than `LOCAL_LIMITS` allow.
        UnsupportedImage: a format that is not read, or pixels without a fixed range.
        UndecodableImage: damaged or truncated.
    """
    try:
        identify(data)
    except UnsupportedImage as error:
        name = _other_format(data[:HEAD_BYTES])
        if name is None:
            what = (
                f"file is not a JPEG, PNG or WebP image, nor {', '.join(_FORMATS)}" if data else "image file is empty"
            )
            raise UnsupportedImage(f"{what}: replace it") from error
        return _as_png(name, data)
    return data


def read_image(path: Path) -> bytes:
    """Read a file into the form that the decoder takes, see `readable`.

    Raises:
        OSError: the disk refuses.
        ImageTooLarge, UnsupportedImage, UndecodableImage: as `readable`.
    """
    return readable(path.read_bytes())


def encode_png(image: Image.Image, level: int = 1, exif: bytes | None = None) -> bytes:
    """Encode an image as PNG, without loss.

    Args:
        level: from 1, fast, to 9, small.
        exif: stored as it is.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level, exif=exif)
    return buffer.getvalue()


def _other_format(head: bytes) -> str | None:
    return next((name for name, (pattern, _) in _FORMATS.items() if pattern.match(head)), None)


def _as_png(name: str, data: bytes) -> bytes:
    check_bytes(data, LOCAL_LIMITS)
    # `Image.open` would warn of many pixels, which cannot be caught without changing the filters of all threads.
    with pillow_errors(name), _FORMATS[name][1](io.BytesIO(data)) as image:
        check_pixels(image.size, LOCAL_LIMITS)
        pixels = from_pil(image, exif=False).permute(1, 2, 0).numpy()
        return encode_png(Image.fromarray(pixels), exif=image.info.get("exif"))
