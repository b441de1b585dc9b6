import jaxtyping
import pytest
import torch

from limbeck.losses import sinkd, transport

OFF = {"ce_coef": 0.0, "kl_coef": 0.0, "sinkhorn_coef": 0.0}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def batch(rows=6, classes=4):
    return draw(rows, classes), draw(rows, classes, seed=1), torch.arange(rows) % classes


def book(student, teacher, temperature=2.0, epsilon=0.1, iterations=20):
    """<P, D> by loops over atoms, in float64, as the paper's matrix normalisation reads."""
    s, t = ((x / temperature).exp() / (x / temperature).exp().sum(-1, keepdim=True) for x in (student, teacher))
    cost = torch.stack([torch.stack([(a - b).abs().sum() for b in t]) for a in s])
    kernel = (-cost / epsilon).exp()
    for _ in range(iterations):
        kernel = kernel / kernel.sum(1, keepdim=True)
        kernel = kernel / kernel.sum(0, keepdim=True)
    return (kernel * cost).sum()


def test_the_loss_is_the_weighted_sum_of_its_three_terms_written_out():
    student, teacher, labels = batch()
    found = sinkd.sinkd_loss(
        student,
        teacher,
        labels,
        ce_coef=0.3,
        kl_coef=0.7,
        sinkhorn_coef=0.01,
        kl_temperature=3.0,
        sinkhorn_temperature=2.0,
    )
    log_q = (student / 3).log_softmax(-1)
    p = (teacher / 3).softmax(-1)
    ce = -student.log_softmax(-1)[range(6), labels].mean()
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    torch.testing.assert_close(found, 0.3 * ce + 0.7 * kl + 0.01 * book(student, teacher), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("coefficient", OFF)
def test_every_coefficient_is_wired_to_the_gradient(coefficient):
    student, teacher, labels = batch()
    student.requires_grad_()
    loss = sinkd.sinkd_loss(student, teacher, labels, **(OFF | {coefficient: 1.0}))
    [gradient] = torch.autograd.grad(loss, student)
    assert gradient.abs().max() > 1e-3
    nothing = sinkd.sinkd_loss(student, teacher, labels, **OFF)
    assert torch.autograd.grad(nothing, student)[0].abs().max() == 0


def test_each_temperature_reaches_its_own_term_only():
    student, teacher, labels = batch()

    def value(coefficient, **temperatures):
        return sinkd.sinkd_loss(student, teacher, labels, **(OFF | {coefficient: 1.0}), **temperatures).item()

    for coefficient, own, other in (
        ("kl_coef", "kl_temperature", "sinkhorn_temperature"),
        ("sinkhorn_coef", "sinkhorn_temperature", "kl_temperature"),
    ):
        assert value(coefficient, **{own: 1.5}) != value(coefficient, **{own: 4.0})
        assert value(coefficient, **{other: 1.5}) == value(coefficient, **{other: 4.0})


def test_the_gradient_is_that_of_finite_differences():
    _, teacher, labels = batch(4, 3)
    student = draw(4, 3, seed=5).requires_grad_()

    def loss(x):
        return sinkd.sinkd_loss(x, teacher, labels, ce_coef=1.0, kl_coef=0.5, sinkhorn_coef=0.2, iterations=5)

    direction = draw(4, 3, seed=6)
    [gradient] = torch.autograd.grad(loss(student), student)
    step = 1e-5
    numeric = (loss(student + step * direction) - loss(student - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, atol=1e-6, rtol=1e-6)


MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
BATCHES = {
    "position": [[(1, 0)], [(0, 1), (1, 1), (2, 1)], [(0, 2), (1, 2)]],
    "sequence": [[(0, 1), (0, 2)], [(1, 0), (1, 1), (1, 2)], [(2, 1)]],
    "tokens": [[(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 1)]],
    "answer": [[(0, 1), (1, 0), (2, 1)]],
}


@pytest.mark.parametrize("form", sinkd.FORMS)
def test_a_form_is_the_mean_over_the_batches_that_it_names(form):
    student, teacher = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    found = sinkd.sequence_sinkhorn(student, teacher, mask=MASK, form=form)
    parts = []
    for atoms in BATCHES[form]:
        rows, columns = zip(*atoms, strict=True)
        parts.append(book(student[rows, columns], teacher[rows, columns]))
    torch.testing.assert_close(found, torch.stack(parts).mean(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", sinkd.FORMS)
def test_padding_is_inert_whatever_it_holds_and_however_much_there_is(form):
    student, teacher = draw(3, 4, 5).requires_grad_(), draw(3, 4, 5, seed=1)
    plain = sinkd.sequence_sinkhorn(student, teacher, mask=MASK, form=form)
    [gradient] = torch.autograd.grad(plain, student)
    assert gradient[~MASK].abs().max() == 0
    spoilt = teacher.masked_fill(~MASK[..., None], float("nan"))
    longer = [torch.cat([x, torch.full((3, 2, 5), float("inf"), dtype=x.dtype)], 1) for x in (student, spoilt)]
    wider = torch.cat([MASK, torch.zeros(3, 2, dtype=torch.bool)], 1)
    assert torch.equal(sinkd.sequence_sinkhorn(*longer, mask=wider, form=form), plain)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("form", sinkd.FORMS)
def test_targets_of_one_token_and_of_several_both_have_a_gradient(form, tokens):
    """The released code, with its softmax over positions, has none for one token."""
    student, teacher = draw(4, tokens, 6).requires_grad_(), draw(4, tokens, 6, seed=1)
    loss = sinkd.sequence_sinkhorn(student, teacher, mask=torch.ones(4, tokens, dtype=torch.bool), form=form)
    assert torch.autograd.grad(loss, student)[0].abs().max() > 1e-4


def test_the_sequence_form_of_single_tokens_is_the_l1_norm_of_each():
    student, teacher = draw(4, 1, 6), draw(4, 1, 6, seed=1)
    found = sinkd.sequence_sinkhorn(student, teacher, mask=torch.ones(4, 1, dtype=torch.bool), form="sequence")
    probs = ((x[:, 0] / 2).softmax(-1) for x in (student, teacher))
    torch.testing.assert_close(found, transport.sample_l1(*probs), atol=1e-10, rtol=0)


def test_the_annealed_temperature_goes_from_the_first_to_one():
    found = [sinkd.annealed_temperature(4.0, epoch=epoch, epochs=4) for epoch in range(4)]
    assert found == pytest.approx([4.0, 3.0, 2.0, 1.0])
    assert sinkd.annealed_temperature(4.0, epoch=0, epochs=1) == 4.0
    with pytest.raises(ValueError, match="received epoch 4, expected 0 to 3"):
        sinkd.annealed_temperature(4.0, epoch=4, epochs=4)


def test_wrong_inputs_are_errors_that_show_what_was_received(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would catch shapes first
    student, teacher, labels = batch()
    on = {"ce_coef": 1.0, "kl_coef": 1.0, "sinkhorn_coef": 1.0}
    for wrong, message in (
        ({"labels": labels + 1}, "labels from 1 to 4, expected 0 to 3"),
        ({"labels": labels - 1}, "labels from -1 to 2"),
        ({"teacher_logits": teacher[:, :3]}, r"\(6, 4\).*\(6, 3\)"),
        ({"student_logits": student * torch.nan}, "finite"),
        ({"student_logits": torch.full_like(student, torch.inf)}, "finite"),
        ({"epsilon": -0.1}, "epsilon -0.1"),
        ({"sinkhorn_temperature": 0.0}, "temperature 0.0"),
    ):
        given = {"student_logits": student, "teacher_logits": teacher, "labels": labels} | on | wrong
        with pytest.raises(ValueError, match=message):
            sinkd.sinkd_loss(**given)
    logits = draw(2, 3, 4)
    with pytest.raises(ValueError, match="form 'words', expected one of"):
        sinkd.sequence_sinkhorn(logits, logits, mask=torch.ones(2, 3, dtype=torch.bool), form="words")
    with pytest.raises(ValueError, match="no selected row"):
        sinkd.sequence_sinkhorn(logits, logits, mask=torch.zeros(2, 3, dtype=torch.bool), form="tokens")
    with pytest.raises(ValueError, match=r"mask \(2, 4\), expected them to agree"):
        sinkd.sequence_sinkhorn(logits, logits, mask=torch.ones(2, 4, dtype=torch.bool), form="tokens")


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 10.0])
def test_every_epsilon_gives_finite_values_and_gradients(epsilon):
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in batch())
    student.requires_grad_()
    loss = sinkd.sinkd_loss(student, teacher, labels, **(OFF | {"sinkhorn_coef": 1.0}), epsilon=epsilon)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


@pytest.mark.parametrize("debias", [False, True])
def test_groups_of_a_batch_are_problems_of_their_own_and_the_last_may_be_short(debias):
    student, teacher, _ = batch()
    whole = sinkd.batch_sinkhorn(student, teacher, debias=debias)
    assert sinkd.batch_sinkhorn(student, teacher, debias=debias, group=len(student) + 1) == whole
    size = len(student) - 1
    parts = [
        sinkd.batch_sinkhorn(student[rows], teacher[rows], debias=debias) for rows in (slice(size), slice(size, None))
    ]
    assert sinkd.batch_sinkhorn(student, teacher, debias=debias, group=size) == sum(parts) != whole


@pytest.mark.parametrize(
    ("wrong", "message"), [({"group": 0}, "group 0, expected group >= 1"), ({"temperature": 0.0}, "temperature > 0")]
)
def test_a_batch_that_cannot_be_cut_or_softened_is_refused(wrong, message):
    student, teacher, _ = batch()
    with pytest.raises(ValueError, match=message):
        sinkd.batch_sinkhorn(student, teacher, **wrong)


def test_at_equality_only_the_floor_of_the_transport_is_left():
    student, _, labels = batch()
    terms = {name: sinkd.sinkd_loss(student, student, labels, **(OFF | {name: 1.0})).item() for name in OFF}
    assert terms["kl_coef"] == pytest.approx(0, abs=1e-10)
    assert terms["sinkhorn_coef"] > 0.01
