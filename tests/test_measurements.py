import time

import numpy as np
import pytest
import torch

from limbeck import measurements

MEGABYTE = 2**20


def test_calls_are_made_in_turn_and_the_first_round_is_not_counted():
    made = []
    seconds = measurements.alternate({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, rounds=2)
    assert made == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_seconds_are_those_the_call_took():
    assert measurements.alternate({"sleep": lambda: time.sleep(0.02)}, rounds=1)["sleep"][0] == pytest.approx(
        0.02, abs=0.015
    )


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measurements.alternate({}, rounds=0)


@pytest.mark.parametrize("ones", [torch.ones, lambda n: np.ones(n, np.float32)], ids=["torch", "numpy"])
def test_a_peak_is_what_was_held_at_once_also_where_an_earlier_call_freed_as_much(ones):
    """64 MB come from the system and go back to it at once; 16 MB may stay with the allocator that freed them."""
    peak = measurements.peak_extra(lambda: [ones(16 * MEGABYTE).sum() for _ in range(2)])
    assert 63 * MEGABYTE < peak < 70 * MEGABYTE
    for _ in range(3):
        assert measurements.peak_extra(lambda: ones(4 * MEGABYTE).sum()) > 15 * MEGABYTE
