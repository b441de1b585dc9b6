"""The comparison on text, whole, on its smoke section, and on a GPT-2 and texts from folders as in the paper's."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import cells
from limbeck import params
from limbeck.experiments.nola import arms, comparison, frozen_decoder
from limbeck.experiments.nola import texts as text_loss
from limbeck.experiments.nola.frozen_decoder import FrozenDecoder
from limbeck.models import language

SCORES = {"train/loss", "validation/loss", "test/bleu", "test/rouge_l", "storage/parameters", "storage/bytes"}


@pytest.fixture(scope="module")
def section():
    return params.load("nola", "table_text", "smoke", comparison.Params)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return cells.run_all(comparison, section, folder, seeds=(0, 1)), folder


def test_every_arm_has_its_scores_and_the_rate_of_lowest_validation_loss(ran, section):
    found, _ = ran
    final = [run for run in found if run["cell"]["phase"] == "final"]
    assert sorted((run["cell"]["arm"], run["cell"]["seed"]) for run in final) == sorted(
        (arm, seed) for arm in section.arms for seed in (0, 1)
    )
    for run in final:
        arm, metrics = run["cell"]["arm"], run["metrics"]
        assert set(metrics) == SCORES | {"test/slot_error_rate"} | ({"chosen/rate"} if arm != "none" else set())
        assert metrics["storage/parameters"] == run["trainable_parameters"]
        tried = [other for other in found if other["cell"].items() >= {"phase": "selection", "arm": arm}.items()]
        assert len(tried) == len(section.rates(arm))
        losses = {other["metrics"]["validation/loss"]: other["cell"]["rate"] for other in tried}
        assert arm == "none" or metrics["chosen/rate"] == losses[min(losses)]


def test_all_arms_of_a_seed_meet_the_same_texts_in_the_same_order(ran):
    found, _ = ran
    for seed in (0, 1):
        trained = [run["curve"]["loss/ce"][0] for run in found if run["curve"] and run["cell"]["seed"] == seed]
        assert max(trained) - min(trained) < 1e-5, "adapters start at the base"
    first, second = (cells.pick(found, phase="final", arm="none", seed=seed)["metrics"] for seed in (0, 1))
    assert first["train/loss"] != second["train/loss"]


def test_without_an_adapter_only_the_last_texts_differ_between_seeds(ran, section):
    found, folder = ran
    first, second = (cells.pick(found, phase="final", arm="none", seed=seed)["metrics"] for seed in (0, 1))
    assert {name for name in first if first[name] != second[name]} == {"train/loss"}
    bench = FrozenDecoder(section.texts, cells.place(folder, "again"))
    assert first["validation/loss"] == pytest.approx(
        text_loss.mean_loss(bench.load(), bench.texts["validation"], torch.float32)
    )
    texts = bench.texts["train"]
    for seed, metrics in enumerate((first, second)):
        *_, last = frozen_decoder.batches(
            texts.pairs, size=section.loop.batch_size, steps=section.loop.steps, seed=seed
        )
        expected = text_loss.mean_loss(bench.load(), texts.rows(last.tolist()), torch.float32)
        assert metrics["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_that_was_killed_ends_in_the_same_bits(ran, section):
    found, folder = ran
    wanted = {"phase": "final", "arm": "nola", "seed": 1}
    (cell,) = [cell for cell in comparison.cells(section, (0, 1)) if cell.coordinates == wanted]
    place = cells.place(folder, "killed", found)
    assert cells.drive(comparison, section, cell, place, kill_at=2) is None
    again = cells.drive(comparison, section, cell, place)
    assert (again.metrics, again.curve) == tuple(cells.pick(found, **wanted)[key] for key in ("metrics", "curve"))


def test_a_method_that_learns_for_long_beats_the_base_on_both_losses(section, tmp_path):
    long = cells.changed(section, arms=("none", "nola"), steps=40, save_every=10, selection_steps=2, replicates=1)
    found = cells.run_all(comparison, long, tmp_path)
    base, nola = (cells.pick(found, phase="final", arm=arm)["metrics"] for arm in ("none", "nola"))
    assert nola["validation/loss"] < base["validation/loss"] - 0.05
    assert nola["train/loss"] < base["train/loss"] - 0.05


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The paper's section on a GPT-2 and a data set from folders."""
    folder = tmp_path_factory.mktemp("own")
    words = [f"{a} {b}" for a in ("red", "blue", "old", "new") for b in ("inn", "pub", "bar")]
    for part, number in (("train", 12), ("validation", 2), ("test", 3)):
        rows = [{"meaning": f"name[{word}]", "texts": [f"the {word} .", f"a {word}"]} for word in words[:number]]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = language.load_tokenizer("llama-1x16", [f"name [ {word} ] text : the a ." for word in words] * 2)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    small = {"model": str(folder / "model"), "data": str(folder), "steps": 2, "selection_steps": 1, "batch_size": 4}
    committed = params.load("nola", "table_text", "paper", comparison.Params)
    return cells.changed(committed, **small, longest=8, replicates=1, save_every=1, nola_rank=2)


def test_labels_are_smoothed_and_beams_are_as_many_as_the_section_says(own, tmp_path, monkeypatch):
    values, scores, train_loss = [], FrozenDecoder.test_scores, FrozenDecoder.train_loss

    def scored(self, model, beams):
        values.append(beams)
        return scores(self, model, beams)

    def smoothed(self, model, **options):
        values.extend(options.values())
        return train_loss(self, model, **options)

    monkeypatch.setattr(FrozenDecoder, "test_scores", scored)
    monkeypatch.setattr(FrozenDecoder, "train_loss", smoothed)
    cells.run_all(comparison, cells.changed(own, arms=("none", "nola")), tmp_path)
    assert set(values) == {own.smoothing, own.beams} == {0.1, 10}


def test_the_papers_section_runs_on_a_gpt2_and_texts_from_folders(own, tmp_path):
    found = cells.run_all(comparison, own, tmp_path)
    final = {run["cell"]["arm"]: run for run in found if run["cell"]["phase"] == "final"}
    assert set(final) == set(own.arms)
    assert all(set(run["metrics"]) - {"chosen/rate"} == SCORES for run in final.values())
    count = {arm: run["trainable_parameters"] for arm, run in final.items()}
    assert count["lora_1"] == count["nola"] == 2 * count["nola_half"] == 2 * 2 * 32
    assert count["lora_4"] == 4 * count["lora_1"]


def test_all_rows_run_where_all_layers_are_adapted(tmp_path):
    section = params.load("nola", "table_text_full", "smoke", comparison.Params)
    section = cells.changed(section, replicates=1)
    found = cells.run_all(comparison, section, tmp_path)
    assert {run["cell"]["phase"] for run in found} == {"selection", "final"}
    final = {run["cell"]["arm"]: run["metrics"] for run in found if run["cell"]["phase"] == "final"}
    assert set(final) == set(arms.ARMS)
    assert final["full"]["storage/bytes"] > 10 * final["lora_4"]["storage/bytes"] > 10 * final["nola"]["storage/bytes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("none", "pranc")}, "arm must be one of none, full, lora_4"),
        ({"nola_rates": (0.1,)}, "'nola': 1, 'full': 2} learning rates, expected as many for each method"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"references": 0}, "references must be above 0, got 0"),
        ({"nola_scale": 0.0}, "nola_scale must be above 0, got 0.0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(section, **change)


def test_too_few_seeds_are_refused(section):
    with pytest.raises(ValueError, match=r"received the seeds \(0,\), expected at least 2"):
        comparison.cells(section, (0,))
