import copy
import inspect
import itertools
import math
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from limbeck import sampling

END, VOCABULARY = 3, 11
PROMPTS = ((5, 6, 7), (4,), (8, 9, 5, 6, 7, 10), (4, 4))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    """A decoder with rotary positions, or with learned ones, in float64, sharp enough to prefer something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.param == "llama":
            size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=40, initializer_range=0.4, **size)
            decoder = LlamaForCausalLM(config)
        else:
            size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
            config = GPT2Config(vocab_size=VOCABULARY, initializer_range=0.4, **size)
            decoder = GPT2LMHeadModel(config)
    return decoder.eval().double()


@pytest.fixture(scope="module")
def sampler(model):
    return sampling.Sampled(model, END)


def draw(sampler, prompts=PROMPTS, names=None, group_size=3, longest=9, seed=0):
    names = range(len(prompts)) if names is None else names
    return sampler(prompts, list(names), group_size=group_size, longest=longest, seed=seed)


def score(model, prompts, rows, temperature=1.0):
    return sampling.completion_logprobs(
        *sampling.completion_logits(model, prompts, rows, temperature=temperature), rows
    )


def slowly(model, prompt, numbers, temperature):
    """One completion without cache, batch or padding: the token at which a running sum passes the number."""
    tokens, logprobs = [], []
    for u in numbers.tolist():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float() / temperature
        probs = logits.log_softmax(0).double().exp().tolist()
        sums = list(itertools.accumulate(probs))
        token = next(v for v, total in enumerate(sums) if total > u * sums[-1])
        tokens.append(token)
        logprobs.append(math.log(probs[token]))
        if token == END:
            break
    return tokens, logprobs


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_each_completion_is_what_its_numbers_alone_choose(model, temperature):
    sampled = draw(sampling.Sampled(model, END, temperature))
    lengths = set()
    for row, (prompt, sample) in enumerate(itertools.product(range(4), range(3))):
        tokens, logprobs = slowly(model, PROMPTS[prompt], sampling.uniform(0, prompt, sample, 9), temperature)
        assert sampled.rows()[row] == tuple(tokens)
        assert sampled.logprobs[row, : len(tokens)].tolist() == pytest.approx(logprobs, abs=1e-5)
        assert not sampled.logprobs[row, len(tokens) :].any()
        assert bool(sampled.ended[row]) == (tokens[-1] == END)
        lengths.add(len(tokens))
    assert len(lengths) > 1, "all completions are of one length"
    assert sampled.ended.any() and not sampled.ended.all()


def test_neither_the_batch_nor_its_order_nor_the_group_changes_a_sample(sampler):
    whole = draw(sampler).rows()
    turned = draw(sampler, PROMPTS[::-1], names=[3, 2, 1, 0]).rows()
    assert turned == [row for start in (9, 6, 3, 0) for row in whole[start : start + 3]]
    for prompt in range(4):
        alone = draw(sampler, PROMPTS[prompt : prompt + 1], names=[prompt], group_size=2).rows()
        assert alone == whole[3 * prompt : 3 * prompt + 2]


def test_seeds_names_and_samples_have_their_own_numbers_and_a_longer_stream_begins_as_a_shorter_one():
    base = sampling.uniform(0, "a", 0, 6)
    assert torch.equal(sampling.uniform(0, "a", 0, 9)[:6], base)
    for other in ((1, "a", 0), (0, "b", 0), (0, "a", 1)):
        assert not (sampling.uniform(*other, 6) == base).any()
    many = sampling.uniform(0, "many", 0, 100_000)
    assert many.min() >= 0 and many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / len(many)) ** 0.5)


def test_sampling_is_the_same_again_and_leaves_the_global_generators_alone(sampler, global_generators):
    first = draw(sampler)
    torch.rand(3)
    before = global_generators()
    again = draw(sampler)
    assert global_generators() == before
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert draw(sampler, seed=1).rows() != first.rows()


def test_the_frequencies_of_tokens_are_their_probabilities():
    """20,000 stratified numbers: each token's share is within one part in 10,000 of its probability."""
    logits = torch.tensor([1.0, -2.0, 0.5, -torch.inf, 3.0])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, logprobs = sampling.choose(logits.expand(20_000, 5), uniforms, 0.7)
    expected = (logits / 0.7).softmax(0)
    torch.testing.assert_close(tokens.bincount(minlength=5) / 20_000, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_a_token_without_probability_is_never_chosen_not_even_at_the_ends(u):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    token, _ = sampling.choose(logits, torch.tensor([u], dtype=torch.float64), 1.0)
    assert token.item() == (1 if u == 0 else 2)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_scoring_gives_the_samplers_log_probabilities_at_its_temperature(model, temperature):
    sampled = draw(sampling.Sampled(model, END, temperature))
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    scored = score(model, prompts, sampled.rows(), temperature)
    torch.testing.assert_close(scored.float(), sampled.logprobs, atol=1e-5, rtol=1e-5)
    assert not scored[~sampled.mask].any()
    other = score(model, prompts, sampled.rows(), 0.5)
    assert (other - sampled.logprobs)[sampled.mask].abs().mean() > 0.05


def test_scores_do_not_depend_on_the_rows_beside_them_and_neither_do_gradients(model):
    rows = draw(sampling.Sampled(model, END)).rows()
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    weights = list(model.parameters())

    def gradients(order):
        values = score(model, [prompts[i] for i in order], [rows[i] for i in order])
        return values, torch.autograd.grad(values.sum(), weights)

    whole, expected = gradients(range(12))
    turned, straight = gradients(range(11, -1, -1))
    torch.testing.assert_close(turned.flip(0), whole, atol=1e-6, rtol=0)
    alone = [gradients([i]) for i in range(12)]
    for i, (values, _) in enumerate(alone):
        torch.testing.assert_close(values[0], whole[i, : values.shape[1]], atol=1e-6, rtol=0)
    summed = [sum(parts) for parts in zip(*(g for _, g in alone), strict=True)]
    for one, other, third in zip(expected, straight, summed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one, third, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ((4,), ())}, "a prompt of 0 tokens and longest=9"),
        ({"longest": 0}, "a prompt of 3 tokens and longest=0"),
        ({"longest": 35}, "a prompt of 6 tokens and longest=35, expected at most the 40 together"),
        ({"group_size": 0}, "group_size 0 and 4 names of 4 prompts"),
        ({"names": [1]}, "group_size 3 and 1 names of 4 prompts"),
    ],
)
def test_what_cannot_be_sampled_is_refused(sampler, change, message):
    with pytest.raises(ValueError, match=message):
        draw(sampler, **change)


def test_a_temperature_that_is_none_is_refused(model):
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="expected temperature > 0"):
            sampling.Sampled(model, END, temperature)
        with pytest.raises(ValueError, match="expected temperature > 0"):
            score(model, [(4,)], [(5,)], temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"1 NaN of 4 logits, the largest nan, in row 1 at step 7; expected finite ones, or some at -inf"),
        (math.inf, "0 NaN of 4 logits, the largest inf, in row 1 at step 7"),
        (None, "0 NaN of 4 logits, the largest -inf, in row 1 at step 7"),
    ],
)
def test_logits_that_are_no_numbers_are_refused_by_row_and_step(value, message, dtype):
    logits = torch.zeros(3, 4, dtype=dtype)
    if value is None:
        logits[1] = -torch.inf
    else:
        logits[1, 2] = value
    with pytest.raises(ValueError, match=message):
        sampling.choose(logits, torch.full((3,), 0.5, dtype=torch.float64), 1.0, step=7)


def test_a_model_whose_logits_break_in_the_middle_of_a_completion_is_refused_by_step(model):
    class Breaking(type(model)):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            if calls["seen"] is not None:
                calls["seen"] += 1
                output.logits[1:] = math.nan if calls["seen"] == 4 else output.logits[1:]
            return output

    calls, broken = {"seen": None}, copy.deepcopy(model)
    broken.__class__ = Breaking
    draw(sampling.Sampled(broken, END))  # the shortcuts are tried
    calls["seen"] = 0
    with pytest.raises(ValueError, match=r"11 NaN of 11 logits, the largest nan, in row 1 at step 3"):
        draw(sampling.Sampled(broken, END))


def test_any_of_several_ends_ends_a_completion(model):
    alone, both = draw(sampling.Sampled(model, END)).rows(), draw(sampling.Sampled(model, [END, 5]))
    expected = [row[: row.index(5) + 1] if 5 in row else row for row in alone]
    assert both.rows() == expected
    assert expected != alone
    assert both.ended.tolist() == [row[-1] in (END, 5) for row in expected]


@pytest.mark.parametrize("end", [None, [], -1, [3, None], "3", 2.0])
def test_an_end_that_is_no_token_is_refused(end):
    with pytest.raises(ValueError, match=re.escape(f"received end {end!r}, expected a token or some")):
        inspect.unwrap(sampling.ends)(end)  # without the tests' check of types


class Wilful(torch.nn.Module):
    """A module that trains whatever it is told."""

    def train(self, mode=True):
        return super().train(True)


def test_a_module_that_cannot_leave_training_mode_is_refused_and_all_modes_are_put_back(model):
    wilful = copy.deepcopy(model)
    wilful.added = Wilful()
    wilful.get_input_embeddings().train()
    before = {name: module.training for name, module in wilful.named_modules()}
    with pytest.raises(ValueError, match="received the module 'added', which stays in training mode"):
        draw(sampling.Sampled(wilful, END))
    assert {name: module.training for name, module in wilful.named_modules()} == before
    assert len(set(before.values())) == 2


def test_a_model_with_chance_in_it_is_refused(model):
    class Chancy(type(model)):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            chance["drawn"] += 1
            output.logits[..., 0] += chance["drawn"]
            return output

    chance, chancy = {"drawn": 0}, copy.deepcopy(model)
    chancy.__class__ = Chancy
    for call in (lambda: draw(sampling.Sampled(chancy, END)), lambda: score(chancy, [(4,)], [(5,)])):
        with pytest.raises(ValueError, match="a model that answers otherwise when asked again"):
            call()
