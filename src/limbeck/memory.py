"""How much memory a call takes beyond what is there before it: the kernel's own high-water mark, on Linux with glibc.

It sees torch, numpy and the libraries beneath alike, which neither tracemalloc nor torch's profiler does, and counts
pages that were touched, with what the allocator could not reuse. What earlier calls freed is first given back, else
the call would hide in it; a first call also pays for threads and buffers that stay, so measure a later one.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # proc(5), clear_refs


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes of resident memory at the highest point of the call, minus those before it.

    Raises ValueError on a system that does not tell.
    """
    reset = _PROCESS / "clear_refs"
    if not reset.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        raise ValueError("expected Linux with glibc, to measure peaks of memory")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text(_RESET_PEAK)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = (line.split() for line in (_PROCESS / "status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words and words[0] == f"{name}:")
