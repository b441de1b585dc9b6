import itertools
import math

import jaxtyping
import pytest
import torch

from limbeck.losses import baselines, divergence

FEATURES = (baselines.rkd_distance, baselines.rkd_angle)
every_relation = pytest.mark.parametrize("loss", FEATURES)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def test_rkd_distance_is_the_double_loop_of_the_paper():
    student, teacher = draw(5, 3), 4 * draw(5, 2, seed=1)
    pairs = list(itertools.permutations(range(5), 2))
    found = []
    for features in (student, teacher):
        distances = [math.dist(features[i].tolist(), features[j].tolist()) for i, j in pairs]
        found.append([d / (sum(distances) / len(pairs)) for d in distances])
    expected = sum(huber(s - t) for s, t in zip(*found, strict=True)) / len(pairs)
    assert baselines.rkd_distance(student, teacher).item() == pytest.approx(expected, abs=1e-10)


def test_rkd_angle_is_the_triple_loop_of_the_paper():
    student, teacher = draw(5, 3), draw(5, 2, seed=1)

    def cosine(features, i, j, k):
        a, b = features[i] - features[j], features[k] - features[j]
        return (a @ b / (a.norm() * b.norm())).item()

    triples = list(itertools.permutations(range(5), 3))
    expected = sum(huber(cosine(student, *t) - cosine(teacher, *t)) for t in triples) / len(triples)
    assert baselines.rkd_angle(student, teacher).item() == pytest.approx(expected, abs=1e-10)


@every_relation
def test_relations_are_blind_to_rotation_shift_and_scale(loss):
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    rotation, _ = torch.linalg.qr(draw(4, 4, seed=2))
    moved = 3 * student @ rotation + draw(4, seed=3)
    torch.testing.assert_close(loss(moved, teacher), loss(student, teacher), atol=1e-9, rtol=1e-9)
    assert loss(moved, student).item() == pytest.approx(0, abs=1e-12)
    assert loss(student, teacher) > 1e-3


def test_pkd_compares_directions_only():
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    rows = zip(student.reshape(-1, 4), teacher.reshape(-1, 4), strict=True)
    expected = sum((2 - 2 * s @ t / (s.norm() * t.norm())).item() for s, t in rows) / 6
    assert baselines.pkd(student, teacher).item() == pytest.approx(expected, abs=1e-10)
    assert baselines.pkd(5 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert baselines.pkd(-teacher, teacher).item() == pytest.approx(4, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_with_the_teachers_own_weights_is_kl(temperature):
    """KL(teacher || student) = target + (1 - p_label) rest, sample by sample (the identity that DKD starts from)."""
    student, teacher = 2 * draw(6, 5), 2 * draw(6, 5, seed=1)
    for row in range(6):
        s, t, label = student[row : row + 1], teacher[row : row + 1], torch.tensor([row % 5])
        weight = 1 - (t / temperature).softmax(-1)[0, label].item()
        found = baselines.dkd(s, t, label, target_coef=1.0, rest_coef=weight, temperature=temperature)
        torch.testing.assert_close(found, divergence.forward_kl(s, t, temperature=temperature), atol=1e-10, rtol=0)


def test_each_part_of_dkd_sees_its_own_half():
    teacher, labels = draw(4, 5), torch.tensor([0, 1, 2, 3])
    louder = teacher.clone()
    louder[range(4), labels] += 1.0  # the label against the rest changes, the rest among itself does not
    assert baselines.dkd(louder, teacher, labels, target_coef=0.0, rest_coef=1.0).item() == pytest.approx(0, abs=1e-12)
    assert baselines.dkd(louder, teacher, labels, target_coef=1.0, rest_coef=0.0) > 1e-2


CASES = {
    "rkd_distance": (baselines.rkd_distance, (5, 3)),
    "rkd_angle": (baselines.rkd_angle, (5, 3)),
    "pkd": (baselines.pkd, (2, 3, 4)),
    "dkd": (
        lambda s, t: baselines.dkd(s, t, torch.tensor([0, 1, 2]), target_coef=1.0, rest_coef=8.0, temperature=4.0),
        (3, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences_and_the_teacher_has_none(name):
    loss, shape = CASES[name]
    student, teacher = draw(*shape).requires_grad_(), draw(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher.detach()), student)
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", CASES)
def test_low_precision_is_computed_in_float32(name):
    loss, shape = CASES[name]
    student, teacher = draw(*shape).bfloat16(), draw(*shape, seed=1).bfloat16()
    assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))


def test_wrong_inputs_are_errors_that_show_what_was_received(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would catch shapes first
    with pytest.raises(ValueError, match="1 student and 1 teacher samples, expected equal numbers of at least 2"):
        baselines.rkd_distance(draw(1, 3), draw(1, 3))
    with pytest.raises(ValueError, match="2 student and 2 teacher samples, expected equal numbers of at least 3"):
        baselines.rkd_angle(draw(2, 3), draw(2, 3))
    with pytest.raises(ValueError, match="3 student and 4 teacher"):
        baselines.rkd_distance(draw(3, 3), draw(4, 3))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        baselines.pkd(draw(2, 3, 4), draw(2, 3, 5))
    weights = {"target_coef": 1.0, "rest_coef": 1.0}
    for logits, labels, extra, message in (
        (draw(2, 2), [0, 1], {}, "at least three classes"),
        (draw(2, 3), [0, 3], {}, "labels from 0 to 3, expected 0 to 2"),
        (draw(2, 3), [0, 1], {"temperature": -1.0}, "temperature -1.0"),
        (draw(2, 3) * torch.nan, [0, 1], {}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            baselines.dkd(logits, logits, torch.tensor(labels), **weights, **extra)
