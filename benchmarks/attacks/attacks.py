"""The attacks. Each is a function of a port and an event: one round of it, to be repeated until the event is set.

Everything is bounded: at most `MOST_CONNECTIONS` connections, bodies of at most 10 MB, and only ever to 127.0.0.1.
"""

import base64
import functools
import http.client
import io
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from contextlib import ExitStack

from PIL import Image

MOST_CONNECTIONS = 1020
BODY = 10_000_000

Attack = Callable[[int, threading.Event], None]

HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: %s\r\n"


def connect(port: int) -> socket.socket:
    """A connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def crumbs_after_an_answer(port: int, stop: threading.Event) -> None:
    """A body of one-byte chunks that goes on after its request was refused."""
    with connect(port) as sock:
        sock.sendall(HEAD % b"text/plain" + b"transfer-encoding: chunked\r\n\r\n")
        while not stop.is_set():
            sock.sendall(b"1\r\nx\r\n" * 1000)


def crumbs(port: int, stop: threading.Event) -> None:
    """A body of one-byte chunks that might be read."""
    with connect(port) as sock:
        sock.sendall(HEAD % b"application/json" + b"transfer-encoding: chunked\r\n\r\n")
        while not stop.is_set():
            sock.sendall(b"1\r\n \r\n" * 1000)


def post(port: int, kind: str, body: bytes, path: str = "/predict") -> None:
    """One request, with its answer read and thrown away."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": kind})
    connection.getresponse().read()
    connection.close()


def brackets(port: int, stop: threading.Event) -> None:
    """Ten megabytes of JSON that nobody means."""
    post(port, "application/json", b"[" + b'{"":{"":0}},' * (BODY // 12) + b"0]")


def parts(port: int, stop: threading.Event) -> None:
    """Ten megabytes of the parts of a form."""
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
    post(port, "multipart/form-data; boundary=b", part * (BODY // len(part)) + b"--b--\r\n")


def base64_images(port: int, stop: threading.Event) -> None:
    """Ten megabytes of base64 that is no image."""
    post(port, "application/json", b'{"task":"noisy-0","image":"' + base64.b64encode(bytes(7_200_000)) + b'"}')


def slow_bodies(port: int, stop: threading.Event) -> None:
    """As many requests as there are slots, each with one byte of its body."""
    hold(port, stop, 128, HEAD % b"application/json" + b"content-length: 100\r\n\r\n{")


def silent(port: int, stop: threading.Event) -> None:
    """Connections that say nothing, until the descriptors are gone."""
    hold(port, stop, MOST_CONNECTIONS, b"")


def hold(port: int, stop: threading.Event, count: int, data: bytes) -> None:
    """Hold ``count`` connections that have sent ``data``, opening anew what the server closes."""
    with ExitStack() as stack:
        held = [stack.enter_context(connect(port)) for _ in range(count)]
        for sock in held:
            sock.sendall(data)
        stop.wait(5)


def webp_7071(port: int, stop: threading.Event) -> None:
    """Two kilobytes that are 50 million pixels."""
    post(port, "image/webp", WEBP, "/predict/noisy-0")


def png_row(port: int, stop: threading.Event) -> None:
    """A hundred kilobytes that are one row of 50 million pixels."""
    post(port, "image/png", PNG_ROW, "/predict/noisy-0")


def png_chunks(port: int, stop: threading.Event) -> None:
    """A PNG of 600,000 chunks."""
    post(port, "image/png", PNG_CHUNKS, "/predict/noisy-0")


def jpeg_scans(port: int, stop: threading.Event) -> None:
    """A JPEG of 5 million pixels with 49 scans, each of which makes the decoder walk the whole image."""
    post(port, "image/jpeg", _scans(2236, 49), "/predict/noisy-0")


def jpeg_scans_50(port: int, stop: threading.Event) -> None:
    """A JPEG of 50 million pixels with as many scans as are taken for that size."""
    post(port, "image/jpeg", _scans(7071, 12), "/predict/noisy-0")


def metrics(port: int, stop: threading.Event) -> None:
    """Scrapes of the metrics of thousands of tasks, which were asked once each; see `ask_each`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    connection.getresponse().read()
    connection.close()


def ask_each(port: int, tasks: int) -> None:
    """Have the metrics hold as many series as there may be."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for number in range(tasks):
        connection.request("POST", f"/predict/many-{number}", SMALL, {"Content-Type": "image/jpeg"})
        connection.getresponse().read()
    connection.close()


def two_floods(port: int, stop: threading.Event) -> None:
    """Ordinary images for two tasks, from more clients than there are slots."""
    task = f"noisy-{threading.get_ident() % 2}"
    post(port, "image/jpeg", SMALL, f"/predict/{task}")


def dear(port: int, stop: threading.Event) -> None:
    """Images for an adapter with 2,048 prompts."""
    post(port, "image/jpeg", SMALL, "/predict/dear")


def leaving(port: int, stop: threading.Event) -> None:
    """Requests for that adapter whose clients do not wait for the answer."""
    head = b"POST /predict/dear HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(SMALL)
    with connect(port) as sock:
        sock.sendall(head + SMALL)
        stop.wait(0.05)


def _image(kind: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind)
    return file.getvalue()


def _png(width: int, height: int, empty_chunks: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes((width + 1) * height)))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"tEXt", b"a\0") * empty_chunks + rows + chunk(b"IEND", b"")


@functools.cache
def _scans(side: int, scans: int) -> bytes:
    """A grey progressive JPEG whose last scan is repeated."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


SMALL = _image("JPEG", 256, 256)
WEBP = _image("WEBP", 7071, 7071)
PNG_ROW = _png(50_000_000, 1, 0)
PNG_CHUNKS = _png(8, 8, 600_000)

ATTACKS: dict[str, tuple[Attack, int]] = {
    "silent": (silent, 1),
    "slow-bodies": (slow_bodies, 1),
    "crumbs": (crumbs, 1),
    "crumbs-after-an-answer": (crumbs_after_an_answer, 1),
    "brackets": (brackets, 12),
    "parts": (parts, 12),
    "base64": (base64_images, 12),
    "webp-7071": (webp_7071, 40),
    "png-row": (png_row, 40),
    "png-chunks": (png_chunks, 12),
    "jpeg-scans": (jpeg_scans, 40),
    "jpeg-scans-50": (jpeg_scans_50, 12),
    "metrics": (metrics, 12),
    "two-floods": (two_floods, 160),
    "dear": (dear, 48),
    "leaving": (leaving, 48),
}
"""Each attack with the number of clients that take part."""
