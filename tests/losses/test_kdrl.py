import math

import pytest
import torch

from limbeck.losses import divergence, estimates, kdrl, policy
from losses.test_policy import batch, listed
from reference import policy as reference

KEEP = torch.tensor([True, False, True, False])


def teacher_of(now, seed=7):
    source = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(now.shape, generator=source, dtype=torch.float64).to(now.dtype)


def joint(now, old, advantages, mask, teacher, *, kind="k2", keep=None, denominator="all", kd_coef, **normaliser):
    """The sum of the joint loss's terms."""
    kd = kdrl.kd_per_token(kind, now, old, teacher, mask=mask)
    weights = policy.token_weights(mask, **normaliser)
    shares = kdrl.kd_weights(mask, keep, denominator=denominator, **normaliser)
    options = {"mask": mask, "kd_coef": kd_coef, "weights": weights, "teacher_weights": shares}
    return sum(kdrl.kdrl_loss(now, old, advantages, kd, **options).values())


@pytest.mark.parametrize("options", [{}, {"normalise": "sequence"}, {"normalise": "constant", "longest": 7}])
@pytest.mark.parametrize("denominator", kdrl.DENOMINATORS)
@pytest.mark.parametrize("keep", [None, KEEP, ~KEEP, torch.zeros(4, dtype=torch.bool)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_joint_loss_is_the_sum_over_completions_and_tokens(options, denominator, keep, dtype, tolerance):
    now, old, advantages, mask = batch(dtype=dtype)
    teacher, options = teacher_of(now), options | {"kd_coef": 0.7, "denominator": denominator}
    found = joint(now, old, advantages, mask, teacher, keep=keep, **options)
    kept = None if keep is None else keep.tolist()
    expected = reference.joint_loss(listed(now, old, advantages, mask, teacher, kept), **options)
    assert found.item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_gradient_agrees_with_finite_differences(kind):
    """On-policy: off-policy the ratio of the teacher's term is held, so the loss is not the gradient's potential."""
    now, _, advantages, mask = batch()
    teacher, old = teacher_of(now), now.detach().clone()

    def loss(x):
        kd = estimates.kl_estimate(kind, x, teacher)
        options = {"mask": mask, "kd_coef": 0.7, "teacher_weights": kdrl.kd_weights(mask, KEEP)}
        return sum(kdrl.kdrl_loss(x, old, advantages, kd, **options).values())

    joined = joint(now, old, advantages, mask, teacher, kind=kind, kd_coef=0.7, keep=KEEP)
    found, expected = (torch.autograd.grad(x, now)[0] for x in (joined, loss(now)))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(loss, now)


def test_on_policy_each_token_is_moved_by_its_advantage_and_the_weighted_log_ratio():
    now, _, advantages, mask = batch()
    teacher = teacher_of(now)
    joint(now, now.detach(), advantages, mask, teacher, kd_coef=0.7).backward()
    expected = -(advantages[:, None] + 0.7 * (teacher - now.detach())) * mask / mask.sum()
    torch.testing.assert_close(now.grad, expected, atol=1e-12, rtol=0)


def test_off_policy_the_teachers_term_is_weighed_by_a_ratio_without_gradient():
    now, old, _, mask = batch(spread=1.0)
    teacher = teacher_of(now)
    ratio = (now - old).exp().detach()
    kd = kdrl.kd_per_token("k2", now, old, teacher, mask=mask)
    (gradient,) = torch.autograd.grad(kd.sum(), now)
    torch.testing.assert_close(gradient, ratio * (now - teacher) * mask, atol=1e-12, rtol=0)
    assert (ratio[mask] - 1).abs().min() > 1e-3


def test_a_coefficient_of_0_is_grpo_to_the_bit():
    now, old, advantages, mask = batch(dtype=torch.float32)
    found = []
    for loss in (
        joint(now, old, advantages, mask, teacher_of(now), kd_coef=0.0),
        policy.grpo_loss(now, old, advantages, mask=mask),
    ):
        found.append((loss, torch.autograd.grad(loss, now)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_without_rewards_it_is_distillation_alone_and_groups_of_equal_rewards_still_learn_from_the_teacher():
    now, old, _, mask = batch()
    teacher = teacher_of(now)
    (found,) = torch.autograd.grad(
        joint(now, old, torch.zeros(4, dtype=torch.float64), mask, teacher, kd_coef=0.7), now
    )
    kd = kdrl.kd_per_token("k2", now, old, teacher, mask=mask)
    (expected,) = torch.autograd.grad(0.7 * policy.weighted_sum(kd, policy.token_weights(mask)), now)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert found[mask].all()


def test_a_term_that_nothing_speaks_for_is_missing_and_the_other_is_as_in_the_sum():
    now, old, advantages, mask = batch()
    kd = kdrl.kd_per_token("k2", now, old, teacher_of(now), mask=mask)
    both = kdrl.kdrl_loss(now, old, advantages, kd, mask=mask, kd_coef=0.7)
    assert list(both) == ["policy", "kd"]
    for name, missing in (
        ("policy", (advantages, None, 0.7)),
        ("policy", (advantages, kd, 0.0)),
        ("kd", (None, kd, 0.7)),
    ):
        *arguments, kd_coef = missing
        alone = kdrl.kdrl_loss(now, old, *arguments, mask=mask, kd_coef=kd_coef)
        assert list(alone) == [name]
        assert torch.equal(alone[name], both[name])
    for arguments, kd_coef in (((None, None), 0.7), ((None, kd), 0.0)):
        with pytest.raises(ValueError, match=f"received no advantages and kd_coef {kd_coef}, expected advantages, or"):
            kdrl.kdrl_loss(now, old, *arguments, mask=mask, kd_coef=kd_coef)


def test_where_student_and_teacher_agree_the_joint_loss_is_grpo():
    now, old, advantages, mask = batch()
    for kind in ("k2", "k3"):
        losses = (
            joint(now, old, advantages, mask, now.detach(), kind=kind, kd_coef=5.0),
            policy.grpo_loss(now, old, advantages, mask=mask),
        )
        for one, other in zip(*(torch.autograd.grad(loss, now) for loss in losses), strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_any_divergence_per_token_can_be_the_teachers_term():
    now, old, advantages, mask = batch()
    student, teacher = (
        torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    kd = divergence.reverse_kl_per_token(student, teacher)
    found = sum(kdrl.kdrl_loss(now, old, advantages, kd, mask=mask, kd_coef=0.5).values())
    expected = policy.grpo_loss(now, old, advantages, mask=mask) + 0.5 * divergence.reverse_kl(
        student, teacher, mask=mask
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("junk", [1e30, math.inf, -math.inf, math.nan])
def test_padding_is_inert_whatever_it_holds(junk):
    now, old, advantages, mask = batch()
    teacher = teacher_of(now)
    found = []
    for fill in (-1.0, junk):
        x, y, z = (torch.where(mask, w.detach(), fill) for w in (now, old, teacher))
        x.requires_grad_()
        loss = joint(x, y, advantages, mask, z, kd_coef=0.7, keep=KEEP)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("denominator", kdrl.DENOMINATORS)
@pytest.mark.parametrize("split", [[2, 2], [1, 3], [1, 1, 1, 1]])
def test_micro_batches_sum_to_the_gradient_of_the_whole_batch(denominator, split):
    now, old, advantages, mask = batch()
    teacher = teacher_of(now)
    expected = torch.autograd.grad(
        joint(now, old, advantages, mask, teacher, kd_coef=0.7, keep=KEEP, denominator=denominator), now
    )
    weights, shares = policy.token_weights(mask), kdrl.kd_weights(mask, KEEP, denominator=denominator)
    total = 0
    for rows in torch.arange(4).split(split):
        kd = kdrl.kd_per_token("k2", now[rows], old[rows], teacher[rows], mask=mask[rows])
        options = {"mask": mask[rows], "weights": weights[rows], "teacher_weights": shares[rows]}
        terms = kdrl.kdrl_loss(now[rows], old[rows], advantages[rows], kd, kd_coef=0.7, **options)
        total = total + torch.autograd.grad(sum(terms.values()), now)[0]
    torch.testing.assert_close(total, *expected, atol=1e-12, rtol=0)


def test_masks_keep_what_their_level_says():
    correct = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    assert kdrl.kd_mask(correct, "none").all()
    assert kdrl.kd_mask(correct, "response").tolist() == [[False, True, False], [True] * 3, [False] * 3]
    assert kdrl.kd_mask(correct, "group").tolist() == [[False] * 3, [True] * 3, [False] * 3]
    group = kdrl.kd_mask(correct, "group")
    assert not policy.group_advantages(correct.float())[group].any()
    with pytest.raises(ValueError, match="level 'token', expected one of none, response, group"):
        kdrl.kd_mask(correct, "token")


def test_a_masked_completion_feels_its_advantage_and_not_the_teacher():
    now, _, advantages, mask = batch()
    teacher = teacher_of(now)
    (found,) = torch.autograd.grad(joint(now, now.detach(), advantages, mask, teacher, kd_coef=0.7, keep=KEEP), now)
    plain = -advantages[:, None] * mask / mask.sum()
    torch.testing.assert_close(found[~KEEP], plain[~KEEP], atol=1e-12, rtol=0)
    assert (found[KEEP] - plain[KEEP])[mask[KEEP]].all()


def test_the_papers_schedule_reaches_its_floor_at_step_80():
    weights = [kdrl.kd_schedule(step, initial=5e-3, decay=5e-5, floor=1e-3) for step in range(281)]
    assert weights[0] == 5e-3
    assert weights[40] == pytest.approx(3e-3)
    assert weights[79] > 1e-3 + 1e-5
    assert set(weights[81:]) == {1e-3}
    assert weights[80] == pytest.approx(1e-3)
    assert weights == sorted(weights, reverse=True)
    assert kdrl.kd_schedule(200, initial=0.2, decay=0.0, floor=0.0) == 0.2


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"decay": -1e-5}, {"floor": 1e-2}, {"floor": -1.0}, {"initial": math.nan}]
)
def test_a_schedule_that_is_none_is_refused(change):
    settings = {"step": 0, "initial": 5e-3, "decay": 5e-5, "floor": 1e-3} | change
    with pytest.raises(ValueError, match="expected step >= 0, decay >= 0 and initial >= floor >= 0"):
        kdrl.kd_schedule(settings.pop("step"), **settings)


def shaped(placement, *, kd_coef=0.7, seed=0):
    """Two groups of two: the gradients of the joint loss and of GRPO on shaped advantages, and the advantages."""
    now, _, _, mask = batch(seed)
    teacher, rewards = teacher_of(now), torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    ratios = teacher - now
    advantages = kdrl.shaped_advantages(
        rewards, ratios.unflatten(0, (2, 2)), mask=mask.unflatten(0, (2, 2)), kd_coef=kd_coef, placement=placement
    ).flatten(0, 1)
    assert not advantages.requires_grad
    plain = policy.group_advantages(rewards).flatten()
    losses = (
        joint(now, now.detach(), plain, mask, teacher, kd_coef=kd_coef),
        policy.grpo_loss(now, now.detach(), advantages, mask=mask),
    )
    return *(torch.autograd.grad(loss, now)[0] for loss in losses), advantages, mask


def test_shaping_after_normalisation_is_the_joint_loss_sample_by_sample_and_shaping_before_is_not():
    for placement in kdrl.PLACEMENTS:
        expected, found, _, _ = shaped(placement)
        if placement == "post":
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        else:
            assert (found - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("placement", ["pre", "mean"])
def test_shaping_before_normalisation_is_one_number_a_completion_and_all_teacher_where_rewards_are_equal(placement):
    _, _, advantages, mask = shaped(placement)
    now, _, _, _ = batch()
    said = ((teacher_of(now) - now).detach() * mask).sum(1)
    said = said / mask.sum(1) if placement == "mean" else said
    expected = [
        reference.advantages([r + 0.7 * s for r, s in zip(rewards, pair, strict=True)], "std")
        for rewards, pair in zip(((1.0, 0.0), (1.0, 1.0)), said.reshape(2, 2).tolist(), strict=True)
    ]
    flat = torch.tensor(expected, dtype=torch.float64).flatten()
    torch.testing.assert_close(advantages, flat[:, None] * mask, atol=1e-9, rtol=0)
    assert advantages[2:].abs().max() > 0.7, "a group of equal rewards has no advantage"


@pytest.mark.parametrize("placement", kdrl.PLACEMENTS)
def test_a_completion_that_is_not_counted_has_no_shaped_advantage_but_the_teachers_own(placement):
    rewards, counted = torch.tensor([[1.0, math.nan, 0.0]]), torch.tensor([[True, False, True]])
    ratios, mask = torch.ones(1, 3, 2), torch.ones(1, 3, 2, dtype=torch.bool)
    options = {"kd_coef": 0.5, "placement": placement}
    found = kdrl.shaped_advantages(rewards, ratios, mask=mask, counted=counted, **options)
    alone = kdrl.shaped_advantages(rewards[:, ::2], ratios[:, ::2], mask=mask[:, ::2], **options)
    torch.testing.assert_close(found[:, ::2], alone)
    assert set(found[0, 1].tolist()) == {0.5 if placement == "post" else 0.0}


def test_wrong_options_are_refused():
    now, old, advantages, mask = batch()
    teacher = teacher_of(now)
    with pytest.raises(ValueError, match="'k1', whose expected gradient as a loss is 0; expected k2 or k3"):
        kdrl.kd_per_token("k1", now, old, teacher, mask=mask)
    assert kdrl.kd_per_token("k1", now, old, teacher, mask=mask, diagnostic=True).shape == mask.shape
    for change, message in (
        ({"kd_coef": -0.1}, "kd_coef -0.1, expected kd_coef >= 0"),
        ({"kd_coef": math.nan}, "kd_coef nan"),
        ({"denominator": "tokens"}, "denominator 'tokens', expected one of all, kept"),
    ):
        with pytest.raises(ValueError, match=message):
            joint(now, old, advantages, mask, teacher, **{"kd_coef": 0.1} | change)
    with pytest.raises(ValueError, match="placement 'loss', expected one of pre, mean, post"):
        shaped("loss")


def test_what_the_policy_no_longer_samples_and_what_nobody_weighs_counts_for_nothing():
    now = torch.tensor([[-torch.inf, 0.0, 0.0]], requires_grad=True)
    old, teacher = torch.tensor([[-1.0, -100.0, 0.0]]), torch.tensor([[-1.0, 0.0, -torch.inf]])
    mask = torch.tensor([[True, True, True]])
    found = kdrl.kd_per_token("k2", now, old, teacher, mask=mask)
    assert found.tolist() == [[0.0, 0.0, torch.inf]]
    weights = torch.tensor([[1.0, 1.0, 0.0]])
    terms = kdrl.kdrl_loss(now, old, None, found, mask=mask, kd_coef=1.0, teacher_weights=weights)
    assert terms["kd"].item() == 0


def test_integers_say_what_is_correct_as_booleans_do():
    correct, mask = torch.tensor([[1, 0], [0, 0]]), torch.ones(4, 3, dtype=torch.int64)
    for level in kdrl.LEVELS:
        keep = kdrl.kd_mask(correct, level)
        assert torch.equal(keep, kdrl.kd_mask(correct.bool(), level))
        for denominator in kdrl.DENOMINATORS:
            found = kdrl.kd_weights(mask, keep.flatten().long(), denominator=denominator)
            assert torch.equal(found, kdrl.kd_weights(mask.bool(), keep.flatten(), denominator=denominator))


def test_a_teacher_without_weight_in_the_reward_may_be_infinite():
    rewards, mask = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, 3, dtype=torch.bool)
    ratios = torch.full((1, 2, 3), -torch.inf)
    for placement in kdrl.PLACEMENTS:
        found = kdrl.shaped_advantages(rewards, ratios, mask=mask, kd_coef=0.0, placement=placement)
        assert torch.equal(found, policy.group_advantages(rewards)[..., None].expand(1, 2, 3))
