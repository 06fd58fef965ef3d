"""What the bytes of an image file tell before it is opened, without Pillow and torch.

These checks bound what a hostile file can cost. The decoders behind Pillow have no such limits, and Pillow's reader of
EXIF warns about damage, which no thread can silence for itself alone.
"""

import re

from gpt_serve.errors import ImageTooLarge, UndecodableImage, UnsupportedImage

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# 0xff 0x00 is a stuffed byte and 0xff 0xd0 to 0xd7 a restart: both belong to the data of a scan.
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_START_OF_SCAN, _END_OF_IMAGE, _TEMPORARY = 0xDA, 0xD9, 0x01
# Every scan walks all blocks of the image, however few bytes it has: at 50 million pixels 25 ms for
# 75 bytes, so an hour for 10 MiB. Encoders write about ten.
_MAX_SCANS = 50
_ANY_SCANS = 12  # whatever the size
_MAX_SCANNED = 250_000_000  # pixels times scans, beyond these
# Pillow reads markers, and stray bytes before the first scan, in a loop at 1 to 3 µs each.
_MAX_MARKERS = 5_000
_MAX_STRAY_BYTES = 64 * 2**10
_STARTS_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_MAX_SEGMENTS_BEFORE_FRAME = 256
# Pillow reads chunks in a loop at 5 µs each; encoders write some for each 8 KiB of data.
_MAX_CHUNKS = 20_000
_MAX_SIDE = 65_535

_EXIF_PREFIX = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
# Bytes of a value by its type (TIFF 6.0, section 2): BYTE, SHORT, LONG, SBYTE, UNDEFINED, SSHORT, SLONG, IFD, LONG8.
_INTEGER_SIZES = {1: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 13: 4, 16: 8}


def identify(data: bytes) -> str:
    """Tell the format by the first bytes: ``JPEG``, ``PNG`` or ``WebP``.

    Raises:
        UnsupportedImage: none of these.
    """
    if data.startswith(_JPEG_MAGIC):
        return "JPEG"
    if data.startswith(_PNG_MAGIC):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    what = "file is not a JPEG, PNG or WebP image" if data else "image file is empty"
    raise UnsupportedImage(f"{what}: send one in JPEG, PNG or WebP format")


def pixels(data: bytes) -> int:
    """Width times height, as far as the first bytes of the file tell; 0 if they do not. Never raises."""
    try:
        name = identify(data)
        if name == "PNG":
            return int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")
        if name == "WebP":
            width, height = webp_size(data)
            return width * height
        return _jpeg_pixels(data)
    except (UndecodableImage, UnsupportedImage):
        return 0


def _jpeg_pixels(data: bytes) -> int:
    position = len(_JPEG_MAGIC) - 1
    for _ in range(_MAX_SEGMENTS_BEFORE_FRAME):
        match = _JPEG_MARKER.search(data, position)
        if match is None:
            return 0
        position = match.end()
        if match[1][0] in _STARTS_OF_FRAME:
            height, width = data[position + 3 : position + 5], data[position + 5 : position + 7]
            return int.from_bytes(height, "big") * int.from_bytes(width, "big")
        position += int.from_bytes(data[position : position + 2], "big")
    return 0


def check_png(data: bytes) -> None:
    """Refuse a PNG with more chunks than any encoder writes, or a side longer than other formats allow.

    Raises:
        UndecodableImage: there are too many chunks.
        ImageTooLarge: a side is too long: a row of 50 million pixels takes a gigabyte to be scaled.
    """
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[12:16] == b"IHDR" and max(width, height) > _MAX_SIDE:
        raise ImageTooLarge(f"image has a side of more than {_MAX_SIDE} pixels: scale it down first")
    position = len(_PNG_MAGIC)
    for _ in range(_MAX_CHUNKS):
        if position >= len(data):
            return
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise UndecodableImage("PNG image has far too many chunks: save it anew and send that")


def check_jpeg(data: bytes) -> None:
    """Refuse a JPEG with more scans, markers or stray bytes than any encoder writes.

    Raises:
        UndecodableImage: there are too many, or no scan at all.
    """
    position, markers, scans, stray = len(_JPEG_MAGIC) - 1, 0, 0, 0
    most_scans = min(_MAX_SCANS, max(_ANY_SCANS, _MAX_SCANNED // max(1, _jpeg_pixels(data))))
    while match := _JPEG_MARKER.search(data, position):
        marker = match[1][0]
        if scans == 0:
            stray += match.start() - position
        if marker == _END_OF_IMAGE:
            break
        markers += 1
        scans += marker == _START_OF_SCAN
        if scans > most_scans or markers > _MAX_MARKERS or stray > _MAX_STRAY_BYTES:
            raise UndecodableImage("JPEG image has far too many scans or segments: save it anew and send that")
        position = match.end()
        if marker != _TEMPORARY:
            position += int.from_bytes(data[position : position + 2], "big")
    if scans == 0:
        raise UndecodableImage("JPEG image has no image data: save it anew and send that")


def webp_size(data: bytes) -> tuple[int, int]:
    """Read (width, height) of a WebP file's canvas (RFC 9649, sections 2.5 to 2.7).

    Raises:
        UndecodableImage: the header is damaged.
    """
    head, kind = data[:30], data[12:16]
    if len(head) == 30 and kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if len(head) == 30 and kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    if len(head) >= 25 and kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise UndecodableImage("WebP image has a damaged header: save it anew and send that")


def orientation(exif: bytes | None) -> int:
    """Read the orientation tag of the first EXIF directory (EXIF 2.32, section 4.6): 1 to 8; anything else means 1.

    The standard stores it as SHORT. Cameras and editors have stored it as every other type of integer, too, and in
    either byte order: the number counts, not how it is written. Of several such entries the last one does, as for
    Pillow. Damage never raises: a photo whose EXIF is broken is still a photo.

    Args:
        exif: a TIFF structure, with or without the prefix ``Exif\\0\\0``.
    """
    tiff = (exif or b"").removeprefix(_EXIF_PREFIX).removeprefix(_EXIF_PREFIX)  # some writers put it twice
    if tiff[:2] not in (b"II", b"MM"):
        return 1
    found = 1
    first = _number(tiff, 4, 4) + 2
    for entry in range(first, min(first + 12 * _number(tiff, first - 2, 2), len(tiff)), 12):
        if _number(tiff, entry, 2) == _ORIENTATION_TAG:
            found = _first_integer(tiff, entry)
    return found


def _first_integer(tiff: bytes, entry: int) -> int:
    """Read the first value of the directory entry at ``entry``; 1 if it has none, or if it is no integer."""
    size, count = _INTEGER_SIZES.get(_number(tiff, entry + 2, 2), 0), _number(tiff, entry + 4, 4)
    if size * count == 0:
        return 1
    # Up to four bytes lie in the entry itself; of more it holds the place.
    return _number(tiff, entry + 8 if size * count <= 4 else _number(tiff, entry + 8, 4), size)


def _number(tiff: bytes, position: int, size: int) -> int:
    """Read an integer of ``size`` bytes in the byte order of the file."""
    return int.from_bytes(tiff[position : position + size], "little" if tiff[:2] == b"II" else "big")
