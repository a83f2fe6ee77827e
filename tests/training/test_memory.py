"""Freed memory stays with a training process, and only while it trains."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from odtk.training import memory

PROBE = """
import ctypes, platform, resource
from odtk.training.memory import freed_memory_kept
library, size = ctypes.CDLL(None), 64 << 20
library.malloc.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(library.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
outside = faults()
with freed_memory_kept():
    faults()
    inside = faults()
print(platform.libc_ver()[0], outside, inside, faults())
"""


def test_pages_are_kept_while_training_and_returned_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    library, outside, inside, after = done.stdout.split()
    if library != "glibc":
        pytest.skip("only glibc has mallopt")
    assert int(inside) < int(outside) / 5 and int(after) > 5 * int(inside)


def test_settings_of_the_user_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def mallopt(parameter: int, value: int) -> int:
        calls.append((parameter, value))
        return 1

    library = SimpleNamespace(mallopt=mallopt, malloc_trim=lambda size: None)
    monkeypatch.setattr(memory, "c_library", lambda: library)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    with memory.freed_memory_kept():
        assert calls == []
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    with memory.freed_memory_kept():
        assert calls == [(memory.M_TRIM_THRESHOLD, 2**31 - 1), (memory.M_MMAP_THRESHOLD, memory.KEEP_BELOW)]
    assert len(calls) == 4


def test_without_mallopt_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (None, SimpleNamespace()):
        monkeypatch.setattr(memory, "c_library", lambda library=library: library)
        with memory.freed_memory_kept():
            pass
