import time

import pytest

from limbeck import timing


def test_calls_are_made_in_turn_and_the_first_round_is_not_counted():
    made = []
    seconds = timing.alternate({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, rounds=2)
    assert made == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_seconds_are_those_the_call_took():
    assert timing.alternate({"sleep": lambda: time.sleep(0.02)}, rounds=1)["sleep"][0] == pytest.approx(0.02, abs=0.015)


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        timing.alternate({}, rounds=0)
