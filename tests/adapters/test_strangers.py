"""An adapter from a stranger executes nothing, writes nowhere else, and allocates no more than its host is large."""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import tiny_hosts
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from limbeck.adapters import NolaConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    tiny_hosts.perturb(tiny_hosts.adapted("llama")).save_pretrained(str(folder))
    return folder


def changed(saved, tmp_path, **config):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return tmp_path


def load(folder, **options):
    return PeftModel.from_pretrained(tiny_hosts.host("llama"), str(folder), **options)


CLAIMS = {
    "r": [10**9, 10**30, "3", 3.0, [3], None],
    "num_basis": [10**9, [10**9, 5], [5, 10**18], "7", {"a": 1}, [[7], [5]]],
    "nola_alpha": [1e308, 10**400, "8", None, True],
    "basis_seed": [2**64, "0", None],
    "init": [5, ["noop"], None],
    "share_basis": ["false", 0, None],
    "save_basis": ["yes", 1],
    "inference_mode": ["no"],
    "basis_distribution": [["uniform"], None],
    "target_modules": [5, [5], "[", "", ["../q_proj"]],
    "exclude_modules": [5, [5], "(", ["nowhere"]],
    "modules_to_save": [5, "lm_head", [5], ["../head"]],
    "layers_to_transform": ["0", [True], [-1], {"a": 1}, 7],
    "layers_pattern": [5, [5]],
    "fused_slices": [[["q_proj", "q"]], {"q_proj": 5}, {"q_proj": [["q"]]}, {"q_proj": []}],
    "quant_bits": [True, "4", 5],
    "chunk_size": [0, "64", 1.5],
    "cache_bytes": [-1, "1", 1.5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CLAIMS.items() for value in values])
def test_a_config_that_claims_anything_is_refused_with_what_it_claims(saved, tmp_path, name, value, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no checks of types
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="received"):
        load(changed(saved, tmp_path, **{name: value}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.parametrize(
    "options", [{"r": 1025}, {"num_basis": 2**16 + 1}, {"num_basis": (5, 2**16 + 1)}, {"r": 2**60, "num_basis": 2**60}]
)
def test_more_than_a_layer_has_use_for_is_refused_before_it_is_allocated(options):
    host = tiny_hosts.host("llama")
    with pytest.raises(
        ValueError, match=r"received r .* for model.layers.0.* of 12 inputs and 12 outputs, expected at"
    ):
        tiny_hosts.get_peft_model(host, NolaConfig(target_modules=["q_proj"], **options))
    tiny_hosts.adapted("llama", r=1024, num_basis=12 * 1024)


NAMES = ["../evil", "a/b", "/tmp/evil", "a\\b", "..", ".", "", "a\0b", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_a_path_is_refused(saved, name):
    with pytest.raises(ValueError, match="received adapter name"):
        load(saved, adapter_name=name)
    model = tiny_hosts.adapted("llama")
    with pytest.raises(ValueError, match="received adapter name"):
        model.add_adapter(name, tiny_hosts.config("llama"))


ORIGIN = {"seed": torch.zeros(3, dtype=torch.int64), "generator": torch.full((4,), 999), "checksum": torch.zeros(32)}


@pytest.mark.parametrize("entry", ORIGIN)
def test_an_origin_of_another_kind_is_refused(saved, tmp_path, entry):
    folder = changed(saved, tmp_path)
    state = load_file(folder / "adapter_model.safetensors")
    (key,) = [key for key in state if key.endswith(f"nola_{entry}")]
    for value in (ORIGIN[entry], torch.tensor(3.5), torch.full((7,), 255, dtype=torch.uint8)):
        save_file(state | {key: value}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=rf"received an adapter with the .*{entry}"):
            load(folder)


CODE = """
import builtins, os, sys, tiny_hosts, torch
from peft import PeftModel
import limbeck.adapters
host = tiny_hosts.host("llama")
armed = []
def hook(event, args):
    if armed and (event in ("exec", "os.system", "subprocess.Popen", "pickle.find_class", "os.remove", "os.rename")
                  or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))):
        print("EVENT", event, args, flush=True)
PeftModel.from_pretrained(tiny_hosts.host("llama"), sys.argv[1])  # what is imported at the first use
sys.addaudithook(hook)
armed.append(1)
with torch.no_grad():
    tiny_hosts.outputs("llama", PeftModel.from_pretrained(host, sys.argv[1]))
armed.clear()
print("LOADED")
"""


def test_loading_executes_unpickles_and_writes_nothing(saved):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})" + CODE
    run = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert "LOADED" in run.stdout
    assert "EVENT" not in run.stdout


OPTIONS = {"plain": {}, "three bits": {"quant_bits": 3}, "with bases": {"save_basis": True}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_of_a_damaged_file_no_number_is_computed(tmp_path, options):
    """Truncated, emptied, or with one bit flipped anywhere: an error, or the same numbers to the bit."""
    model = tiny_hosts.perturb(tiny_hosts.adapted("mlp", modules_to_save=None, **options))
    model.save_pretrained(str(tmp_path))
    expected, source = model(torch.ones(4, 6)), random.Random(0)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        file = tmp_path / name
        whole, refused = file.read_bytes(), 0
        places = range(len(whole)) if len(whole) < 200 else source.sample(range(len(whole)), 40)
        flipped = [whole[:i] + bytes([whole[i] ^ 1 << source.randrange(8)]) + whole[i + 1 :] for i in places]
        for damaged in [b"", whole[:7], whole[: len(whole) // 2], whole[:-1], *flipped]:
            file.write_bytes(damaged)
            try:
                read = PeftModel.from_pretrained(tiny_hosts.host("mlp"), str(tmp_path))
            except (ValueError, SafetensorError, KeyError, TypeError):  # PEFT's own where it reads first
                refused += 1
            else:
                assert torch.equal(read(torch.ones(4, 6)), expected)
        file.write_bytes(whole)
        assert refused > 20


def test_every_coefficient_and_every_setting_is_covered(saved, tmp_path):
    folder = changed(saved, tmp_path)
    state = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in state if "coefficients" in key]:
        other = state[key].clone()
        other.view(torch.int32)[0, -1] ^= 1
        save_file(state | {key: other}, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="received an adapter with the digest of its numbers"):
            load(folder)
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"digest of its numbers .*digest: null there skips this"):
        load(changed(saved, folder, nola_alpha=9))
    load(changed(saved, folder, nola_alpha=9, digest=None))


def test_files_of_two_adapters_are_not_mixed(saved, tmp_path):
    tiny_hosts.perturb(tiny_hosts.adapted("llama"), seed=1).save_pretrained(str(tmp_path / "other"))
    name = "adapter_model.safetensors"
    mixed = changed(saved, tmp_path)
    (mixed / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ValueError, match="digest of its numbers"):
        load(mixed)


def test_numbers_set_into_a_loaded_model_are_not_held_against_its_file(saved):
    model, other = load(saved), tiny_hosts.perturb(tiny_hosts.adapted("llama"), seed=1)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(tiny_hosts.outputs("llama", model), tiny_hosts.outputs("llama", other))
