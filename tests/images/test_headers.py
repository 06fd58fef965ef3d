"""What is read from raw bytes: formats, JPEG scans, WebP sizes, EXIF orientation."""

import io
import re
import struct

import pytest
from PIL import Image

from gpt_serve.errors import ImageTooLarge, UndecodableImage, UnsupportedImage
from gpt_serve.images.headers import check_jpeg, check_png, identify, orientation, pixels, webp_size
from tests.hostile_images import encode, jpeg_scan_bomb, photo


@pytest.mark.parametrize(("kind", "name"), [("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "WebP")])
def test_identify(kind, name):
    assert identify(encode(kind)) == name


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a", b"RIFF\0\0\0\0WEB", b"RIFF\0\0\0\0WAVE", b"GIF89a"]
)
def test_identify_refuses_other_bytes(data):
    with pytest.raises(UnsupportedImage, match="JPEG, PNG or WebP"):
        identify(data)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"comment": b"\xff\xda" * 200}]
)
def test_check_jpeg_accepts_what_encoders_write(options):
    check_jpeg(encode("JPEG", photo(256, 256), **options))


def test_check_jpeg_limits_scans_exactly():
    first = jpeg_scan_bomb(0).count(b"\xff\xda")
    check_jpeg(jpeg_scan_bomb(50 - first))
    with pytest.raises(UndecodableImage, match="too many scans"):
        check_jpeg(jpeg_scan_bomb(51 - first))


def test_check_jpeg_counts_scans_behind_a_marker_without_length():
    bomb = jpeg_scan_bomb(200)
    hidden = bomb.replace(b"\xff\xda", b"\xff\x01\xff\xda")
    with pytest.raises(UndecodableImage, match="too many scans"):
        check_jpeg(hidden)


def test_check_jpeg_ignores_what_follows_the_image():
    check_jpeg(encode("JPEG") + b"\xff\xda\0\x02" * 10_000)


def test_check_jpeg_allows_some_stray_bytes():
    data = encode("JPEG")
    check_jpeg(data[:2] + bytes(1000) + data[2:])
    with pytest.raises(UndecodableImage, match="too many"):
        check_jpeg(data[:2] + bytes(100_000) + data[2:])


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0"}])
@pytest.mark.parametrize("size", [(1, 1), (64, 48), (300, 16383)])
def test_webp_size(options, size):
    assert webp_size(encode("WEBP", Image.new("RGB", size), **options)) == size


@pytest.mark.parametrize("kept", [12, 16, 24, 29])
def test_webp_size_of_too_short_a_file(kept):
    with pytest.raises(UndecodableImage, match="damaged header"):
        webp_size(encode("WEBP")[:kept])


def directory(order: str, *entries: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF header and a directory of (tag, type, count, four bytes); what is added to one entry lies at byte 26."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    packed = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return head + struct.pack(order + "IH", 8, len(entries)) + packed + bytes(4)


def tiff(order: str, tag: int = 0x0112, value: int = 6, count: int = 1) -> bytes:
    """A TIFF header with one entry of type SHORT."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IH", 8, count) + struct.pack(order + "HHIHH", tag, 3, 1, value, 0) + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0", b"Exif\0\0Exif\0\0"])
def test_orientation_in_both_byte_orders(order, prefix):
    assert orientation(prefix + tiff(order)) == 6


# Type of TIFF 6.0 to its format in `struct`.
INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 7: "B", 8: "h", 9: "l", 13: "L", 16: "Q"}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", INTEGERS)
def test_orientation_is_the_number_whatever_integer_it_is_stored_as(kind, count, order):
    values = struct.pack(f"{order}{count}{INTEGERS[kind]}", *range(6, 6 + count))
    place = values.ljust(4, b"\0") if len(values) <= 4 else struct.pack(order + "I", 26)
    assert orientation(directory(order, (0x0112, kind, count, place)) + values) == 6


@pytest.mark.parametrize(("kind", "count"), [(2, 1), (5, 1), (11, 1), (12, 1), (99, 1), (3, 0)])
def test_orientation_that_is_no_integer_is_1(kind, count):
    assert orientation(directory("<", (0x0112, kind, count, b"\6\0\0\0")) + bytes(8)) == 1


def test_the_last_of_several_orientations_counts():
    assert orientation(directory(">", (0x0112, 3, 1, b"\0\3\0\0"), (0x0112, 3, 1, b"\0\6\0\0"))) == 6


@pytest.mark.parametrize("exif", [None, b"", b"Exif\0\0", b"XX*\0" + bytes(20), b"II", tiff("<", tag=0x010F)])
def test_orientation_defaults_to_1(exif):
    assert orientation(exif) == 1


@pytest.mark.parametrize("kept", range(len(tiff("<"))))
def test_orientation_of_damaged_exif_never_raises(kept):
    assert orientation(tiff("<")[:kept]) in (0, 1, 6)


def test_orientation_ignores_a_false_entry_count():
    assert orientation(tiff("<", tag=0x010F, count=65_535)) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_what_pillow_finds(kind):
    data = encode(kind, photo(300, 200))
    with Image.open(io.BytesIO(data)) as image:
        assert pixels(data) == image.width * image.height > 1
    assert pixels(data[:10]) == pixels(b"") == 0


def test_a_large_jpeg_may_have_fewer_scans():
    """Each of 49 scans of 50 million pixels takes 25 ms."""
    small = jpeg_scan_bomb(30)
    frame = re.search(rb"\xff[\xc0-\xc2]..\x08", small, re.S).end()
    large = small[:frame] + struct.pack(">HH", 7000, 7000) + small[frame + 4 :]
    check_jpeg(small)
    with pytest.raises(UndecodableImage, match="too many scans"):
        check_jpeg(large)


def test_png_chunks_and_sides_have_limits():
    def png(width: int, chunks: int) -> bytes:
        head = struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, 1, 8, 0, 0, 0, 0) + bytes(4)
        return b"\x89PNG\r\n\x1a\n" + head + (struct.pack(">I4s", 0, b"tEXt") + bytes(4)) * chunks

    check_png(png(65_535, 10_000))
    check_png(b"\x89PNG\r\n\x1a\n" + b"\xff" * 100)  # for Pillow to refuse
    with pytest.raises(UndecodableImage, match="too many chunks"):
        check_png(png(1, 600_000))
    with pytest.raises(ImageTooLarge, match="a side of more than 65535"):
        check_png(png(50_000_000, 1))
