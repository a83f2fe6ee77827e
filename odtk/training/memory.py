"""How the process of a training run on a CPU keeps its memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h, see mallopt(3)
USUAL_TRIM, USUAL_MMAP = 64 << 20, 32 << 20  # what glibc's own adjustment would reach after large tensors
KEEP_BELOW = 1 << 30  # bytes: only larger allocations still come from the system, and go back to it
OLD_LIMIT = 32 << 20  # the largest threshold that older glibc takes


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While the block runs, freed memory stays with the process, so that the next step need not ask for it again.

    glibc's malloc returns large blocks to the system at once, and each large tensor of each step then pays for fresh
    pages: a third of a training step (docs/results.md). Afterwards what is free is returned. Nothing is done where the
    C library has no mallopt, or where the user's environment already configures malloc.
    """
    mallopt = None if configured_by_user() else getattr(c_library(), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not mallopt(M_MMAP_THRESHOLD, KEEP_BELOW):
        mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
    try:
        yield
    finally:
        mallopt(M_TRIM_THRESHOLD, USUAL_TRIM)
        mallopt(M_MMAP_THRESHOLD, USUAL_MMAP)
        c_library().malloc_trim(0)  # type: ignore[union-attr]


def configured_by_user() -> bool:
    """Whether the environment has settings for malloc, or another malloc."""
    own = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    return own or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or "malloc" in os.environ.get("LD_PRELOAD", "")


def c_library() -> ctypes.CDLL | None:
    """The C library of this process; None where it cannot be found this way."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: on Windows
        return None
