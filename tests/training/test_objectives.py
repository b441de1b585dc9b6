"""Every arm on a rollout of twelve completions made by hand, against the same loss written token by token.

Three groups of four: one with right, wrong and unjudged completions, one all wrong, one all right. Where not said
otherwise, the policy has moved since it sampled, so that the ratio counts.
"""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from limbeck.losses import kdrl
from limbeck.training import objectives
from limbeck.training.rollouts import Rollout, Scores
from reference import divergence
from reference import policy as reference

VOCABULARY, TIME, COEF, STEPS, SWITCH = 5, 4, 0.7, 280, 3
LENGTHS = (3, 1, 2, 4, 2, 4, 1, 3, 2, 2, 3, 1)
REWARDS = [[1.0, 0.25, math.nan, 0.0], [0.0] * 4, [1.0] * 4]
CORRECT = [[True, False, False, False], [False] * 4, [True] * 4]
RIGHT = (0, 8, 9, 10, 11)
UNSOLVED = (4, 5, 6, 7)
TOP_K = ("raw_student_2", "renormalised_teacher_3", "tail_student_1", "raw_teacher_1")
ALL = torch.arange(len(LENGTHS))
CUTS = {"whole": [ALL], "cut": [torch.tensor(rows) for rows in ([7, 0, 10], [3], [1, 2, 4, 5, 6, 8, 9, 11])]}


def case(*, seed=0, on_policy=False, rewards=REWARDS, correct=CORRECT):
    """A rollout, and logits of student and teacher at its tokens, a row a token."""
    source = torch.Generator().manual_seed(seed)
    mask = torch.arange(TIME) < torch.tensor(LENGTHS)[:, None]
    student, moved, teacher = torch.randn(3, sum(LENGTHS), VOCABULARY, generator=source, dtype=torch.float64)
    older = student if on_policy else student + 0.5 * moved
    tokens = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=source)
    chosen = torch.arange(sum(LENGTHS)), tokens
    old, taught = (
        torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, logits.log_softmax(-1)[chosen])
        for logits in (older, teacher)
    )
    completions = [tuple(part.tolist()) for part in tokens.split(LENGTHS)]
    rewards, correct = torch.tensor(rewards, dtype=torch.float64), torch.tensor(correct)
    ended = torch.ones(len(LENGTHS), dtype=torch.bool)
    rollout = Rollout([(0,)] * len(LENGTHS), completions, mask, old, ended, rewards, correct, taught)
    return SimpleNamespace(rollout=rollout, logits=student.requires_grad_(), teacher=teacher, tokens=tokens)


def untaught(on):
    """The same without a teacher."""
    return SimpleNamespace(**vars(on) | {"rollout": dataclasses.replace(on.rollout, teacher_logprobs=None)})


def scored(on, rows):
    """What the loop hands to the terms for some rows."""
    places = torch.cat([torch.arange(sum(LENGTHS)).split(LENGTHS)[row] for row in rows.tolist()])
    mask, logits = on.rollout.mask[rows], on.logits[places]
    said = logits.log_softmax(-1)[torch.arange(len(places)), on.tokens[places]]
    logprobs = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, said)
    return Scores(rows, mask, logprobs, logits, lambda: on.teacher[places])


def aimed(name, on, *, step=0, **options):
    """What an arm gives the loop at a step: its terms of some rows, and what is logged."""
    arm = objectives.arm(name)
    if arm.schedule == "switch":
        options = {"switch": SWITCH} | options
    return objectives.objective(arm, **{"kd_coef": COEF, "steps": STEPS} | options)(step, on.rollout)


def stepped(name, on, *, cut=(ALL,), **options):
    """The terms of all rows, summed over a cut into micro-batches; the loss, its gradient, and what is logged."""
    terms, logged = aimed(name, on, **options)
    parts = [terms(scored(on, rows)) for rows in cut]
    found = {key: torch.stack([part[key] for part in parts]).sum() for key in parts[0]}
    loss = torch.stack([value for value in found.values() if value.requires_grad]).sum()
    (gradient,) = torch.autograd.grad(loss, on.logits, retain_graph=True)
    return SimpleNamespace(terms=found, loss=loss.item(), gradient=gradient, logged=logged)


def teachers_part(kind, on, at):
    """The teacher's term of one token in plain sums; what the paper holds fixed is a float."""
    q, p = on.logits[at].softmax(-1), on.teacher[at].softmax(-1)
    inside = range(VOCABULARY)
    if kind in ("k2", "k3"):
        said = on.tokens[at]
        ratio, rho = p[said].log() - q[said].log(), (q[said].log() - before(on, at)).exp().item()
        return rho * (ratio**2 / 2 if kind == "k2" else ratio.exp() - 1 - ratio)
    if kind != "exact":
        form, whose, k = kind.split("_")
        order = sorted(inside, key=lambda v: -(q if whose == "student" else p)[v])
        inside, outside = order[: int(k)], order[int(k) :]
        if form == "renormalised":
            q, p = (x / sum(x[v] for v in inside) for x in (q, p))
        if form == "tail":
            rest_q, rest_p = (sum(x[v] for v in outside) for x in (q, p))
            return sum(q[v] * (q[v] / p[v]).log() for v in inside) + rest_q * (rest_q / rest_p).log()
    return sum(q[v] * (q[v] / p[v]).log() for v in inside)


def before(on, at):
    return on.rollout.old_logprobs[on.rollout.mask][at].item()


def log_ratios(on):
    """R of each token when it was sampled, a list a completion."""
    values = (on.rollout.teacher_logprobs - on.rollout.old_logprobs)[on.rollout.mask]
    return [part.tolist() for part in values.split(LENGTHS)]


def advantages(on, *, teacher=0.0, mean=False):
    """Of each completion: its judged group's, where the teacher's log-ratios may be part of the reward."""
    found = []
    for prompt, group in enumerate(on.rollout.rewards.tolist()):
        said = log_ratios(on)[4 * prompt : 4 * prompt + 4]
        said = [sum(x) / (len(x) if mean else 1) for x in said]
        shaped = [r + teacher * s for r, s in zip(group, said, strict=True)]
        judged = iter(reference.advantages([r for r in shaped if not math.isnan(r)], "std"))
        found += [0.0 if math.isnan(r) else next(judged) for r in shaped]
    return found


def plainly(name, on, coef):
    """The loss of a whole rollout under an arm with this weight of the teacher, token by token."""
    name = {"response_kept": "response", "annealed": "kdrl"}.get(name, name.removesuffix("_annealed"))
    taught = {
        "response": [row for row in range(12) if row not in RIGHT],
        "group": UNSOLVED,
        **dict.fromkeys(("sft", "rejection", "grpo", "pre", "mean", "post"), ()),
    }.get(name, range(12))
    kind = name if name in (*TOP_K, "k3", "exact") else "k2"
    rewards = [0.0] * 12 if name in ("kd", "sft", "rejection") else advantages(on)
    if name in ("pre", "mean"):
        rewards = advantages(on, teacher=coef, mean=name == "mean")
    learnt = {"sft": range(12), "rejection": RIGHT}.get(name, ())
    share = sum(LENGTHS[row] for row in learnt)
    total, places = 0.0, iter(range(sum(LENGTHS)))
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            at = next(places)
            logprob = on.logits[at].log_softmax(-1)[on.tokens[at]]
            advantage = rewards[row] + (coef * log_ratios(on)[row][t] if name == "post" else 0.0)
            total = total - (logprob - before(on, at)).exp() * advantage / sum(LENGTHS)
            if row in taught:
                total = total + coef * teachers_part(kind, on, at) / sum(LENGTHS)
            if row in learnt:
                total = total - logprob / share
    return total


def weight_of(name):
    """The teacher's at step 0."""
    if name == "response_kept":  # a mean over the tokens that are kept
        return COEF * sum(LENGTHS) / sum(n for row, n in enumerate(LENGTHS) if row not in RIGHT)
    return 1.0 if name == "kd" else COEF * 2.5 if name.endswith("annealed") else COEF


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", [*(name for name in objectives.ARMS if name != "kd_then_rl"), *TOP_K])
def test_every_arm_is_its_loss_token_by_token_however_the_rows_are_cut(name, cut):
    on = case()
    found = stepped(name, on, cut=cut)
    expected = plainly(name, on, weight_of(name))
    (gradient,) = torch.autograd.grad(expected, on.logits)
    assert found.loss == pytest.approx(expected.item(), abs=1e-10)
    torch.testing.assert_close(found.gradient, gradient, atol=1e-10, rtol=0)
    assert gradient.abs().max() > 1e-3
    assert {key for key, value in found.terms.items() if value.requires_grad} == {
        key for key in found.terms if key.startswith("loss/")
    }


@pytest.mark.parametrize("name", objectives.ARMS)
def test_the_terms_of_an_arm_are_named_by_who_teaches(name):
    found = set(stepped(name, case() if objectives.arm(name).asks_teacher else untaught(case())).terms)
    teacher, reward = {"loss/kd", "policy/reverse_kl"}, {"loss/policy"}
    alone = {"sft": {"loss/sft"}, "rejection": {"loss/sft"}, "grpo": reward, "kd": teacher, "kd_then_rl": teacher}
    alone |= {key: {"loss/policy", "policy/reverse_kl"} for key in ("pre", "mean", "post")}
    assert found == alone.get(name, teacher | reward) | {"policy/entropy"}


def test_kdrl_is_grpo_and_the_weighted_half_square_of_the_log_ratio():
    """Read off the terms: loss/policy is GRPO's to the bit, loss/kd is coef times the mean k2 on-policy."""
    on = case(on_policy=True)
    joint, alone = stepped("kdrl", on).terms, stepped("grpo", on).terms
    assert torch.equal(joint["loss/policy"], alone["loss/policy"])
    squares = [ratio**2 / 2 for part in log_ratios(on) for ratio in part]
    assert joint["loss/kd"].item() == pytest.approx(COEF * sum(squares) / sum(LENGTHS), abs=1e-12)


@pytest.mark.parametrize("name", ["kdrl", "annealed", "k3", "exact", "response", "group", "raw_student_2"])
def test_with_a_weight_of_0_every_arm_is_grpo_to_the_bit(name):
    on = case()
    found, expected = stepped(name, on, kd_coef=0.0), stepped("grpo", on)
    assert found.loss == expected.loss
    assert torch.equal(found.gradient, expected.gradient)


@pytest.mark.parametrize("name", ["kdrl", "post", "pre", "mean"])
def test_on_policy_each_token_is_moved_by_its_advantage_and_the_weighted_log_ratio_but_not_where_shaped_before(name):
    """-(A_i + coef R_it) / N times the score of its token."""
    on = case(on_policy=True)
    flat = [a + COEF * r for a, part in zip(advantages(on), log_ratios(on), strict=True) for r in part]
    scores = torch.nn.functional.one_hot(on.tokens, VOCABULARY) - on.logits.detach().softmax(-1)
    expected = -torch.tensor(flat, dtype=torch.float64)[:, None] * scores / sum(LENGTHS)
    gap = (stepped(name, on).gradient - expected).norm() / expected.norm()
    assert gap < 1e-10 if name in ("kdrl", "post") else gap > 0.1


def listened(name, on):
    """The completions whose tokens the teacher's term moves."""
    (gradient,) = torch.autograd.grad(stepped(name, on).terms["loss/kd"], on.logits)
    parts = gradient.abs().sum(-1).split(LENGTHS)
    assert all(bool(part.all()) or not part.any() for part in parts)
    return [row for row, part in enumerate(parts) if part.any()]


def test_a_mask_leaves_to_the_teacher_what_its_level_says():
    """Where the group's mask listens, the reward says nothing."""
    on = case()
    every = {"kdrl": list(range(12)), "response": [1, 2, 3, *UNSOLVED], "group": list(UNSOLVED)}
    every |= {"response_kept": every["response"]}
    every |= {f"{name}_annealed": every[name] for name in ("response", "group")}
    for name, rows in every.items():
        assert listened(name, on) == rows, name
        assert stepped(name, on).logged["kd/kept"] == pytest.approx(len(rows) / 12)
    (gradient,) = torch.autograd.grad(stepped("group", on).terms["loss/policy"], on.logits)
    moved = [row for row, part in enumerate(gradient.split(LENGTHS)) if part.any()]
    assert moved == [0, 1, 3]


def test_a_mask_only_takes_terms_away_and_kept_divides_by_what_is_left():
    on = case()
    all_of, masked, kept = (stepped(name, on) for name in ("kdrl", "response", "response_kept"))
    wrong = sum(n for row, n in enumerate(LENGTHS) if row not in RIGHT)
    left = kept.terms["loss/kd"] / masked.terms["loss/kd"]
    assert left.item() == pytest.approx(sum(LENGTHS) / wrong, rel=1e-12)
    assert 0 < masked.terms["loss/kd"] < all_of.terms["loss/kd"]


def test_where_all_are_right_masked_arms_are_grpo():
    on = case(correct=[[True] * 4] * 3)
    expected = stepped("grpo", on)
    for name in ("response", "group", "response_kept"):
        found = stepped(name, on)
        assert found.terms["loss/kd"] == 0
        torch.testing.assert_close(found.gradient, expected.gradient, atol=1e-12, rtol=0)


def test_an_unjudged_completion_moves_no_group_and_only_the_teacher_speaks_of_it():
    """It counts as wrong for the teacher's masks, and is no text to learn from."""
    on, tokens = case(), slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
    assert math.isnan(on.rollout.rewards[0, 2])
    for name in ("grpo", "pre", "mean", "rejection"):
        assert not stepped(name, on).gradient[tokens].any(), name
    for name in ("kdrl", "response"):
        assert stepped(name, on).gradient[tokens].any(1).all(), name


@pytest.mark.parametrize("name", ["annealed", "response_annealed", "group_annealed"])
def test_the_annealed_weight_is_the_papers_with_the_papers_constants(name):
    """5e-3 to 1e-3 by 5e-5 a step, so the floor is reached at step 80 of 280; 2e-3 is the constant."""
    on = case()
    found = [stepped(name, on, step=step, kd_coef=2e-3) for step in (0, 1, 40, 79, 80, 81, 279)]
    expected = [5e-3, 5e-3 - 5e-5, 3e-3, 1e-3 + 5e-5, 1e-3, 1e-3, 1e-3]
    assert [run.logged["kd/coefficient"] for run in found] == pytest.approx(expected, rel=1e-9)
    parts = [run.terms["loss/kd"].item() / found[-1].terms["loss/kd"].item() for run in found]
    assert parts == pytest.approx([weight / 1e-3 for weight in expected], rel=1e-9)


def test_a_shorter_run_anneals_over_the_same_share_of_its_steps():
    on, found = case(), []
    for step in range(28):
        found.append(aimed("annealed", on, step=step, steps=28, kd_coef=0.4)[1]["kd/coefficient"])
    assert found == pytest.approx([max(1.0 - 0.1 * step, 0.2) for step in range(28)], abs=1e-12)


@pytest.mark.parametrize("name", ["kdrl", "k3", "pre", "response", "raw_student_2"])
def test_a_constant_weight_stays(name):
    on = case()
    assert {aimed(name, on, step=step)[1]["kd/coefficient"] for step in (0, 1, 100, 279)} == {COEF}


def test_distillation_alone_has_weight_1_whatever_is_asked():
    on = case()
    assert stepped("kd", on, kd_coef=0.3).loss == stepped("kd", on, kd_coef=1.0).loss
    assert stepped("kd", on).logged["kd/coefficient"] == 1.0


def test_kd_then_rl_is_kd_before_its_switch_and_grpo_from_it_on():
    on = case()
    for step in (0, SWITCH - 1, SWITCH, SWITCH + 1, 279):
        found, expected = (stepped(x, on, step=step) for x in ("kd_then_rl", "kd" if step < SWITCH else "grpo"))
        assert (found.loss, found.logged) == (expected.loss, expected.logged)
        assert torch.equal(found.gradient, expected.gradient)
        assert set(found.terms) == set(expected.terms)


def test_sft_learns_from_every_text_and_rejection_from_the_right_ones():
    on = case()
    logprobs = on.logits.detach().log_softmax(-1)[torch.arange(sum(LENGTHS)), on.tokens].split(LENGTHS)
    for name, rows in (("sft", range(12)), ("rejection", RIGHT)):
        texts = torch.cat([logprobs[row] for row in rows])
        assert stepped(name, on).loss == pytest.approx(-texts.mean().item(), abs=1e-12)
    nothing = stepped("rejection", case(correct=[[False] * 4] * 3))
    assert nothing.loss == 0
    assert not nothing.gradient.any()


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_entropy_and_reverse_kl_are_measured_without_gradient(cut):
    on = case()
    found = stepped("kdrl", on, cut=cut).terms
    both = [[divergence.softmax(row) for row in logits.tolist()] for logits in (on.logits, on.teacher)]
    entropies = [-sum(x * math.log(x) for x in q) for q in both[0]]
    gaps = [divergence.kl(q, p) for q, p in zip(*both, strict=True)]
    assert found["policy/entropy"].item() == pytest.approx(sum(entropies) / sum(LENGTHS), abs=1e-12)
    assert found["policy/reverse_kl"].item() == pytest.approx(sum(gaps) / sum(LENGTHS), abs=1e-12)
    assert not found["policy/entropy"].requires_grad
    assert not found["policy/reverse_kl"].requires_grad


def test_the_reverse_kl_is_measured_every_few_steps_and_elsewhere_the_teacher_is_not_asked():
    on = case()
    for step in (0, 1, 3, 4, 8):
        terms, _ = aimed("kdrl", on, step=step, measure_every=4)
        assert ("policy/reverse_kl" in terms(scored(on, ALL))) == (step in (0, 4, 8))

    def asked():
        raise AssertionError("the teacher was asked for its logits")

    silent = dataclasses.replace(scored(on, ALL), teacher_logits=asked)
    for name, step in (("kdrl", 1), ("post", 1)):
        aimed(name, on, step=step)[0](silent)
    for name in ("grpo", "sft"):
        aimed(name, untaught(on))[0](silent)


@pytest.mark.parametrize("name", ["grpo", "sft", "rejection"])
def test_an_arm_without_a_teacher_needs_none_and_logs_nothing_of_it(name):
    on = case()
    assert not objectives.arm(name).asks_teacher
    found = stepped(name, untaught(on))
    assert found.logged == {}
    assert torch.equal(found.gradient, stepped(name, on).gradient)


@pytest.mark.parametrize("name", ["kdrl", "k3", "kd", "post", "exact"])
def test_what_is_known_of_the_teacher_before_any_gradient(name):
    on = case()
    found = stepped(name, on).logged
    ratios = np.concatenate(log_ratios(on))
    assert found["kd/k1"] == pytest.approx(-ratios.mean(), abs=1e-12)
    assert found["kd/size"] == pytest.approx(np.abs(ratios).mean(), abs=1e-12)
    assert found["kd/size_95"] == pytest.approx(np.quantile(np.abs(ratios), 0.95), abs=1e-12)
    assert found["kd/size_99"] == pytest.approx(np.quantile(np.abs(ratios), 0.99), abs=1e-12)
    assert found["kd/kept"] == 1
    before = np.repeat(advantages(on), LENGTHS)
    turned = np.sign(before + COEF * ratios) != np.sign(before)
    if name != "kdrl":
        assert "kd/flipped" not in found
    else:
        assert found["kd/flipped"] == pytest.approx((turned & (before != 0)).mean(), abs=1e-12)
        assert 0 < found["kd/flipped"] < 1


@pytest.mark.parametrize("name", ["response", "group", "response_kept"])
def test_the_teacher_turns_no_advantage_of_a_completion_that_it_does_not_teach(name):
    """By hand: what reward and teacher do to a token's log-probability, each as it is weighed in the loss."""
    on = case()
    taught = [row in UNSOLVED if name == "group" else row not in RIGHT for row in range(len(LENGTHS))]
    share = sum(LENGTHS) / sum(n for n, kept in zip(LENGTHS, taught, strict=True) if kept) if "kept" in name else 1.0
    turned = []
    for row, (advantage, ratios) in enumerate(zip(advantages(on), log_ratios(on), strict=True)):
        turned += [advantage * (advantage + COEF * share * taught[row] * ratio) < 0 for ratio in ratios]
    assert stepped(name, on).logged["kd/flipped"] == pytest.approx(sum(turned) / sum(LENGTHS), abs=1e-12)
    assert 0 < sum(turned) < sum(LENGTHS) or name == "group"


def test_after_the_switch_the_teacher_is_still_measured_and_teaches_nothing():
    on = case()
    found = stepped("kd_then_rl", on, step=10)
    assert found.logged["kd/coefficient"] == 0
    assert "kd/flipped" not in found.logged
    assert found.logged["kd/k1"] == stepped("kd", on).logged["kd/k1"]
    assert set(found.terms) == {"loss/policy", "policy/reverse_kl", "policy/entropy"}
    assert torch.equal(found.gradient, stepped("grpo", on).gradient)


def test_a_step_without_a_switch_or_a_switch_without_its_step_is_refused():
    for name, switch in (("kd_then_rl", None), ("kdrl", 3), ("kd", 0)):
        with pytest.raises(ValueError, match=f"received switch={switch} with schedule='.*', expected it with 'switch'"):
            objectives.objective(objectives.arm(name), kd_coef=COEF, steps=STEPS, switch=switch)


@pytest.mark.parametrize("name", ["dpo", "raw_student", "raw_student_2x", "raw_policy_2", "top_2", ""])
def test_an_unknown_arm_is_refused(name):
    with pytest.raises(ValueError, match=f"received arm '{name}', expected one of sft, rejection, grpo, kd, kdrl"):
        objectives.arm(name)


def test_an_arm_of_top_k_is_named_by_its_form():
    for name in TOP_K:
        assert objectives.arm(name) == dataclasses.replace(objectives.arm("kdrl"), kd=name)


def test_entropy_of_two_live_tokens_is_log_2():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 5.0, 5.0]])
    assert objectives._entropies(logits).tolist() == pytest.approx([math.log(2)] * 2)
    assert objectives._entropies(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["response", "group", "response_kept"])
def test_a_teacher_that_rules_a_token_out_has_no_say_where_it_does_not_teach(name):
    on = case()
    step = objectives.objective(objectives.arm(name), kd_coef=COEF, steps=STEPS)
    wanted = stepped(name, on)
    taught = on.rollout.teacher_logprobs.clone()
    taught[RIGHT[0], 0] = -torch.inf  # of a completion that is right
    on.rollout = dataclasses.replace(on.rollout, teacher_logprobs=taught)
    terms, _ = step(1, on.rollout)  # not measured
    loss = sum(value for value in terms(scored(on, ALL)).values() if value.requires_grad)
    assert loss.item() == pytest.approx(wanted.loss, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, on.logits)[0], wanted.gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["exact", "tail_student_2", "raw_teacher_1", "renormalised_teacher_3"])
def test_tokens_that_do_not_learn_are_left_out_of_whole_distributions_too(kind):
    on = case()
    scores = scored(on, ALL)
    weights = kdrl.kd_weights(on.rollout.mask, kdrl.kd_mask(on.rollout.correct, "response").flatten())
    wanted = objectives._teachers_term(kind, on.rollout, scores, weights)
    (pull,) = torch.autograd.grad(wanted.sum(), on.logits, retain_graph=True)
    teacher = on.teacher.clone()
    teacher[: LENGTHS[0], :4] = -torch.inf  # of the first completion, which is right
    ruled = dataclasses.replace(scores, teacher_logits=lambda: teacher)
    found = objectives._teachers_term(kind, on.rollout, ruled, weights)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.autograd.grad(found.sum(), on.logits)[0], pull)


def test_integer_masks_and_verdicts_are_those_of_booleans():
    on = case()
    fields = {name: getattr(on.rollout, name).long() for name in ("mask", "ended", "correct")}
    wanted = stepped("response", on)
    on.rollout = dataclasses.replace(on.rollout, **fields)
    assert stepped("response", on).loss == wanted.loss
    with pytest.raises(ValueError, match="a mask `correct` that holds 2"):
        dataclasses.replace(on.rollout, correct=2 * fields["correct"])


def test_wrong_numbers_and_a_missing_teacher_are_refused():
    method = objectives.arm("kdrl")
    for wrong in ({"kd_coef": math.nan}, {"kd_coef": -1.0}, {"steps": 0}, {"measure_every": 0}):
        with pytest.raises(ValueError, match="expected a finite kd_coef >= 0 and the others at least 1"):
            objectives.objective(method, **{"kd_coef": 1.0, "steps": 2} | wrong)
    with pytest.raises(ValueError, match="without teacher_logprobs, expected them for kd='k2'"):
        aimed("kdrl", untaught(case()))
    with pytest.raises(ValueError, match="received arm 'raw_student_0'"):
        objectives.arm("raw_student_0")
