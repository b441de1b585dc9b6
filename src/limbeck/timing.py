"""Seconds of several ways to do the same thing, measured in turn in one process, so that only their ratio is read."""

import time
from collections.abc import Callable, Mapping


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
