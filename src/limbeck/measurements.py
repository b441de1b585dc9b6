"""Seconds and bytes that calls take, and the files of what `make bench` measured.

Seconds are of several ways to do the same thing, in turn in one process, so that only their ratio is read. Bytes are
the kernel's own high-water mark, on Linux with glibc. It sees torch, numpy and the libraries beneath alike, which
neither tracemalloc nor torch's profiler does, and counts pages that were touched, with what the allocator could not
reuse. What earlier calls freed is first given back, else the call would hide in it; a first call also pays for threads
and buffers that stay, so measure a later one.
"""

import ctypes
import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from limbeck import paths, records

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # proc(5), clear_refs


def alternate(calls: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds, after a round that is not counted.

    A round makes every call once, in order: what slows the machine slows all of them. Raises ValueError if rounds < 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if index:
                seconds[name].append(time.perf_counter() - started)
    return seconds


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


def write(paper: str, exhibit: str, measure: Callable[[str], pd.DataFrame], profile: str = "bench") -> None:
    """Write the rows of `measure(profile)` to results/<profile>/<paper>/<exhibit>.jsonl, to the last bit."""
    rows = [row.dropna().to_dict() for _, row in measure(profile).astype(object).iterrows()]
    records.replace_text(records.path(paper, exhibit, profile), "".join(json.dumps(row) + "\n" for row in rows))


def read(paper: str, exhibit: str, profile: str) -> pd.DataFrame:
    """The rows that `write` left. Raises ValueError, with the command that makes them, where there are none."""
    file = records.path(paper, exhibit, profile)
    if not file.is_file():
        measured = ", ".join(sorted(path.parts[-3] for path in paths.RESULTS.glob(f"*/{paper}/{exhibit}.jsonl")))
        raise ValueError(f"expected a profile with rows ({measured}), got {profile!r}; `make bench` measures bench")
    try:
        rows = [paths.parse_json(line) for line in file.read_bytes().splitlines()]
    except ValueError as error:
        raise ValueError(
            f"{file}: expected a row on each line, got what cannot be read: {error}; measure again"
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: expected rows with names, got {rows!r:.200}; measure again")
    return pd.DataFrame(rows)
