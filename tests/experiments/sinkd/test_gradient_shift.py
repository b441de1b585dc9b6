import math

import pytest
import torch

from limbeck import params
from limbeck.experiments.runs import Workspace
from limbeck.experiments.sinkd import gradient_shift as figure


def measure(arm, tmp_path):
    section = params.load("sinkd", "fig_gradient_shift", "default", figure.Params)
    cell = next(cell for cell in figure.cells(section, ()) if cell.coordinates["arm"] == arm)
    steps = figure.run(cell, section, Workspace(tmp_path, tmp_path, [], torch.device("cpu"), "auto"))
    next(steps)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    return stop.value.value


@pytest.mark.parametrize("arm", ["kl", "rkl"])
def test_kl_of_two_equal_gaussians_is_half_the_squared_distance_in_deviations(arm, tmp_path):
    result = measure(arm, tmp_path)
    shift = torch.tensor(result.curve["shift"], dtype=torch.float64)
    kept = shift <= 6  # further out the grid cuts a tail
    for found, exact in (("shift/value", shift.square() / 0.5), ("shift/gradient", shift / 0.25)):
        torch.testing.assert_close(
            torch.tensor(result.metrics[found])[kept].double(), exact[kept], atol=1e-2, rtol=1e-2
        )


def test_js_saturates_at_the_logarithm_of_two(tmp_path):
    result = measure("js", tmp_path)
    assert result.metrics["shift/value"][-1] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(result.metrics["shift/gradient"][-1]) < 1e-4


def test_the_gradient_is_the_slope_of_the_value_for_the_point_by_point_divergences(tmp_path):
    for arm in ("kl", "rkl", "js"):
        result = measure(arm, tmp_path)
        value, gradient, shift = (
            torch.tensor(x, dtype=torch.float64)
            for x in (result.metrics["shift/value"], result.metrics["shift/gradient"], result.curve["shift"])
        )
        slope = (value[2:] - value[:-2]) / (shift[2:] - shift[:-2])
        torch.testing.assert_close(gradient[1:-1], slope, atol=0.08, rtol=0.08)  # central difference over 0.5


def test_sinkhorn_is_near_the_distance_and_so_is_its_slope(tmp_path):
    result = measure("sinkhorn", tmp_path)
    shift = torch.tensor(result.curve["shift"])
    assert result.metrics["shift/value"][16:] == pytest.approx((shift[16:] / 20).tolist(), abs=5e-3)
    assert result.metrics["shift/gradient"][16:] == pytest.approx([0.05] * 17, abs=1e-3)
