"""What this process asks of the C library's allocator."""

import ctypes

# mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_MIB = 2**20

REUSED_BYTES = 32 * _MIB
"""The largest block that glibc can be told to reuse; larger ones are mapped and zeroed anew each time."""


def reuse_freed_memory() -> None:
    """Let glibc keep what torch frees for its next activations, in all threads; up to 512 MiB stay with the process.

    By default each large activation is mapped, zeroed by the kernel and unmapped again, which costs more than some of
    the operators. Nothing happens where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in (
        (_MMAP_THRESHOLD, REUSED_BYTES),
        (_TRIM_THRESHOLD, 512 * _MIB),
        (_TOP_PAD, 64 * _MIB),
        (_ARENA_MAX, 1),
    ):
        mallopt(parameter, value)
