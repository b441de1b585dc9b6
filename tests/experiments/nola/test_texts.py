"""What the experiments on text share, against loops over texts and tokens, on tiny decoders in float64."""

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import cells
from limbeck import models, params
from limbeck.experiments.nola import arms, comparison, frozen_decoder
from limbeck.experiments.nola import texts as text_loss
from limbeck.experiments.nola.frozen_decoder import FrozenDecoder
from limbeck.experiments.nola.texts import Pair, Texts
from limbeck.models import language
from limbeck.tasks import meanings

PAIRS = [Pair((3, 4, 5), (6, 1)), Pair((3, 8), (4, 9, 7, 5, 1)), Pair((5, 5, 5, 6), (7,)), Pair((9,), (3, 1))]
ROWS = torch.tensor([2, 0, 3])


def llama(arm="nola"):
    """Three layers, the last two adapted, the adapter off its start."""
    tokenizer = language.load_tokenizer("llama-3x32", ["a b c d e f g h"] * 2)
    base = language.load("llama-3x32", tokenizer, seed=0)
    for parameter in base.parameters():
        parameter.data.mul_(8 if parameter.ndim > 1 else 1)  # so narrow, its outputs are else all alike
    settings = arms.AdapterSettings(lora_scale=8.0, nola_rank=3, nola_scale=1.0)
    model = arms.attach(arm, base, settings, layers=2, vera_rank=4, seed=0).double()
    for at, parameter in enumerate(models.trainable(model).values()):
        parameter.data += torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64).view_as(parameter) * (
            1 + at % 3
        )
    return model


def gpt2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
        return GPT2LMHeadModel(config).eval().double()


def surprises(model, pair):
    """-log p of each token of a target, one text at a time."""
    logprobs = model(torch.tensor([[*pair.prompt, *pair.target]])).logits[0].log_softmax(-1)
    return torch.stack([-logprobs[len(pair.prompt) - 1 + at, token] for at, token in enumerate(pair.target)])


@pytest.mark.parametrize("kept", [True, False])
def test_loss_and_gradient_are_those_of_each_text_alone(kept):
    model = llama()
    texts = Texts(PAIRS, text_loss.states(model, PAIRS, 2), 2) if kept else Texts(PAIRS)
    weights = list(models.trainable(model).values())
    found = text_loss.loss_of(model, texts, torch.float32)(ROWS)["loss/ce"]
    expected = torch.cat([surprises(model, PAIRS[row]) for row in ROWS]).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6), "logits are cast to float32"
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True)
    for left, right in pairs:
        assert right.abs().max() > 1e-4
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_the_mean_loss_weighs_tokens_not_texts():
    model, long = llama(), [*PAIRS, *(Pair((3, at % 7 + 3), (4,) * (at % 5 + 1)) for at in range(40))]
    expected = torch.cat([surprises(model, pair) for pair in long]).mean()
    assert text_loss.mean_loss(model, Texts(long), torch.float32) == pytest.approx(expected.item(), rel=1e-6)


def test_states_come_from_below_the_adapted_layers_and_need_rotary_positions():
    model = llama()
    (states,) = text_loss.states(model, PAIRS[:1], 2)
    ids = torch.tensor([PAIRS[0].read])
    expected = model(ids, output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(states, expected, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="received GPT2Model and layers 1, expected rotary positions, or layers 0"):
        text_loss.states(gpt2(), PAIRS, 1)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_is_said_is_the_most_probable_token_of_the_whole_text_so_far(make):
    model, prompts = make(), [(3, 4, 5), (6,), (7, 8), (9, 3, 4, 4)]
    spoken = []
    with torch.no_grad():
        for prompt in prompts:
            text = list(prompt)
            for _ in range(6):
                text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
            spoken.append(text[len(prompt) :])
    end = spoken[0][2]
    expected = [tuple(row[: row.index(end)] if end in row else row) for row in spoken]
    assert len({len(row) for row in expected}) > 1, "some end, some are cut"
    assert text_loss.greedy_completions(model, prompts, ends=(end,), longest=6, dtype=torch.float32) == expected


def best_texts(model, prompt, *, end, longest, power):
    """All texts after a prompt, enumerated: that with the largest log p / length^power, the end token left out."""
    whole = torch.tensor([[*prompt, *text] for text in itertools.product(range(12), repeat=longest)])
    with torch.no_grad():
        logprobs = model(whole).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    told = logprobs.gather(2, whole[:, len(prompt) :, None])[..., 0].cumsum(1)
    texts, scores = whole[:, len(prompt) :].tolist(), {}
    for text, sums in zip(texts, told.tolist(), strict=True):
        length = text.index(end) + 1 if end in text else longest
        scores[tuple(text[:length])] = sums[length - 1] / length**power
    best = max(scores, key=scores.get)
    return best[:-1] if best[-1] == end else best


def test_beams_find_the_text_with_the_largest_log_probability_over_its_length_to_the_power_of_0_8():
    model, end, prompts = gpt2(), 4, list(itertools.permutations(range(12), 2))[:60]
    options = {"end": end, "longest": 3}
    expected, plain, mean = ([best_texts(model, p, power=power, **options) for p in prompts] for power in (0.8, 0, 1))
    assert expected not in (plain, mean), "the power counts"
    assert len({len(text) for text in expected}) > 1, "some end, some are cut"
    options = {"ends": (end,), "longest": 3, "dtype": torch.float32}
    found = [text_loss.beam_completions(model, prompts, beams=n, **options) for n in (144, 2)]
    assert found[0] == expected, "with so many beams, it is exhaustive"
    assert found[1] != expected


def test_beams_say_no_four_tokens_twice():
    model, prompt = gpt2(), (3, 4, 5)
    options = {"ends": (-1,), "longest": 20, "dtype": torch.float32}

    def most(text):
        whole = (*prompt, *text)
        fours = [whole[at : at + 4] for at in range(len(whole) - 3)]
        return max(map(fours.count, fours))

    assert most(text_loss.greedy_completions(model, [prompt], **options)[0]) > 1
    assert most(text_loss.beam_completions(model, [prompt], beams=3, **options)[0]) == 1


def test_smoothed_labels_share_out_some_of_the_probability_evenly():
    model, texts = llama(), Texts(PAIRS)
    terms = []
    for row in ROWS.tolist():
        pair = PAIRS[row]
        logprobs = model(torch.tensor([[*pair.prompt, *pair.target]])).logits[0].log_softmax(-1)
        told = logprobs[len(pair.prompt) - 1 : -1]
        terms += [-0.7 * told[at, token] - 0.3 * told[at].mean() for at, token in enumerate(pair.target)]
    found = text_loss.loss_of(model, texts, torch.float32, smoothing=0.3)(ROWS)["loss/ce"]
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


def test_batches_are_drawn_by_the_seed_epoch_after_epoch():
    pairs = PAIRS * 3
    found = frozen_decoder.batches(pairs, size=4, steps=7, seed=1)
    assert [sorted(torch.cat(found[at : at + 3]).tolist()) for at in (0, 3)] == [list(range(12))] * 2
    again, other = (frozen_decoder.batches(pairs, size=4, steps=7, seed=seed) for seed in (1, 2))
    assert all(map(torch.equal, found, again))
    assert not all(map(torch.equal, found, other))
    assert not all(map(torch.equal, found[:3], found[3:6]))


@pytest.fixture(scope="module")
def section():
    return params.load("nola", "table_text", "smoke", comparison.Params)


def test_texts_to_train_on_and_to_validate_on_are_of_their_own_meanings(section):
    data = frozen_decoder.prepare(section.texts)
    taught = {text for meaning in data.train for text in meaning.texts}
    assert len(data.drawn) == section.texts.train_texts
    assert {text for _, text in data.drawn} <= taught
    held = [(meaning, text) for meaning in data.validation for text in meaning.texts[: section.texts.references]]
    assert data.pairs["validation"] == [data.pair(*row) for row in held]
    assert not {meaning for meaning, _ in data.drawn} & {*data.validation, *data.test}


def test_a_target_is_the_text_and_the_end_token_cut_at_the_longest(section):
    data = frozen_decoder.prepare(cells.changed(section, longest=9).texts)
    meaning = meanings.Meaning("inform", ("area",), ())
    pair = data.pair(meaning, "in the [area] .")
    assert data.tokenizer.decode(pair.target[:-1]) == "in the [ area ] ."
    assert pair.target[-1] == data.tokenizer.eos_token_id
    assert data.tokenizer.decode(pair.prompt) == "inform : [ area ] text :"
    assert len(data.pair(meaning, "the " * 20).target) == 9


def test_the_halves_hold_the_states_of_all_texts(section, tmp_path):
    bench = FrozenDecoder(section.texts, cells.place(tmp_path, "x"))
    found = frozen_decoder.state_cells(section.texts, {})
    assert frozen_decoder.state_cells(cells.changed(section, layers=0).texts, {}) == []
    for cell in found:
        list(frozen_decoder.write_states(cell, bench))
    whole = text_loss.states(bench.load(), bench.all_pairs(), section.texts.layers)
    kept = [*bench.texts["train"].below, *bench.texts["validation"].below]
    assert len(kept) == len(whole) == len(bench.all_pairs())
    for left, right in zip(kept, whole, strict=True):
        torch.testing.assert_close(left, right)


def test_scores_are_of_the_test_meanings(section, tmp_path, monkeypatch):
    bench = FrozenDecoder(section.texts, cells.place(tmp_path, "x"))
    monkeypatch.setattr(FrozenDecoder, "sentences", lambda self, model, asked, beams: [m.texts[0] for m in asked])
    base = bench.load()
    perfect = {"test/bleu": 100, "test/rouge_l": 100, "test/slot_error_rate": 0}
    assert bench.test_scores(base, 1) == pytest.approx(perfect)
    monkeypatch.setattr(FrozenDecoder, "sentences", lambda self, model, asked, beams: ["[odd]" for _ in asked])
    slots = sum(len(meaning.slots) for meaning in bench.data.test)
    assert bench.test_scores(base, 1)["test/slot_error_rate"] == pytest.approx(1 + len(bench.data.test) / slots)


def test_smoothing_reaches_training_and_beams_reach_decoding(section, tmp_path, monkeypatch):
    section, first = cells.changed(section, layers=0, batch_size=4, steps=1), {}
    for smoothing in (0.0, 0.3):
        bench = FrozenDecoder(section.texts, cells.place(tmp_path, f"{smoothing}"))
        model = arms.attach("nola", bench.load(), section.adapters, layers=0, seed=0)
        loss = bench.train_loss(model, smoothing=smoothing)
        first[smoothing] = next(bench.fit(model, loss, section.loop, learning_rate=0.1, seed=0))["loss/ce"]
        (rows,) = frozen_decoder.batches(bench.texts["train"].pairs, size=4, steps=1, seed=0)
        fresh = arms.attach("nola", bench.load(), section.adapters, layers=0, seed=0)
        loss = text_loss.loss_of(fresh, bench.texts["train"], torch.float32, smoothing=smoothing)
        assert first[smoothing] == pytest.approx(loss(rows)["loss/ce"].item())
    assert first[0.0] != first[0.3]
    monkeypatch.setattr(text_loss, "greedy_completions", lambda *_, **__: [(3,)])
    monkeypatch.setattr(text_loss, "beam_completions", lambda *_, beams, **__: [(3,) * beams])
    one, two = (bench.sentences(model, bench.data.test[:1], beams) for beams in (1, 2))
    assert len(two[0].split()) == 2 * len(one[0].split()) == 2
