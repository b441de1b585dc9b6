import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import policy
from reference import policy as reference

LENGTHS = (3, 1, 5, 2)


def batch(seed=0, dtype=torch.float64, spread=0.3, time=5):
    """Log-probabilities now and then, an advantage a row, and the mask of completions of unequal lengths."""
    source = torch.Generator().manual_seed(seed)
    now, old = (-torch.rand(len(LENGTHS), time, generator=source, dtype=torch.float64) * 3 for _ in range(2))
    old = now + spread * (old - now)
    mask = torch.arange(time) < torch.tensor(LENGTHS)[:, None]
    advantages = torch.tensor([1.5, -0.5, -2.0, 1.0], dtype=dtype)
    return now.to(dtype).requires_grad_(), old.to(dtype), advantages, mask


def listed(now, old, advantages, mask, teacher=None, keep=None):
    """The same as the reference wants it."""
    teacher = old if teacher is None else teacher
    rows = zip(now.tolist(), old.tolist(), teacher.tolist(), mask.sum(1).tolist(), strict=True)
    return [
        {"tokens": list(zip(*(x[:n] for x in values), strict=True)), "advantage": a, "keep": bool(k)}
        for (*values, n), a, k in zip(rows, advantages.tolist(), keep or [True] * len(now), strict=True)
    ]


@pytest.mark.parametrize("scale", policy.SCALES)
@pytest.mark.parametrize("rewards", [[[1, 0, 0, 0], [1, 1, 0, 1]], [[0.1, 0.2, 0.7], [3.0, -1.0, 0.0]]])
def test_advantages_are_those_of_each_group_alone(rewards, scale):
    found = policy.group_advantages(torch.tensor(rewards, dtype=torch.float64), scale=scale)
    expected = [reference.advantages(group, scale) for group in rewards]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_advantages_sum_to_zero_and_never_carry_gradient(rewards):
    rewards = torch.tensor([rewards], dtype=torch.float64, requires_grad=True)
    found = policy.group_advantages(rewards)
    assert not found.requires_grad
    assert abs(found.sum().item()) < 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6 + 0.1])
def test_a_group_of_equal_rewards_has_no_advantage_at_all(value):
    """Not even that of rounding: three times 0.1 in float32 has a mean that is not 0.1."""
    for scale in policy.SCALES:
        found = policy.group_advantages(torch.full((2, 3), value), scale=scale)
        assert not found.any()


def test_a_completion_that_is_not_counted_has_no_part_in_its_group():
    rewards = torch.tensor([[1.0, 1.0, 0.0, math.nan], [2.0, math.nan, math.nan, math.nan], [1.0, 1.0, math.inf, 1.0]])
    counted = rewards.isfinite()
    found = policy.group_advantages(rewards, counted=counted)
    torch.testing.assert_close(found[0, :3], policy.group_advantages(rewards[:1, :3])[0])
    assert not found[~counted].any()
    assert not found[1:].any()
    assert not policy.group_advantages(rewards, counted=torch.zeros(3, 4, dtype=torch.bool)).any()


def test_rewards_that_no_group_can_have_are_refused():
    with pytest.raises(ValueError, match="groups of 1, expected at least two"):
        policy.group_advantages(torch.zeros(3, 1))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"received the reward {bad}, expected finite"):
            policy.group_advantages(torch.tensor([[0.0, bad]]))
    with pytest.raises(ValueError, match="scale 'variance', expected one of std, none"):
        policy.group_advantages(torch.zeros(1, 2), scale="variance")


@pytest.mark.parametrize("options", [{}, {"normalise": "sequence"}, {"normalise": "constant", "longest": 7}])
@pytest.mark.parametrize("clip_eps", [None, 0.2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_loss_is_the_sum_over_completions_and_tokens(options, clip_eps, dtype, tolerance):
    now, old, advantages, mask = batch(dtype=dtype)
    found = policy.grpo_loss(now, old, advantages, mask=mask, clip_eps=clip_eps, **options)
    completions = listed(now, old, advantages, mask)
    expected = reference.joint_loss(completions, kd_coef=0.0, clip_eps=clip_eps, **options)
    assert found.item() == pytest.approx(expected, rel=tolerance)
    unclipped = reference.joint_loss(completions, kd_coef=0.0, **options)
    assert clip_eps is None or abs(expected - unclipped) > 1e-3, "nothing was clipped"


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_the_gradient_agrees_with_finite_differences_and_goes_to_the_policy_alone(normalise):
    now, old, advantages, mask = batch()
    old.requires_grad_(), advantages.requires_grad_()
    policy.grpo_loss(now, old, advantages, mask=mask, normalise=normalise).backward()
    assert old.grad is None
    assert advantages.grad is None
    assert not now.grad[~mask].any()
    assert torch.autograd.gradcheck(
        lambda x: policy.grpo_loss(x, old, advantages, mask=mask, normalise=normalise), now.detach().requires_grad_()
    )


def test_on_policy_the_gradient_is_that_of_reinforce_and_clipping_does_nothing():
    now, _, advantages, mask = batch()
    for clip_eps in (None, 0.2):
        now.grad = None
        policy.grpo_loss(now, now.detach(), advantages, mask=mask, clip_eps=clip_eps).backward()
        torch.testing.assert_close(now.grad, -advantages[:, None] * mask / mask.sum(), atol=1e-12, rtol=0)


def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough_and_only_there():
    old = torch.zeros(4, 1, dtype=torch.float64)
    now = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    policy.grpo_loss(now, old, advantages, mask=torch.ones(4, 1, dtype=torch.bool), clip_eps=0.2).backward()
    assert [bool(g) for g in now.grad.flatten()] == [False, True, True, False]


@pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_padding_is_inert_whatever_it_holds_and_however_much_there_is(junk, normalise):
    now, old, advantages, mask = batch()
    found = []
    for width, fill in ((0, junk), (0, -1.0), (4, junk)):
        x, y = (torch.where(mask, z.detach(), fill) for z in (now, old))
        x, y = (torch.cat([z, torch.full((4, width), fill, dtype=torch.float64)], 1) for z in (x, y))
        wider = torch.cat([mask, torch.zeros(4, width, dtype=torch.bool)], 1)
        x.requires_grad_()
        loss = policy.grpo_loss(x, y, advantages, mask=wider, normalise=normalise)
        loss.backward()
        found.append((loss.detach(), x.grad[:, :5]))
        assert not x.grad[:, 5:].any()
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-12, rtol=0)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"normalise": "sequence"}, {"normalise": "constant", "longest": 7}])
@pytest.mark.parametrize("split", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_micro_batches_sum_to_the_gradient_of_the_whole_batch(options, split):
    """Weights come from the whole batch; the mean of the parts' own means would be another number."""
    now, old, advantages, mask = batch()
    policy.grpo_loss(now, old, advantages, mask=mask, **options).backward()
    expected, now.grad = now.grad, None
    weights = policy.token_weights(mask, **options)
    for rows in torch.arange(4).split(split):
        values = policy.surrogate_per_token(now[rows], old[rows], advantages[rows], mask=mask[rows])
        policy.weighted_sum(values, weights[rows]).backward()
    torch.testing.assert_close(now.grad, expected, atol=1e-12, rtol=0)


def test_rows_without_a_token_weigh_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    assert policy.token_weights(mask).tolist() == [[0.5, 0.5], [0, 0]]
    assert policy.token_weights(mask, normalise="sequence").tolist() == [[0.25, 0.25], [0, 0]]
    assert policy.token_weights(mask, normalise="constant", longest=2).tolist() == [[0.25, 0.25], [0, 0]]


def test_advantages_may_be_one_a_token():
    now, old, advantages, mask = batch()
    one, many = (
        policy.grpo_loss(now, old, a, mask=mask) for a in (advantages, advantages[:, None].expand(4, 5).contiguous())
    )
    assert one == many


def test_low_precision_is_computed_in_float32():
    now, old, advantages, mask = batch(dtype=torch.bfloat16)
    found = policy.grpo_loss(now, old, advantages, mask=mask)
    assert found.dtype == torch.float32
    assert found == policy.grpo_loss(now.float(), old.float(), advantages.float(), mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "batch"}, "normalise 'batch', expected one of token, sequence, constant"),
        ({"normalise": "constant"}, "longest=None with normalise='constant'"),
        ({"longest": 9}, "longest=9 with normalise='token'"),
        ({"normalise": "constant", "longest": 4}, "completion of 5 tokens, expected at most longest=4"),
        ({"clip_eps": 0.0}, "clip_eps 0.0, expected one between 0 and 1"),
        ({"clip_eps": 1.5}, "clip_eps 1.5, expected one between 0 and 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    now, old, advantages, mask = batch()
    with pytest.raises(ValueError, match=message):
        policy.grpo_loss(now, old, advantages, mask=mask, **options)


def test_wrong_inputs_are_refused(monkeypatch):
    now, old, advantages, mask = batch()
    with pytest.raises(ValueError, match="keeps no token"):
        policy.grpo_loss(now, old, advantages, mask=torch.zeros_like(mask))
    with pytest.raises(ValueError, match="expected a finite loss"):
        policy.grpo_loss(now + math.inf, old, advantages, mask=mask)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"mask of shape \(4, 5\), expected \(4, 3\)"):
        policy.grpo_loss(now, old[:, :3], advantages, mask=mask)


def graded(clip_eps=None, *, now, old, advantage):
    now = torch.tensor([[float(now)]], requires_grad=True)
    old, advantage = torch.tensor([[float(old)]]), torch.tensor([float(advantage)])
    loss = policy.grpo_loss(now, old, advantage, mask=torch.ones(1, 1, dtype=torch.bool), clip_eps=clip_eps)
    return loss.item(), *torch.autograd.grad(loss, now)[0].flatten().tolist()


def test_a_ratio_that_overflows_sends_no_gradient_where_it_is_clipped_or_its_advantage_is_0():
    assert graded(0.2, now=0, old=-100, advantage=1) == (pytest.approx(-1.2), 0.0)
    assert graded(0.2, now=-torch.inf, old=0, advantage=-1) == (pytest.approx(0.8), 0.0)
    assert graded(None, now=0, old=-100, advantage=0) == (0.0, 0.0)
    assert graded(0.2, now=0, old=-torch.inf, advantage=0) == (0.0, 0.0)
    for clip_eps in (None, 0.2):
        with pytest.raises(ValueError, match="expected a finite loss"):
            graded(clip_eps, now=0, old=-100, advantage=-1)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("gap", "clipped"), [(0.1, ()), (0.5, (1.0,)), (-0.5, (-1.0,))])
def test_clipping_stops_the_gradient_on_its_own_side_alone(gap, clipped, advantage):
    value, slope = graded(0.2, now=gap, old=0, advantage=advantage)
    ratio = {1.0: 1.2, -1.0: 0.8}[advantage] if advantage in clipped else math.exp(gap)
    assert value == pytest.approx(-ratio * advantage)
    assert slope == pytest.approx(0 if advantage in clipped else -ratio * advantage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_rewards_of_any_dtype_have_the_advantages_of_float32(dtype):
    found = policy.group_advantages(torch.tensor([[0, 0, 0, 1]]).to(dtype))
    assert found[0].tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-5)
    assert found.dtype == torch.promote_types(dtype, torch.float32)


def test_rewards_whose_squares_overflow_are_refused():
    with pytest.raises(ValueError, match=r"expected torch.float32 to hold their squares"):
        policy.group_advantages(torch.tensor([[3e38, -3e38]]))


def test_a_mask_of_integers_is_the_mask_of_booleans():
    now, old, advantages, mask = batch()
    for dtype in (torch.int64, torch.uint8, torch.float32):
        assert policy.grpo_loss(now, old, advantages, mask=mask.to(dtype)) == policy.grpo_loss(
            now, old, advantages, mask=mask
        )
    with pytest.raises(ValueError, match="a mask that holds 2, expected booleans, or 0 and 1 alone"):
        policy.grpo_loss(now, old, advantages, mask=2 * mask.long())
    with pytest.raises(ValueError, match="a mask `counted` that holds 2"):
        policy.group_advantages(torch.zeros(1, 2), counted=torch.tensor([[1, 2]]))


def test_what_has_weight_0_may_be_infinite():
    values, weights = torch.tensor([[torch.inf, 2.0]], requires_grad=True), torch.tensor([[0.0, 0.5]])
    total = policy.weighted_sum(values, weights)
    assert total.item() == 1.0
    assert torch.autograd.grad(total, values)[0].tolist() == [[0.0, 0.5]]
    with pytest.raises(ValueError, match=r"weights of shape \(1, 1\), expected \(1, 2\)"):
        policy.weighted_sum.__wrapped__(values, weights[:, :1])
