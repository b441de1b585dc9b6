"""The loop on a decoder of a few hundred weights: what it steps on is the loss of the whole batch, written plainly."""

import copy
import dataclasses
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from limbeck import models, sampling, seeding
from limbeck.adapters import NolaConfig
from limbeck.losses import divergence, kdrl, policy
from limbeck.models import language
from limbeck.training import grpo, objectives, rollouts
from limbeck.training.rollouts import Problem, Verdict

END, WANTED, KD = 3, 5, 0.5
PROMPTS = ((4, 6), (7, 8, 9, 4), (10,))


def decoder(seed):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=11, max_position_embeddings=32, initializer_range=0.3, **size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().double()


def verify(problem, tokens):
    """Half a point for each wanted token; a name that is 13 breaks the verifier."""
    if problem.name == 13:
        raise ZeroDivisionError
    return Verdict(tokens.count(WANTED) / 2, correct=WANTED in tokens)


def joint(step, rollout):
    """KDRL with k2 and a coefficient that falls."""
    advantages = policy.group_advantages(rollout.rewards, counted=rollout.rewards.isfinite()).flatten()
    coef = kdrl.kd_schedule(step, initial=KD, decay=0.1, floor=0.0)
    weights = policy.token_weights(rollout.mask)

    def terms(scores):
        old, mask = rollout.old_logprobs[scores.rows], scores.mask
        gain = policy.surrogate_per_token(scores.logprobs, old, advantages[scores.rows], mask=mask)
        kd = kdrl.kd_per_token("k2", scores.logprobs, old, rollout.teacher_logprobs[scores.rows], mask=mask)
        share = weights[scores.rows]
        return {"loss/policy": policy.weighted_sum(gain, share), "loss/kd": coef * policy.weighted_sum(kd, share)}

    return terms, {"kd/coefficient": coef}


def grouped(step, rollout):
    """GRPO alone."""
    terms, _ = joint(step, dataclasses.replace(rollout, teacher_logprobs=rollout.old_logprobs))
    return lambda scores: {"loss/policy": terms(scores)["loss/policy"]}, {}


def make(temperature=1.0, **changes):
    settings = {
        "group_size": 4,
        "longest": 6,
        "seed": 0,
        "learning_rate": 0.01,
        "clip_norm": 1.0,
        "save_every": 2,
        "micro_tokens": 1000,
        "updates": 1,
        "split_every": 2,
    } | changes
    student = decoder(0)
    sampler = sampling.Sampled(student, END, temperature)
    return rollouts.Run(student, sampler, verify, decoder(1), rollouts.Settings(**settings))


def problems(steps, names=(0, 1, 2)):
    return [[Problem(prompt, name) for prompt, name in zip(PROMPTS, names, strict=True)] for _ in range(steps)]


def train(run, steps, objective=joint, state=None, stop=None, names=(0, 1, 2)):
    """The records of each step, the curve, and the weights at the end, or at the step that is not taken."""
    records, loop = [], grpo.fit(run, models.trainable(run.policy), problems(steps, names), objective, state=state)
    curve = None
    while len(records) != stop:
        try:
            records.append(next(loop))
        except StopIteration as end:
            curve = end.value
            break
    return records, curve, {name: weight.detach().clone() for name, weight in run.policy.named_parameters()}


def plainly(run, rollout):
    """The joint loss of a whole rollout at step 0, row by row, without the loop's own functions."""
    rows = []
    for model in (run.policy, run.teacher):
        for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            rows.append(
                (logits / run.sampler.temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            )
    count = len(rollout.prompts)
    now, teacher = (torch.nn.utils.rnn.pad_sequence(half, batch_first=True) for half in (rows[:count], rows[count:]))
    advantages = policy.group_advantages(rollout.rewards).flatten()
    kd = kdrl.kd_per_token("k2", now, now.detach(), teacher, mask=rollout.mask)
    return sum(kdrl.kdrl_loss(now, now.detach(), advantages, kd, mask=rollout.mask, kd_coef=KD).values())


@pytest.mark.parametrize("micro_tokens", [1, 30, 1000])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_a_step_descends_the_joint_loss_of_the_whole_batch_however_it_is_cut(micro_tokens, temperature):
    run = make(micro_tokens=micro_tokens, temperature=temperature)
    rollout = run.roll(problems(1)[0], 0)
    weights = models.trainable(run.policy)
    loss = plainly(run, rollout)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    (record,), _, after = train(run, 1)
    number = len(rollouts.micro_batches(rollout, range(12), micro_tokens))
    assert number in {1: [12], 30: range(2, 12), 1000: [1]}[micro_tokens]
    assert record["loss/policy"] + record["loss/kd"] == pytest.approx(loss.item(), abs=1e-5)
    assert record["optimiser/gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for (name, start), gradient in zip(before.items(), gradients, strict=True):
        step = gradient * min(1, 1 / norm.item())  # Adam's first step: the sign, but where the gradient is near 0
        expected = start - 0.01 * step / (step.abs() + 1e-8)
        clear = step.abs() > 1e-4
        torch.testing.assert_close(after[name][clear], expected[clear], atol=1e-5, rtol=0)


def test_cutting_rows_into_micro_batches_changes_no_weight_over_many_steps():
    _, _, whole = train(make(), 4)
    for micro_tokens in (1, 30):
        _, _, cut = train(make(micro_tokens=micro_tokens), 4)
        for name, weight in whole.items():
            torch.testing.assert_close(cut[name], weight, atol=1e-6, rtol=0)


def test_a_steps_rows_are_distinct_and_an_epoch_takes_none_twice():
    """Of 11 rows in steps of 4, an epoch has two steps and leaves three rows out."""
    batches = rollouts.batches(11, size=4, steps=5, source=seeding.generator(0, "rows"))
    assert [len(set(rows)) for rows in batches] == [4] * 5
    assert len(set(batches[0] + batches[1])) == len(set(batches[2] + batches[3])) == 8
    assert batches[:2] != batches[2:4]
    assert batches == rollouts.batches(11, size=4, steps=5, source=seeding.generator(0, "rows"))
    for size in (0, 12):
        with pytest.raises(ValueError, match=f"received {size} rows a step, expected 1 to 11"):
            rollouts.batches(11, size=size, steps=1, source=seeding.generator(0, "rows"))


def test_micro_batches_hold_every_row_once_within_their_budget_and_rows_of_like_length():
    rollout = make().roll(problems(1)[0], 0)
    lengths = [len(p) + len(c) for p, c in zip(rollout.prompts, rollout.completions, strict=True)]
    batches = rollouts.micro_batches(rollout, range(12), 25)
    assert sorted(torch.cat(batches).tolist()) == list(range(12))
    spans = [[lengths[row] for row in rows] for rows in batches]
    assert all(len(span) * max(span) <= 25 for span in spans)
    assert [length for span in spans for length in span] == sorted(lengths)
    assert [len(rows) for rows in rollouts.micro_batches(rollout, range(12), 1)] == [1] * 12


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_stopped_at_any_step_and_resumed_is_an_unbroken_one_to_the_bit(stop, tmp_path, global_generators):
    before = global_generators()
    _, curve, whole = train(make(), 5)
    assert global_generators() == before
    train(make(), 5, state=tmp_path / "state", stop=stop)
    torch.rand(5)
    _, again, resumed = train(make(), 5, state=tmp_path / "state")
    assert again == curve
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert len(curve["loss/kd"]) == 3


def test_two_runs_are_the_same_and_two_seeds_are_not():
    (one, _, first), (two, _, second), (three, _, third) = (train(make(seed=seed), 3) for seed in (0, 0, 1))
    assert one == two
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert three != one
    assert not any(torch.equal(weight, third[name]) for name, weight in first.items() if weight.ndim > 1)


def test_the_terms_gradients_are_told_apart_every_few_steps():
    run = make()
    rollout = run.roll(problems(1)[0], 0)
    terms, _ = joint(0, rollout)
    losses = terms(run.score(rollout, torch.arange(12)))
    weights = list(run.policy.parameters())
    apart = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, retain_graph=True)])
        for value in losses.values()
    ]
    records, curve, _ = train(run, 4)
    assert records[0]["gradient/policy"] == pytest.approx(apart[0].norm().item(), rel=1e-6)
    assert records[0]["gradient/kd"] == pytest.approx(apart[1].norm().item(), rel=1e-6)
    assert records[0]["gradient/cosine"] == pytest.approx(torch.cosine_similarity(*apart, dim=0).item(), rel=1e-6)
    assert [("gradient/kd" in record) for record in records] == [True, False, True, False]
    assert len(curve["gradient/kd"]) == 2
    norms = [record["optimiser/gradient_norm"] for record in records]
    size = len(records) // len(curve["loss/kd"])
    assert curve["optimiser/gradient_norm_max"] == [
        max(norms[start : start + size]) for start in range(0, len(norms), size)
    ]
    _, _, unsplit = train(make(split_every=100), 4)
    _, _, split = train(make(split_every=1), 4)
    for name, weight in unsplit.items():
        torch.testing.assert_close(split[name], weight, atol=1e-9, rtol=0)


def test_a_coefficient_reaches_the_loss_and_the_record():
    records, _, _ = train(make(), 7)
    assert [record["kd/coefficient"] for record in records] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0, 0])
    assert [record["loss/kd"] > 0 for record in records] == [True] * 5 + [False] * 2


def test_rewards_alone_make_the_wanted_token_frequent():
    records, _, _ = train(make(learning_rate=0.03), 25, objective=grouped)
    means = [sum(r["rollout/reward"] for r in part) / 5 for part in (records[:5], records[-5:])]
    assert means[1] > means[0] + 0.5, means


def test_the_teacher_alone_brings_the_student_to_it():
    def distilled(step, rollout):
        def terms(scores):
            exact = divergence.reverse_kl_per_token(scores.logits, scores.teacher_logits())
            weights = policy.token_weights(rollout.mask)[scores.rows]
            return {"loss/kd": policy.weighted_sum(scores.restored(exact), weights)}

        return terms, {}

    records, _, _ = train(make(learning_rate=0.02), 25, objective=distilled)
    assert records[-1]["loss/kd"] < records[0]["loss/kd"] / 3


def test_later_updates_of_a_rollout_are_off_policy_and_move_the_weights_further():
    ratios = []

    def watching(step, rollout):
        terms, logged = joint(step, rollout)

        def watched(scores):
            gaps = (scores.logprobs - rollout.old_logprobs[scores.rows]) * scores.mask
            ratios.append(gaps.abs().max().item())
            return terms(scores)

        return watched, logged

    train(make(updates=3), 1, objective=watching)
    assert ratios[0] < 1e-5
    assert min(ratios[1:]) > 1e-3


def test_a_verifier_that_raises_is_counted_and_its_completions_have_no_advantage():
    run = make()
    rollout = run.roll(problems(1, names=(0, 13, 2))[0], 0)
    assert rollout.rewards.isnan().any(1).tolist() == [False, True, False]
    assert rollout.metrics["rollout/unjudged"] == pytest.approx(1 / 3)
    rewards = [[1.0, math.nan, 1.0], [0.0, 1.0, math.nan], [math.nan, 1.0, math.nan]]
    partly = dataclasses.replace(rollout, rewards=torch.tensor(rewards), correct=torch.tensor(rewards) == 1)
    assert partly.metrics["rollout/equal_groups"] == pytest.approx(2 / 3)
    assert partly.metrics["rollout/accuracy"] == pytest.approx(4 / 5)
    assert math.isfinite(rollout.metrics["rollout/reward"])
    records, _, weights = train(run, 2, names=(0, 13, 2))
    assert records[0]["rollout/unjudged"] == pytest.approx(1 / 3)
    assert all(weight.isfinite().all() for weight in weights.values())
    with pytest.raises(ValueError, match="no verdict on 12 completions"):
        make().roll(problems(1, names=(13, 13, 13))[0], 0)


def test_what_a_step_reports_is_what_was_rolled_out():
    run = make()
    rollout = run.roll(problems(1)[0], 0)
    metrics, lengths = rollout.metrics, [len(row) for row in rollout.completions]
    rewards = [row.count(WANTED) / 2 for row in rollout.completions]
    groups = [rewards[start : start + 4] for start in (0, 4, 8)]
    assert metrics["rollout/reward"] == pytest.approx(sum(rewards) / 12)
    assert metrics["rollout/accuracy"] == pytest.approx(sum(WANTED in row for row in rollout.completions) / 12)
    assert metrics["rollout/equal_groups"] == pytest.approx(sum(len(set(group)) == 1 for group in groups) / 3)
    assert metrics["rollout/length"] == sum(lengths) / 12
    assert metrics["rollout/tokens"] == sum(lengths)
    assert metrics["rollout/ended"] == pytest.approx(sum(row[-1] == END for row in rollout.completions) / 12)
    assert 0 < metrics["rollout/ended"] < 1


def test_steps_and_problems_have_samples_of_their_own():
    run = make()
    one, two = (run.roll(problems(1)[0], step).completions for step in (0, 1))
    assert one != two
    same = [Problem(PROMPTS[0], name) for name in (0, 1)]
    completions = run.roll(same, 0).completions
    assert completions[:4] != completions[4:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 1}, "group_size 1, expected at least two completions a prompt"),
        ({"learning_rate": 0.0}, "learning_rate 0.0, expected learning_rate > 0"),
        ({"micro_tokens": 0}, "micro_tokens 0, expected micro_tokens > 0"),
        ({"updates": 0}, "updates 0, expected updates > 0"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_what_is_missing_or_not_finite_is_refused():
    run = make()
    broken = dataclasses.replace(run, verify=lambda *_: Verdict(math.inf, correct=False))
    with pytest.raises(ValueError, match="the reward inf for problem 0, expected a finite one"):
        broken.roll(problems(1)[0], 0)
    alone = dataclasses.replace(run, teacher=None)
    rollout = alone.roll(problems(1)[0], 0)
    assert rollout.teacher_logprobs is None
    with pytest.raises(ValueError, match="received no teacher, expected one"):
        alone.score(rollout, torch.arange(2)).teacher_logits()


@pytest.mark.parametrize("method", [LoraConfig(r=2), NolaConfig(r=2, num_basis=6, nola_alpha=2)], ids=["lora", "nola"])
def test_an_adapter_is_sampled_scored_and_trained_and_the_model_under_it_stays(method):
    """PEFT's LoRA, and NOLA, away from 0: the log-probabilities are those of the whole model, head and all."""
    base = make()
    config = dataclasses.replace(method, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy_model = get_peft_model(decoder(0), config).double()
    with torch.no_grad():
        for name, weight in policy_model.named_parameters():
            if "lora_B" in name or "nola_" in name:
                weight.fill_(0.3)
    run = dataclasses.replace(base, policy=policy_model, sampler=sampling.Sampled(policy_model, END))
    frozen = {name: w.clone() for name, w in policy_model.named_parameters() if not w.requires_grad}
    rollout = run.roll(problems(1)[0], 0)
    scores = run.score(rollout, torch.arange(12))
    prompt, completion = rollout.prompts[0], rollout.completions[0]
    logits = policy_model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    torch.testing.assert_close(scores.logprobs[0, : len(completion)], expected.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.logprobs.float(), rollout.old_logprobs, atol=1e-5, rtol=0)
    assert (scores.logprobs - base.score(rollout, torch.arange(12)).logprobs).abs().max() > 0.01, "no adapter in it"
    start = {name: w.detach().clone() for name, w in models.trainable(policy_model).items()}
    train(run, 2)
    assert all((w != start[name]).any() for name, w in models.trainable(policy_model).items())
    assert all(torch.equal(w, frozen[name]) for name, w in policy_model.named_parameters() if name in frozen)


def test_the_teacher_is_left_as_it_was():
    run = make()
    before = copy.deepcopy(run.teacher.state_dict())
    train(run, 2)
    assert all(torch.equal(weight, before[name]) for name, weight in run.teacher.state_dict().items())
    assert all(weight.grad is None for weight in run.teacher.parameters())


def tokenizer(words, **special):
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", **special)


def test_a_teacher_of_another_vocabulary_is_refused_and_one_of_another_end_is_not():
    words = ["?", "[E]", "[P]", "a", "b"]
    student = tokenizer(words, eos_token="[E]", pad_token="[P]")
    language.require_one_vocabulary(student, tokenizer(words, eos_token="[E]", pad_token="[P]"))
    with pytest.raises(
        ValueError, match="5 and 6 tokens, expected equal ones; 'c' is None for the student and 5 for the teacher"
    ):
        language.require_one_vocabulary(student, tokenizer([*words, "c"], eos_token="[E]", pad_token="[P]"))
    with pytest.raises(ValueError, match="expected equal ones; 'a' is 3 for the student and 4 for the teacher"):
        turned = [*words[:3], "b", "a"]
        language.require_one_vocabulary(student, tokenizer(turned, eos_token="[E]", pad_token="[P]"))
    language.require_one_vocabulary(student, tokenizer(words, eos_token="[P]", pad_token="[P]"))
    with pytest.raises(ValueError, match=r"pad_token '\[P\]' for the student and '\[E\]' for the teacher"):
        language.require_one_vocabulary(student, tokenizer(words, eos_token="[E]", pad_token="[E]"))


def on_first_step(run, arm, teacher_ends):
    run = dataclasses.replace(run, teacher_ends=teacher_ends)
    rollout = run.roll(problems(1)[0], 0)
    terms, metrics = objectives.objective(objectives.arm(arm), kd_coef=KD, steps=1)(0, rollout)
    return rollout, terms(run.score(rollout, torch.arange(len(rollout.completions)))), metrics


def test_the_teacher_has_no_say_in_an_end_that_is_none_of_its_own():
    whole, losses, _ = on_first_step(make(), "kdrl", None)
    assert 0 < whole.ended.sum() < len(whole.ended)
    same, own, _ = on_first_step(make(), "kdrl", (9, END))
    assert torch.equal(same.taught, whole.mask)
    assert {name: value.item() for name, value in own.items()} == {name: value.item() for name, value in losses.items()}
    part, other, metrics = on_first_step(make(), "kdrl", (9,))
    ends = torch.zeros_like(whole.mask)
    for row, tokens in enumerate(whole.completions):
        ends[row, len(tokens) - 1] = tokens[-1] == END
    assert torch.equal(part.taught, whole.mask & ~ends)
    ratios = (whole.teacher_logprobs - whole.old_logprobs).double()
    expected = KD * (ratios.square() / 2)[part.taught].sum() / whole.mask.sum()
    assert other["loss/kd"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert other["loss/policy"].item() == pytest.approx(losses["loss/policy"].item(), rel=1e-9)
    assert metrics["kd/k1"] == pytest.approx(-ratios[part.taught].mean().item(), rel=1e-6)


@pytest.mark.parametrize("arm", ["exact", "raw_student_3"])
def test_nor_where_the_term_reads_all_tokens_of_the_vocabulary(arm):
    run = make()
    rollout, losses, _ = on_first_step(run, arm, (9,))
    scores = run.score(rollout, torch.arange(len(rollout.completions)))
    student, teacher = (x.detach().log_softmax(-1) for x in (scores.logits, scores.teacher_logits()))
    each = student.exp() * (student - teacher)
    if arm != "exact":
        each = each.gather(-1, student.topk(3).indices)
    expected = KD * (scores.restored(each.sum(-1)) * rollout.taught).sum() / rollout.mask.sum()
    assert rollout.taught.sum() < rollout.mask.sum()
    assert losses["loss/kd"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("arm", ["kdrl", "kd", "k3", "pre", "post", "mean", "response_kept"])
def test_a_teacher_that_never_writes_the_end_moves_no_arm_that_knows_it(arm):
    class Endless(LlamaForCausalLM):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits[..., END] -= 200.0
            return output

    run = make()
    run.teacher.__class__ = Endless
    rollout, losses, metrics = on_first_step(run, arm, (9,))
    assert rollout.teacher_logprobs.min() > -50
    assert max(value.abs().item() for name, value in losses.items() if name.startswith("loss")) < 50
    assert max(map(abs, metrics.values())) < 50
    assert on_first_step(run, "grpo", None)[0].teacher_logprobs.min() < -150


def test_a_teacher_in_training_mode_scores_as_in_evaluation_mode_and_stays_in_it():
    config = LlamaConfig(**decoder(1).config.to_diff_dict() | {"attention_dropout": 0.5})
    config._attn_implementation = "eager"
    run = make()
    noisy = LlamaForCausalLM(config).double()
    noisy.load_state_dict(run.teacher.state_dict())
    expected = run.roll(problems(1)[0], 0)
    received = dataclasses.replace(run, teacher=noisy.train()).roll(problems(1)[0], 0)
    torch.testing.assert_close(received.teacher_logprobs, expected.teacher_logprobs)
    assert all(module.training for module in noisy.modules())
    rows = torch.arange(len(received.completions))
    logits = dataclasses.replace(run, teacher=noisy).score(received, rows).teacher_logits()
    torch.testing.assert_close(logits, run.score(expected, rows).teacher_logits())
