import dataclasses
import json

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

import cells
from limbeck import params
from limbeck.experiments.nola import storage

SECTION = params.load("nola", "table_storage", "smoke", storage.Params)
GPT2, VIT = [(1024, 1024)] * 48, [(1024, 4096), (4096, 1024)] * 24


def llama(layers, width, inner, narrow):
    """Rows and columns of q, k, v, o, gate, up and down of every layer."""
    attention = [(width, width), (width, narrow), (width, narrow), (width, width)]
    return layers * [*attention, (width, inner), (width, inner), (inner, width)]


MATRICES = {  # what NOLA adapts
    "gpt2_m": GPT2,
    "gpt2_l": [(1280, 1280)] * 72,
    "llama2_7b": llama(32, 4096, 11008, 4096),
    "llama2_13b": llama(40, 5120, 13824, 5120),
    "llama2_70b": llama(80, 8192, 28672, 1024),
    "vit_l": VIT,
}


@pytest.mark.parametrize("model", MATRICES)
def test_nola_counts_k_and_l_of_each_matrix_and_lora_its_rows_and_columns(model):
    at = {"model": model, "arm": "nola", "basis": 16, "bits": 32}
    count = storage.sizes(storage.attached(model, storage.config(at, SECTION)))["count/trainable"]
    assert count == 2 * 16 * len(MATRICES[model])
    lora = storage.config(at | {"arm": "lora_1"}, SECTION)
    adapted = {"gpt2_m": [(1024, 3072)] * 24, "gpt2_l": [(1280, 3840)] * 36, "vit_l": [(1024, 1024)] * 48}
    expected = sum(rows + cols for rows, cols in adapted.get(model, MATRICES[model]))
    assert storage.sizes(storage.attached(model, lora))["count/trainable"] == expected


@pytest.mark.parametrize("row", ["tiny lora_4", "tiny lora_1", "tiny vera", "tiny nola 8 32", "tiny nola 8 3"])
def test_an_adapter_of_a_model_with_weights_takes_the_same_bytes(row, monkeypatch, tmp_path):
    monkeypatch.setitem(storage.MODELS, "tiny", lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=12, n_head=2)))
    at = storage._coordinates(row)
    section = dataclasses.replace(SECTION, vera_rank=3)
    adapter = storage.config({**at, "model": "gpt2_tiny"}, section)
    found = storage.sizes(storage.attached("tiny", adapter))
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(storage.MODELS["tiny"](), adapter)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    assert found["disk/weights"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found["disk/config"] == (tmp_path / "adapter_config.json").stat().st_size
    assert found["disk/bytes"] == found["disk/weights"] + found["disk/config"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Row of the smoke section -> its metrics."""
    runs = cells.run_all(storage, SECTION, tmp_path_factory.mktemp("storage"))
    return {(run["cell"]["arm"], run["cell"]["bits"]): run["metrics"] for run in runs}


def test_a_file_of_nola_has_its_numbers_and_little_else(found):
    for bits, each in ((32, 4), (8, 1), (4, 0.5)):
        beyond = found["nola", bits]["disk/weights"] - 49152 * each
        assert found["nola", bits]["disk/beyond"] == beyond
        assert 0 < beyond < 16384
    assert found["nola", 8]["disk/weights"] - found["nola", 4]["disk/weights"] == pytest.approx(49152 / 2, abs=100)


def test_ratios_are_those_to_lora_of_rank_1(found):
    one, nola = found["lora_1", 32], found["nola", 4]
    assert "ratio/count" not in one
    assert nola["ratio/count"] == 98304 / 49152
    assert nola["ratio/bytes"] == one["disk/bytes"] / nola["disk/bytes"]
    assert nola["ratio/kept"] == pytest.approx(nola["ratio/bytes"] / 16)
    assert found["lora_4", 32]["ratio/count"] == 1 / 4


def test_a_fleet_is_so_many_files(found):
    nola = found["nola", 8]
    assert nola["fleet/gigabytes"] == pytest.approx(10000 * nola["disk/bytes"] / 1e9)
    assert nola["fleet/numbers"] == pytest.approx(10000 * 49152 / 1e9)
    assert nola["fleet/variants"] * nola["disk/bytes"] <= 48e9 < (nola["fleet/variants"] + 1) * nola["disk/bytes"]


def test_what_is_saved_of_nola_is_packed_numbers_by_module(tmp_path):
    at = {"model": "gpt2_m", "arm": "nola", "basis": 10, "bits": 4}
    storage.attached("gpt2_m", storage.config(at, SECTION)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if "coefficients" in key}  # noqa: SIM118
    assert set(shapes.values()) == {(2, 18)}  # alpha and beta of q and v: 2 x 5 bytes each, and a scale of 4 for each
    assert len(shapes) == 24
    assert json.loads((tmp_path / "adapter_config.json").read_text())["quant_bits"] == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("gpt2_m vera",), "expected gpt2_m lora_1 too"),
        (("gpt2_m lora_1", "gpt2_m nola 512"), "received the row 'gpt2_m nola 512'"),
        (("gpt2_m lora_1", "gpt2_m lora_2"), "arm must be one of"),
        (("gpt3 lora_1",), "model must be one of"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SECTION, rows=rows)
