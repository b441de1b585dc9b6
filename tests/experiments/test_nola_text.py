"""NOLA's experiments on texts, whole, on drawn models of a few layers, and part by part."""

import dataclasses
import json
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import cells
from limbeck import language_models, params
from limbeck.experiments.nola import (
    table_instruction,
    table_text,
    table_text_full,
    table_text_second,
    text,
    text_arms,
    text_bottom,
    text_data,
)
from limbeck.experiments.nola.text_model import Adapted
from limbeck.tasks import meanings

TABLES = {
    "table_text": table_text,
    "table_text_full": table_text_full,
    "table_text_second": table_text_second,
    "table_instruction": table_instruction,
}
LOSSES = {f"{split}/loss" for split in ("train", "validation", "test")}
SEED = 100
OPTIONS = {"rank": 2, "lora_scale": 1.0, "nola_scale": 1.0}


def smoke(name, **changes):
    """A smoke section on the smaller data set."""
    small = {"data": "camrest_meanings"} | changes
    return dataclasses.replace(params.load("nola", name, "smoke", TABLES[name].Params), **small)


@pytest.fixture(scope="module")
def section():
    """The smoke section, with selection runs as long as final ones."""
    return smoke("table_text", selection_steps=2)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    """The records of the comparison at the selection's own seed, and its folder."""
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    folder = tmp_path_factory.mktemp("table_text")
    return cells.run_all(table_text, section, folder, (SEED,)), folder


def cell_at(section, seed=SEED, **coordinates):
    found = text.cells(section, (seed,))
    (cell,) = [cell for cell in found if coordinates.items() <= cell.coordinates.items()]
    return cell


def final(section, arm, seed=SEED):
    return cell_at(section, seed, phase="final", arm=arm)


def subject(section, arm, seed=0, layers=None):
    """A model with an arm's adapter of drawn numbers, its states below computed here."""
    data = text_data.prepare(section)
    layers = section.adapted_layers if layers is None else layers
    model = language_models.load(section.model, data.tokenizer, seed=0)
    adapter = text_arms.attach(model, text_arms.read(arm), layers=layers, seed=seed, **OPTIONS)
    source = torch.Generator().manual_seed(seed)
    found = Adapted(model, adapter, data, layers, {}, torch.float32)
    with torch.no_grad():
        for parameter in found.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=source), alpha=0.5)
    for split, sentences in data.sentences.items() if layers else ():
        found.below[split] = text_bottom.states(model, [s.read for s in sentences], layers, torch.float32)
    return found


def naive(found, sentence):
    """-log p of each token of a sentence, by the whole model, alone and without padding."""
    logits = found.model(input_ids=torch.tensor([[*sentence.prompt, *sentence.text]])).logits[0]
    start = len(sentence.prompt)
    return F.cross_entropy(logits[start - 1 : -1], torch.tensor(sentence.text), reduction="none")


def test_the_whole_comparison_runs_and_every_arm_has_its_own_steps(section, ran):
    found, folder = ran
    assert len(found) == 1 + 4 * len(section.learning_rates) + 5
    scores = LOSSES | {"test/bleu", "test/rouge_l", "test/ended", "test/slot_errors"}
    for run in found:
        phase, trained = run["cell"]["phase"], run["cell"]["arm"] != "none"
        assert bool(run["curve"]) == bool(run["trainable_parameters"]) == trained
        if phase == "final":
            assert scores <= run["metrics"].keys()
            assert run["metrics"]["adapter/parameters"] == run["trainable_parameters"]
        elif phase == "selection":
            assert run["metrics"].keys() == {"validation/loss"}
        assert all(math.isfinite(value) for value in run["metrics"].values())
        assert all(len(values) == section.steps for values in run["curve"].values())
    curves = [json.dumps(run["curve"]) for run in found if run["cell"]["phase"] == "selection"]
    assert len(set(curves)) == len(curves), "two cells took the same steps"
    assert (folder / "bottom.safetensors").is_file()


def test_a_first_step_begins_where_the_frozen_model_is_for_every_arm(ran):
    """The loss of the first batch, before any update; `none` of the same batches is not recorded, so all arms agree."""
    firsts = {run["curve"]["loss/ce"][0] for run in ran[0] if run["curve"]}
    assert max(firsts) - min(firsts) < 1e-5


def test_a_final_cell_at_the_selections_seed_takes_the_steps_of_the_best_cell(section, ran):
    found, _ = ran
    for arm in ("lora_1", "nola_1", "nola_1_2", "nola_1_5"):
        tried = [run for run in found if run["cell"]["phase"] == "selection" and run["cell"]["arm"] == arm]
        best = min(tried, key=lambda run: run["metrics"]["validation/loss"])
        last = cells.pick(found, phase="final", arm=arm)
        assert last["metrics"]["optimiser/learning_rate"] == best["cell"]["learning_rate"]
        assert last["curve"] == best["curve"]
        assert last["metrics"]["validation/loss"] == best["metrics"]["validation/loss"]


def test_the_rate_of_the_lowest_validation_loss_is_chosen_and_of_equals_the_smallest():
    at = [("x", 0.1, 2.0), ("x", 0.03, 1.0), ("x", 0.01, 1.0), ("y", 0.3, 0.5)]
    found = [
        {"cell": {"phase": "selection", "arm": arm, "learning_rate": rate}, "metrics": {"validation/loss": loss}}
        for arm, rate, loss in at
    ]
    found.append({"cell": {"phase": "final", "arm": "x"}, "metrics": {"validation/loss": 0.0}})
    assert text._chosen(found, "x") == 0.01
    assert text._chosen(found, "y") == 0.3
    assert text._chosen(found, "none") == 0.0


@pytest.mark.parametrize("arm", ["lora_1", "nola_1_2"])
def test_a_cell_run_twice_is_the_same_to_the_bit_and_another_seed_is_not(section, ran, arm, global_generators):
    found, folder = ran
    torch.rand(7)
    before = global_generators()
    again = cells.drive(table_text, section, final(section, arm), cells.place(folder, f"twice {arm}", found))
    assert global_generators() == before
    assert vars(again).items() <= cells.pick(found, phase="final", arm=arm).items()
    other = cells.drive(table_text, section, final(section, arm, 0), cells.place(folder, f"other {arm}", found))
    assert other.curve != again.curve


def test_an_interrupted_cell_goes_on_to_the_same_bits(section, ran):
    found, folder = ran
    where, cell = cells.place(folder, "killed", found), final(section, "nola_1_5")
    assert cells.drive(table_text, section, cell, where, kill_at=2) is None
    assert where.state.is_file()
    result = cells.drive(table_text, section, cell, where)
    assert vars(result).items() <= cells.pick(found, phase="final", arm="nola_1_5").items()


def test_the_states_that_the_first_cell_leaves_are_those_of_each_sentence(section, ran):
    data, found = text_data.prepare(section), load_file(ran[1] / "bottom.safetensors")
    model = language_models.load(section.model, data.tokenizer, seed=0)
    for split, sentences in data.sentences.items():
        parts = found[split].split([len(sentence.read) for sentence in sentences])
        for sentence, part in zip(sentences, parts, strict=True):
            outputs = model(input_ids=torch.tensor([sentence.read]), output_hidden_states=True)
            torch.testing.assert_close(part[None], outputs.hidden_states[-1 - section.adapted_layers])


@pytest.mark.parametrize("arm", ["none", "full", "lora 2", "vera 4", "nola 1/2"])
def test_the_last_layers_alone_and_in_batches_say_what_the_whole_model_says(section, arm):
    found = subject(section, arm)
    rows = [3, 0, 7, 1]
    values, owners = found.cross_entropy("train", rows)
    for place, row in enumerate(rows):
        torch.testing.assert_close(values[owners == place], naive(found, found.data.sentences["train"][row]))
    whole = dataclasses.replace(found, layers=0, below={})
    torch.testing.assert_close(whole.cross_entropy("train", rows)[0], values)


def test_a_loss_is_the_mean_over_tokens_and_its_gradient_reaches_all_that_is_trained(section):
    found = subject(section, "nola 1/2")
    some = [naive(found, sentence) for sentence in found.data.sentences["validation"][:3]]
    assert found.measured("validation", 3)["validation/loss"] == pytest.approx(torch.cat(some).mean().item(), rel=1e-5)
    loss = found.loss(torch.tensor([0, 1, 2]))["loss/ce"]
    expected = torch.cat([naive(found, sentence) for sentence in found.data.sentences["train"][:3]]).mean()
    gradients = torch.autograd.grad(loss, list(found.parameters.values()))
    for mine, other in zip(gradients, torch.autograd.grad(expected, list(found.parameters.values())), strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_full_trains_the_last_layers_and_an_adapter_only_its_own_numbers(section):
    names = {arm: list(subject(section, arm).parameters) for arm in ("none", "full", "lora 1", "vera 4", "nola 1")}
    assert names["none"] == []
    assert {name.split(".")[1] for name in names["full"]} == {"layers", "norm"}
    assert {int(name.split(".")[2]) for name in names["full"] if "layers" in name} == {1, 2}
    for arm in ("lora", "vera", "nola"):
        own = names[f"{arm} {4 if arm == 'vera' else 1}"]
        assert all(f"{arm}_" in name and name.split(".")[2] in "12" for name in own)
        assert {name.split(".")[4] for name in own} == {"q_proj", "v_proj"}
    every = subject(section, "full", layers=0)
    assert sum(p.numel() for p in every.parameters.values()) == sum(p.numel() for p in every.model.parameters())


def test_generated_sentences_are_the_likeliest_tokens_one_by_one(section, monkeypatch):
    found, written = subject(section, "nola 1"), []
    monkeypatch.setattr(text_data.Texts, "decoded", lambda _, tokens: written.append(tokens) or "x")
    for name in ("bleu", "rouge_l"):
        monkeypatch.setattr(f"limbeck.text_scores.{name}", lambda *_: 0.0)
    expected = []
    for prompt in found.data.prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 5 and (len(tokens) == len(prompt) or tokens[-1] != found.data.end):
            tokens.append(int(found.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tuple(tokens[len(prompt) :]))
    found.written(5)
    assert written == expected
    assert len(set(expected)) > 1, "every meaning has the same sentence"


def test_sentences_are_scored_against_all_that_people_wrote_and_the_slots_of_their_meaning(section, monkeypatch):
    found, seen = subject(section, "none"), {}
    for name in ("bleu", "rouge_l", "slot_error_rate"):
        monkeypatch.setattr(f"limbeck.text_scores.{name}", lambda *said, name=name: seen.update({name: said}) or 0.0)
    found.written(2)
    test = meanings.splits(section.data, section.split_sizes, columns=section.columns, seed=section.split_seed)[2]
    assert seen["bleu"] == seen["rouge_l"]
    assert seen["bleu"][1] == list(test.values())
    assert seen["slot_error_rate"][1] == [meaning.slots for meaning in test]
    assert seen["slot_error_rate"][0] == seen["bleu"][0]
    asked = [found.data.tokenizer(f"{meaning}\nText:")["input_ids"] for meaning in test]
    assert list(map(list, found.data.prompts)) == asked


def test_a_question_asks_for_the_sentence_of_a_test_meaning_among_those_of_three_neighbours():
    section = smoke("table_instruction")
    test = meanings.splits(section.data, section.split_sizes, columns=section.columns, seed=section.split_seed)[2]
    questions = text_data._questions(test, seed=0)
    said_of = {said: meaning for meaning, some in test.items() for said in some}
    for question in questions:
        right, *wrong = (said_of[said] for _, said in question)
        assert {meaning for meaning, _ in question} == {right}, "all stand after the right meaning"
        assert len({right, *wrong}) == 4
        assert set(wrong) <= set(meanings.neighbours(right, test))
    assert text_data._questions(test, seed=0) == questions
    with pytest.raises(ValueError, match="that differ in one slot"):
        text_data._questions(dict(list(test.items())[:2]), seed=0)


def test_a_choice_is_right_where_the_right_sentence_has_the_highest_mean_log_probability():
    found = subject(smoke("table_instruction", measured_texts=12), "lora 2")
    options = found.data.sentences["choices"]
    assert len(options) == 4 * 12
    means = torch.stack([naive(found, sentence).mean() for sentence in options]).view(-1, 4)
    expected = (means.argmin(1) == 0).double().mean().item()
    assert found.chosen() == expected
    assert 0 < expected < 1


def on_meta(config, kind):
    with torch.device("meta"):
        return kind(config)


def test_bases_fill_the_budget_of_lora_at_rank_1_in_smollm2_exactly():
    size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    model = on_meta(LlamaConfig(vocab_size=8, **size, **heads), LlamaForCausalLM)
    for layers, lora in ((6, 11_520), (0, 57_600)):
        for share, expected in ((Fraction(1), 480), (Fraction(1, 2), 240), (Fraction(1, 5), 96)):
            number = text_arms.num_basis(model, layers, share)
            assert number == expected
            assert 2 * number * 2 * (layers or 30) == share * lora
    assert lora == 30 * (576 + 576 + 576 + 192)


@pytest.mark.parametrize(
    ("width", "layers", "share", "numbers"),
    [(1024, 24, Fraction(1), 98_304), (1280, 36, Fraction(4, 5), 147_456), (1280, 36, Fraction(1, 5), 36_864)],
)
def test_in_gpt2_they_are_the_numbers_of_the_papers_tables(width, layers, share, numbers):
    """LoRA of rank 1 has 98,304 in GPT-2 M; the paper's rows of GPT-2 L are 0.144M and 0.036M (released: k = 256)."""
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=width, n_layer=layers, n_head=width // 64)
    assert 2 * 2 * layers * text_arms.num_basis(on_meta(config, GPT2LMHeadModel), 0, share) == numbers


@pytest.mark.parametrize("arm", ["", "nola", "lora 0", "lora 1/2", "full 1", "nola 1/0", "nola 0", "adapter 1"])
def test_an_arm_that_is_not_written_so_is_refused(section, arm):
    with pytest.raises(ValueError, match="received arm"):
        dataclasses.replace(section, arms=(arm,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split_sizes": (1, 2)}, "expected 3"),
        ({"columns": ("a",)}, "expected 2"),
        ({"learning_rates": ()}, "at least one"),
        ({"learning_rates": (0.1, 0.0)}, "above 0"),
        ({"steps": 0}, "above 0"),
    ],
)
def test_what_no_type_can_tell_is_checked(section, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(section, **changes)


def test_layers_that_cannot_be_run_alone_are_refused(section):
    data = text_data.prepare(section)
    model = language_models.load(section.model, data.tokenizer, seed=0)
    with pytest.raises(ValueError, match="expected 1 to 2, or 0"):
        text_bottom.states(model, [(1, 2)], 3, torch.float32)
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match=r"like Llama's"):
        text_bottom.states(GPT2LMHeadModel(config), [(1, 2)], 1, torch.float32)
    with pytest.raises(ValueError, match="at least one basis"):
        text_arms.num_basis(model, 1, Fraction(1, 1000))


def test_loras_first_factor_is_drawn_by_the_seed_within_peft_s_bound(section):
    drawn = []
    for seed in (0, 0, 1):
        data = text_data.prepare(section)
        model = language_models.load(section.model, data.tokenizer, seed=0)
        text_arms.attach(model, text_arms.read("lora 2"), layers=2, seed=seed, **OPTIONS)
        drawn.append(torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name]))
        assert all((p == 0).all() for name, p in model.named_parameters() if "lora_B" in name)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    bound = 32**-0.5
    assert 0.9 * bound < drawn[0].abs().max() <= bound


def test_what_is_stored_grows_by_four_bytes_a_number(section):
    stored = {}
    for arm in ("none", "lora 1", "lora 4", "nola 1", "nola 1/2"):
        found = subject(section, arm)
        stored[arm] = (found.stored(), sum(p.numel() for p in found.parameters.values()))
    assert stored["none"] == (0, 0)
    for small, large in (("lora 1", "lora 4"), ("nola 1/2", "nola 1")):
        more = stored[large][0] - stored[small][0]
        # A header of JSON is padded to 8 bytes, and spells larger sizes with more digits.
        assert more == pytest.approx(4 * (stored[large][1] - stored[small][1]), abs=128)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table_text_full", "table_text_second", "table_instruction"])
def test_the_other_tables_run_with_their_own_rows(name, tmp_path):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    section = smoke(name, learning_rates=(0.01,))
    found = cells.run_all(TABLES[name], section, tmp_path)
    runs = [run for run in found if run["cell"]["phase"] == "final"]
    assert [run["cell"]["arm"] for run in runs] == [text_arms.spelled(arm) for arm in section.arms]
    scored = {"test/accuracy"} if section.instruction else {"test/bleu", "test/rouge_l", "test/slot_errors"}
    assert all(LOSSES | scored <= run["metrics"].keys() for run in runs)


@pytest.mark.slow
def test_the_papers_architecture_runs_from_a_folder_on_a_data_set_like_e2e(tmp_path):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    rows = [
        {"meaning_representation": f"name[{name}], area[{area}]", "human_reference": f"{said} {name} {area} ."}
        for name in "abcdefgh"
        for area in ("riverside", "centre")
        for said in ("Try", "There is")
    ]
    (tmp_path / "e2e").mkdir()
    (tmp_path / "e2e" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"{row['meaning_representation']} Text: {row['human_reference']}" for row in rows]
    tokenizer = language_models.load_tokenizer("llama-1x16", words)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    committed = params.load("nola", "table_text_full", "paper", table_text_full.Params)
    small = {"model": str(tmp_path / "gpt2"), "data": str(tmp_path / "e2e"), "split_sizes": (-1, 3, 4), "longest": 6}
    small |= {"selection_steps": 1, "steps": 2, "learning_rates": (0.01,)}
    arms = (*committed.arms, "none", "vera 4")
    found = cells.run_all(table_text_full, dataclasses.replace(committed, arms=arms, **small), tmp_path / "runs")
    numbers = {run["cell"]["arm"]: run["trainable_parameters"] for run in found if run["cell"]["phase"] == "final"}
    assert numbers["lora_1"] == 2 * 4 * 32
    assert numbers["lora_4"] == 4 * numbers["lora_1"]
    assert numbers["nola_4_5"] == 2 * 4 * int(32 * 4 / 5)
    assert numbers["vera_4"] == 2 * (3 * 32 + 4)
    for run in (run for run in found if run["cell"]["phase"] == "final"):
        assert LOSSES | {"test/bleu", "test/rouge_l"} <= run["metrics"].keys()
        assert "test/slot_errors" not in run["metrics"]
    trained = cells.pick(found, phase="final", arm="full")["metrics"]
    assert trained["train/loss"] < cells.pick(found, phase="final", arm="none")["metrics"]["train/loss"]
