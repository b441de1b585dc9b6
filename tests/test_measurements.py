import time

import numpy as np
import pandas as pd
import pytest
import torch

from limbeck import measurements, paths

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


def test_rows_are_read_as_they_were_measured_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    frame = pd.DataFrame([{"arm": "a", "round": 0, "bench/ratio": 1 / 3}, {"arm": "b", "round": 1, "bench/gain": 0.1}])
    measurements.write("toy", "table_cost", lambda profile: frame.assign(profile=profile))
    found = measurements.read("toy", "table_cost", "bench")
    pd.testing.assert_frame_equal(found[[*frame, "profile"]], frame.assign(profile="bench"), check_exact=True)


def test_a_profile_that_was_not_measured_is_refused_with_those_that_were_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    measurements.write("toy", "table_cost", lambda _: pd.DataFrame([{"arm": "a"}]))
    with pytest.raises(ValueError, match=r"with rows \(bench\), got 'benhc'; `make bench` measures bench"):
        measurements.read("toy", "table_cost", "benhc")
