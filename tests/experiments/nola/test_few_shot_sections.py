"""The committed sections of the few-shot tables: their budgets, their claims, and the paper's on a tiny ViT."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import cells
from limbeck import models, params
from limbeck.exhibits import claims
from limbeck.experiments.nola import few_shot
from limbeck.models import vision

EXPERIMENTS = ("table_vision", "table_vision_full")


def load(name, profile):
    return params.load("nola", name, profile, few_shot.Params)


def test_the_default_has_the_papers_rows_with_twelve_runs_each_and_three_rates_an_arm():
    made = few_shot.cells(load("table_vision", "default"), (0, 1, 2, 3, 4))
    final = Counter(cell.coordinates["arm"] for cell in made if cell.coordinates["phase"] == "final")
    assert final == dict.fromkeys(("nearest", "linear", "full", "lora_4", "lora_1", "nola", "nola_half"), 12)
    pairs = [(c.coordinates["subset"], c.coordinates["seed"]) for c in made if c.coordinates.get("arm") == "nola"]
    assert {pair for pair in pairs if pair[1] < 100} == {(subset, seed) for subset in range(4) for seed in range(3)}
    tried = Counter(cell.coordinates["arm"] for cell in made if cell.coordinates["phase"] == "select")
    assert tried == dict.fromkeys(("linear", "full", "lora_4", "lora_1", "nola", "nola_half"), 6)
    assert [cell.wave for cell in made] == sorted(cell.wave for cell in made)


def test_the_default_model_gives_nola_exactly_the_budget_of_lora_of_rank_1_and_half_of_it():
    section = load("table_vision", "default")
    counts = {}
    for arm in ("lora_4", "lora_1", "nola", "nola_half"):
        model = vision.load(section.models[0], classes=5, seed=0)
        counts[arm] = vision.attach(model, arm, rank=section.rank, seed=0)
    assert counts == {"lora_4": 8192, "lora_1": 2048, "nola": 2048, "nola_half": 1024}


def test_vit_large_has_the_papers_counts():
    config = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    for arm, thousands in (("lora_4", 375), ("lora_1", 94), ("nola", 94), ("nola_half", 47)):
        with torch.device("meta"):
            model = ViTForImageClassification(config)
        count = vision.attach(model, arm, rank=1, seed=0)
        head = sum(parameter.numel() for parameter in vision.head_of(model).parameters())
        assert sum(parameter.numel() for parameter in models.trainable(model).values()) == count + head
        assert round(count / 2**20 * 1000) == thousands


@pytest.mark.parametrize(("name", "profile"), [("table_vision", "default"), ("table_vision_full", "full")])
def test_every_claim_but_one_names_cells_that_are_run(name, profile):
    made = [cell.coordinates for cell in few_shot.cells(load(name, profile), range(5))]
    final = [at for at in made if at["phase"] == "final"]
    missing = []
    for claim in (claim for claim in claims.load("nola") if claim.exhibit == name):
        for side in ("left", "right"):
            if not any(claim.rule[side].items() <= at.items() for at in final):
                missing.append(claim.id)
    assert set(missing) == ({"vision-fashion"} if profile == "full" else set())


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A ViT as `save_pretrained` leaves it, and a data set of two bright and dark classes in folders."""
    folder = tmp_path_factory.mktemp("local")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    source = np.random.Generator(np.random.Philox(0))
    for part, count in (("train", 9), ("val", 4)):
        for name, low in (("dark", 0), ("light", 160)):
            (folder / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = source.integers(low, low + 96, (24, 30, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "data" / part / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_papers_section_runs_on_a_vit_and_pictures_from_folders_with_the_same_columns(local, tmp_path, name):
    committed = load(name, "paper")
    assert not any(map(vision.drawn, committed.models))
    assert committed.initialisations == 3
    assert set(committed.subsets) == {4}
    small = {"models": (str(local / "vit"),), "targets": (f"folder/{local / 'data'}",), "shots": (3,), "subsets": (1,)}
    small |= {"epochs": (4,), "side": 16, "reserved": 5, "selection_subsets": 1, "initialisations": 1, "batch": 4}
    section = cells.changed(
        committed, **small, linear_rates=(1e-1,), full_rates=(1e-2,), lora_rates=(1e-1,), nola_rates=(1e-1,)
    )
    found = cells.run_all(few_shot, section, tmp_path)
    assert {run["cell"]["phase"] for run in found} == {"select", "final"}
    assert ":" not in found[0]["cell"]["model"]
    assert "/" not in found[0]["cell"]["target"]
    final = {run["cell"]["arm"]: run["metrics"] for run in found if run["cell"]["phase"] == "final"}
    assert set(final) == set(committed.arms)
    columns = {"test/accuracy", "test/loss", "train/loss", "train/rate", "adapter/parameters"}
    for arm, metrics in final.items():
        assert set(metrics) == ({"test/accuracy", "adapter/parameters"} if arm == "nearest" else columns)
        assert metrics["test/accuracy"] * 8 == pytest.approx(round(metrics["test/accuracy"] * 8)), "eight held images"
    assert final["full"]["test/accuracy"] == 1
