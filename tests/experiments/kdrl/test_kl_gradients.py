import dataclasses
import math

import pytest
import torch

import cells
from limbeck import params
from limbeck.experiments.kdrl import kl_gradients as figure

LOGITS = [[1.0, 0.0, -1.0], [0.0, 0.5, 0.5], [0.5, 0.5, -1.5]]
STUDENT, TEACHER, OLDER = torch.tensor(LOGITS, dtype=torch.float64)


@pytest.fixture(scope="module")
def section():
    return params.load("kdrl", "fig_kl_gradients", "smoke", figure.Params)


def softmax(logits):
    weights = [math.exp(x) for x in logits.tolist()]
    return [w / sum(weights) for w in weights]


def by_hand(arm, sampler):
    """The expected gradient in plain Python: each outcome's coefficient of the score, differentiated on paper."""
    kind, place = arm.split("_")
    q, p, mu = softmax(STUDENT), softmax(TEACHER), softmax(sampler)
    total = [0.0, 0.0, 0.0]
    for y in range(3):
        log_ratio, rho = math.log(p[y] / q[y]), q[y] / mu[y]
        value = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": p[y] / q[y] - 1 - log_ratio}[kind]
        slope = {"k1": 1.0, "k2": -log_ratio, "k3": 1 - p[y] / q[y]}[kind]  # of the value, by log q
        coefficient = {"loss": slope, "held": rho * slope, "free": rho * (value + slope), "reward": rho * value}[place]
        for v in range(3):
            total[v] += mu[y] * coefficient * ((v == y) - q[v])
    return total


def lengths(arm, sampler):
    q, p = softmax(STUDENT), softmax(TEACHER)
    kl = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    reverse = [a * (math.log(a / b) - kl) for a, b in zip(q, p, strict=True)]
    forward = [a - b for a, b in zip(q, p, strict=True)]
    expected, size = by_hand(arm, sampler), math.hypot(*reverse)
    off = [[x - y for x, y in zip(expected, aim, strict=True)] for aim in ([0, 0, 0], reverse, forward)]
    return [math.hypot(*x) / size for x in off]


@pytest.mark.parametrize("arm", figure.ARMS)
@pytest.mark.parametrize("sampler", [STUDENT, OLDER], ids=["on-policy", "off-policy"])
def test_every_arm_has_the_gradient_that_paper_and_pencil_give_it(arm, sampler):
    measured = figure.compared(arm, STUDENT, TEACHER, sampler)
    names = ("gradient/size", "gradient/to_reverse", "gradient/to_forward")
    assert [measured[name] for name in names] == pytest.approx(lengths(arm, sampler), abs=1e-12)


def test_the_spread_is_that_of_many_samples():
    """Root mean square of the distance from the mean, over 100,000 samples; four standard errors are under 2 %."""
    spread = figure.compared("k2_loss", STUDENT, TEACHER, STUDENT)["gradient/spread"]
    source = torch.Generator().manual_seed(0)
    rows = torch.multinomial(STUDENT.softmax(0), 100_000, replacement=True, generator=source)
    scores = torch.nn.functional.one_hot(rows, 3) - STUDENT.softmax(0)
    each = (STUDENT.log_softmax(0) - TEACHER.log_softmax(0))[rows][:, None] * scores
    size = math.hypot(*by_hand("k2_loss", STUDENT))
    assert spread == pytest.approx(each.var(0).sum().sqrt().item() / size, rel=0.02)


def test_draws_differ_and_a_gap_only_moves_the_teacher(section, tmp_path):
    errors = {}
    for cell in figure.cells(section, ()):
        if cell.coordinates["arm"] == "k3_loss":
            result = cells.drive(figure, section, cell, cells.place(tmp_path, "run"))
            errors[cell.coordinates["sampling"], cell.coordinates["gap"]] = result.metrics["gradient/to_reverse"]
    assert all(len(set(values)) == section.draws for values in errors.values())
    assert set(errors) == {(sampling, gap) for sampling in figure.SAMPLINGS for gap in section.gaps}
    near, far = (figure._drawn(section, gap, 0) for gap in (0.1, 1.0))
    assert torch.equal(near[0], far[0])
    assert torch.equal(near[2], far[2])
    torch.testing.assert_close((near[1] - near[0]) * 10, far[1] - far[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("k2_loss", "k4_loss")}, "arm must be one of k1_loss, .* got 'k4_loss'"),
        ({"gaps": (0.1, 0.0)}, "gap must be above 0, got 0.0"),
        ({"draws": 0}, "draws must be above 0, got 0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(section, **change)
