"""The terms of an arm: each at its own temperature and options, against twins in plain floats."""

import dataclasses
import math

import jaxtyping
import numpy as np
import pytest
import torch

from limbeck import params
from limbeck.evaluation.classifier import Outputs
from limbeck.experiments.sinkd import arms, permutation
from reference import divergence, transport

BATCH, CLASSES = 7, 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


@pytest.fixture
def section():
    """Options of which no two are equal, so that none can stand for another."""
    committed = params.load("sinkd", "fig_permutation", "smoke", permutation.Params)
    options = {"kl_temperature": 3.0, "temperature": 2.0, "epsilon": 0.3, "iterations": 7, "group": 7}
    return dataclasses.replace(committed.setup.terms, **options, dkd_target=0.7, dkd_rest=5.0, rkd_angle=2.5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(seed=0, layers=None, width=5):
    return Outputs(draw(BATCH, CLASSES, seed=seed), layers and draw(layers, BATCH, width, seed=seed + 10))


STUDENT, TEACHER = outputs(0), outputs(1)


def value(name, section, student=STUDENT, teacher=TEACHER):
    return arms.term(name, section)(student, teacher, LABELS).item()


def probs(temperature):
    """Student and teacher, a list of rows each."""
    sides = (side.logits.tolist() for side in (STUDENT, TEACHER))
    return [[divergence.softmax(row, temperature) for row in rows] for rows in sides]


def mean(twin, temperature):
    return sum(map(twin, *probs(temperature))) / BATCH


def decoupled(student, teacher, label):
    """DKD of one row: KL of (label, not label), and of the other classes among themselves."""
    binary = [(p[label], 1 - p[label]) for p in (teacher, student)]
    rest = [[p[k] / (1 - p[label]) for k in range(CLASSES) if k != label] for p in (teacher, student)]
    return 0.7 * divergence.kl(*binary) + 5.0 * divergence.kl(*rest)


def inside(student, teacher, *, values):
    """Transport between the classes of one row, from the teacher's to the student's."""
    student, teacher = np.array(student), np.array(teacher)
    cost = np.abs(teacher[:, None] - student) if values else 1 - np.eye(CLASSES)
    return (transport.marginal_plan(cost, teacher, student, 0.3, 7) * cost).sum()


def debiased(student, teacher):
    between, own, other = (transport.distance(*pair, 0.3, 7) for pair in _pairs(student, teacher))
    return between - (own + other) / 2


def _pairs(student, teacher):
    return (student, teacher), (student, student), (teacher, teacher)


TWINS = {
    "kl": lambda: mean(divergence.forward_kl, 3.0),
    "takd": lambda: mean(divergence.forward_kl, 3.0),
    "rkl": lambda: mean(divergence.reverse_kl, 2.0),
    "js": lambda: mean(divergence.jensen_shannon, 2.0),
    "tvd": lambda: mean(divergence.total_variation, 2.0),
    "l1": lambda: 2 * mean(divergence.total_variation, 1.0),
    "value": lambda: mean(lambda s, t: inside(s, t, values=True), 2.0),
    "zero_one": lambda: mean(lambda s, t: inside(s, t, values=False), 2.0),
    "sinkhorn": lambda: transport.distance(*probs(2.0), 0.3, 7),
    "debiased": lambda: debiased(*probs(2.0)),
    "dkd": lambda: sum(map(decoupled, *probs(2.0), LABELS.tolist())) / BATCH,
}


def test_every_term_of_logits_has_a_twin():
    assert set(TWINS) == set(arms.NAMES) - set(arms.OF_STATES)


@pytest.mark.parametrize("name", TWINS)
def test_a_term_is_its_twin_at_the_terms_own_temperature(name, section):
    assert value(name, section) == pytest.approx(TWINS[name](), rel=1e-6)


def test_sinkhorn_counts_distances_by_the_norm_of_the_section(section):
    expected = transport.distance(*probs(2.0), 0.3, 7, p=2)
    assert value("sinkhorn", dataclasses.replace(section, p=2)) == pytest.approx(expected, rel=1e-6)


def test_groups_of_one_sum_the_l1_norms_of_the_samples(section):
    """The plan of one sample is 1; total variation is half the norm, and a mean over the batch."""
    for epsilon in (0.01, 10.0):
        alone = dataclasses.replace(section, group=1, epsilon=epsilon)
        assert value("sinkhorn", alone) == pytest.approx(2 * BATCH * mean(divergence.total_variation, 2.0), rel=1e-6)


@pytest.mark.parametrize("name", arms.BATCH_WISE)
@pytest.mark.parametrize("group", [3, 4])
def test_groups_are_problems_of_their_own_and_the_last_may_be_short(name, group, section):
    student, teacher = probs(2.0)
    twin = transport.distance if name == "sinkhorn" else debiased
    options = (0.3, 7) if name == "sinkhorn" else ()
    starts = range(0, BATCH, group)
    expected = sum(twin(student[i : i + group], teacher[i : i + group], *options) for i in starts)
    assert value(name, dataclasses.replace(section, group=group)) == pytest.approx(expected, rel=1e-6)


def test_a_group_larger_than_the_batch_is_the_batch(section):
    assert value("sinkhorn", dataclasses.replace(section, group=32)) == value("sinkhorn", section)


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "shown"), [(3, 6, [1, 3]), (2, 6, [2]), (6, 12, [1, 3, 5, 7, 9])]
)
def test_pkd_pairs_all_layers_but_the_last_with_evenly_spaced_layers_of_the_teacher(
    student_layers, teacher_layers, shown, section
):
    teacher = outputs(0, teacher_layers)
    same = Outputs(STUDENT.logits, 3 * torch.cat([teacher.states[shown], draw(1, BATCH, 5, seed=3)]))
    assert len(same.states) == student_layers
    assert value("pkd", section, same, teacher) == pytest.approx(0, abs=1e-12)
    for layer in range(teacher_layers):
        states = teacher.states.clone()
        states[layer] *= -1
        found = value("pkd", section, same, Outputs(teacher.logits, states))
        # A turned state is 2 away from where it was; the paired layers are averaged.
        assert found == pytest.approx(4 / len(shown) if layer in shown else 0, abs=1e-12)


def test_rkd_reads_the_last_layers_alone_and_adds_the_weighted_angles(section):
    student, teacher = outputs(0, 2), outputs(1, 4, width=6)

    def at(weight, student=student, teacher=teacher):
        return value("rkd", dataclasses.replace(section, rkd_angle=weight), student, teacher)

    def last(side):
        return Outputs(side.logits, torch.cat([torch.full_like(side.states[:-1], torch.nan), side.states[-1:]]))

    assert at(2.5, last(student), last(teacher)) == at(2.5)
    assert at(3.0) - at(2.0) == pytest.approx(at(2.0) - at(1.0), rel=1e-9)
    # Stretched along one axis: angles and relative distances change; turned and grown: neither does.
    turn, _ = torch.linalg.qr(draw(6, 6))
    assert at(2.5, Outputs(student.logits, 3 * teacher.states @ turn)) == pytest.approx(0, abs=1e-9)
    right = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    even = torch.eye(3, dtype=torch.float64)
    triangles = [Outputs(STUDENT.logits[:3], x[None]) for x in (right, even)]
    # Even: three cosines 1/2, all distances 1 (units of the mean). Right: 0, sqrt(1/2) twice; 1, 1, sqrt(2).
    short, long = 3 / (2 + math.sqrt(2)), 3 * math.sqrt(2) / (2 + math.sqrt(2))
    distances = (2 * (short - 1) ** 2 + (long - 1) ** 2) / 2 / 3
    angles = (0.5**2 + 2 * (math.sqrt(0.5) - 0.5) ** 2) / 2 / 3
    assert at(2.5, *triangles) == pytest.approx(distances + 2.5 * angles, rel=1e-6)


@pytest.mark.parametrize("name", TWINS)
def test_a_teacher_with_another_number_of_classes_is_refused(section, name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would catch them first
    student, teacher = Outputs(torch.zeros(2, 3)), Outputs(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        arms.term(name, section)(student, teacher, LABELS[:2])


def test_an_arm_is_spelled_as_a_sum():
    assert arms.added("ce") == ()
    assert arms.added("ce+kl+kl") == ("kl", "kl")
    assert arms.added("sinkhorn") == ("sinkhorn",)
    with pytest.raises(ValueError, match=r"ce or one of kl, .*sinkhorn.*joined by \+; got 'wasserstein' in 'ce\+wass"):
        arms.added("ce+wasserstein")


def test_cross_entropy_is_the_mean_negative_log_probability_of_the_label():
    rows = [divergence.softmax(row) for row in STUDENT.logits.tolist()]
    expected = -sum(math.log(row[label]) for row, label in zip(rows, LABELS.tolist(), strict=True)) / BATCH
    assert arms.cross_entropy(STUDENT.logits, LABELS).item() == pytest.approx(expected, rel=1e-10)
