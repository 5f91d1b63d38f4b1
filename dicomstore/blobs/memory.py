"""Memory for what is received, provided by the kernel ahead of it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

POPULATE_BYTES = 16 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it


def fresh_buffer(size: int) -> memoryview:
    """Return `size` writable bytes, all zero, that are faster to fill than a new bytearray.

    The page faults of fresh memory cost about as much time as the transfer. So this memory is in
    huge pages, which a thread has the kernel provide ahead of the transfer, where it can.
    """
    if size < POPULATE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(size))
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    threading.Thread(target=_populate, args=(memory,), name="populate", daemon=True).start()
    return memoryview(memory)


def _populate(memory: mmap.mmap) -> None:
    """Have the kernel provide pages, as far as it can; mmap.madvise would keep the GIL."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in range(0, len(memory), POPULATE_BYTES):
        if madvise(start + at, min(POPULATE_BYTES, len(memory) - at), MADV_POPULATE_WRITE):
            return
