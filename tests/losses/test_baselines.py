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


def test_many_wide_features_keep_no_differences_and_have_the_same_distance():
    """Above the size from which squares come from cdist; the twin is by inner products in float64."""
    student, teacher = draw(160, 700), draw(160, 700, seed=1)
    student[3] = student[5]  # no distance, and no gradient between the two
    assert 160 * student.numel() > baselines._DIRECT
    low = student.float().requires_grad_()
    found = baselines.rkd_distance(low, teacher.float())
    student.requires_grad_()
    values = []
    for x in (student, teacher):
        norms, (i, j) = x.square().sum(1), (~torch.eye(160, dtype=torch.bool)).nonzero(as_tuple=True)
        squares = norms[i] + norms[j] - 2 * (x @ x.T)[i, j]
        distances = (squares.clamp_min(0) + 1e-12).sqrt()
        values.append(distances / distances.mean())
    expected = torch.nn.functional.huber_loss(*values)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    (gradient,), (wanted,) = torch.autograd.grad(found, low), torch.autograd.grad(expected, student)
    apart = [row for row in range(160) if row not in (3, 5)]
    bound = 2e-6 * wanted[apart].abs().max().item()  # float32 adds up 160 pairs
    torch.testing.assert_close(gradient[apart].double(), wanted[apart], atol=bound, rtol=0)
    assert gradient.isfinite().all()


def test_relations_and_dkd_under_autocast_are_those_without():
    student, teacher = draw(6, 4).float(), draw(6, 4, seed=1).float()
    for loss in FEATURES:
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(student, teacher)
        assert found.item() == loss(student, teacher).item()


def test_dkd_of_a_masked_class_is_dkd_without_it():
    student, teacher, labels = draw(3, 4), draw(3, 4, seed=1), torch.tensor([0, 1, 2])
    blocked = [torch.cat([x, torch.full((3, 1), -torch.inf, dtype=torch.float64)], 1) for x in (student, teacher)]
    blocked[0].requires_grad_()
    found = baselines.dkd(*blocked, labels, target_coef=1.0, rest_coef=8.0)
    expected = baselines.dkd(student, teacher, labels, target_coef=1.0, rest_coef=8.0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.autograd.grad(found, blocked[0])[0].isfinite().all()


def test_lengths_that_overflow_leave_no_direction():
    with pytest.raises(ValueError, match=r"vectors of length inf, expected lengths that torch.float32 holds"):
        baselines.pkd(torch.full((1, 2, 3), 1e30), torch.ones(1, 2, 3))


def test_a_teacher_that_is_sure_has_no_other_classes_to_teach():
    student, labels = draw(2, 3).requires_grad_(), torch.tensor([0, 2])
    teacher = torch.tensor([[0.0, -torch.inf, -torch.inf], [1.0, 0.0, 0.5]], dtype=torch.float64)
    found = baselines.dkd(student, teacher, labels, target_coef=0.0, rest_coef=2.0)
    expected = baselines.dkd(student[1:], teacher[1:], labels[1:], target_coef=0.0, rest_coef=1.0)  # of two rows, one
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.autograd.grad(found, student)[0].isfinite().all()
