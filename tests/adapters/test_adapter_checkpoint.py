"""Files: small, exact in another process, and refused where anything differs from what the model expects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_hosts
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from limbeck.adapters import NolaConfig, basis
from limbeck.adapters.basis import Stream

ROOT = "base_model.model.nola_"
FRESH = """
import sys, random, numpy, torch
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
random.seed(9), numpy.random.seed(9), torch.manual_seed(9), torch.rand(5)
import limbeck.adapters, tiny_hosts
from peft import PeftModel
for name, folder in {saved!r}.items():
    model = PeftModel.from_pretrained(tiny_hosts.host(name), folder)
    torch.rand(3)
    with torch.no_grad():
        torch.save(tiny_hosts.outputs(name, model), folder + "/found.pt")
"""


def outputs(name, model):
    with torch.no_grad():
        return tiny_hosts.outputs(name, model)


def trained(name, **options):
    return tiny_hosts.perturb(tiny_hosts.adapted(name, **options))


VARIANTS = {
    "default": {},
    "unique and streamed": {"share_basis": False, "cache_bytes": 0, "chunk_size": 2},
    "mean and normal": {"init": "mean", "basis_distribution": "normal", "basis_seed": 77},
    "rademacher": {"basis_distribution": "rademacher", "num_basis": 4},
    "three bits": {"quant_bits": 3},
    "eight bits": {"quant_bits": 8, "init": "mean"},
    "with bases": {"save_basis": True, "share_basis": False},
}


@pytest.mark.slow
def test_another_process_with_other_generators_gives_the_same_bits(tmp_path):
    """After training, as a start at zero would hide a lost coefficient (PEFT 3310); every number is another."""
    saved, expected = {}, {}
    for name in tiny_hosts.HOSTS:
        saved[name] = str(tmp_path / name)
        model = trained(name, basis_seed=5)
        model.save_pretrained(saved[name])
        expected[name] = outputs(name, model)
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", FRESH.format(here=here, saved=saved)], check=True)
    for name, folder in saved.items():
        assert torch.equal(torch.load(f"{folder}/found.pt"), expected[name]), name


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_loaded_adapter_computes_the_same_bits(name, options, tmp_path):
    model = trained(name, **options)
    computed = outputs(name, model)
    for _ in range(2):  # again from what was loaded
        model.save_pretrained(str(tmp_path))
        torch.rand(3)
        model = PeftModel.from_pretrained(tiny_hosts.host(name), str(tmp_path), is_trainable=True)
        assert torch.equal(outputs(name, model), computed)
    assert (computed - outputs(name, tiny_hosts.host(name))).abs().max() > 1e-3


def test_the_file_holds_coefficients_and_their_origin_alone(tmp_path):
    trained("gpt2").save_pretrained(str(tmp_path))
    state = load_file(tmp_path / "adapter_model.safetensors")
    layers = {
        f"base_model.model.transformer.h.{i}.{name}.nola_coefficients.{part}": (rows, number)
        for i in range(2)
        for name, rows in {"attn.c_attn": 2, "mlp.c_fc": 1}.items()
        for part, number in {"a": 7, "b": 5}.items()
    }
    assert {key: tuple(value.shape) for key, value in state.items() if not key.startswith(ROOT)} == layers
    assert {key for key in state if key.startswith(ROOT)} == {
        f"{ROOT}{name}" for name in ("seed", "generator", "checksum")
    }
    assert state[f"{ROOT}seed"].tolist() == [0]
    assert bytes(state[f"{ROOT}generator"].tolist()).decode() == basis.GENERATOR


class Wide(nn.Module):
    """48 matrices, with names as long as those of GPT-2."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleList(
            nn.ModuleDict({"attention": nn.ModuleDict({n: nn.Linear(8, 8) for n in ("query", "value")})})
            for _ in range(24)
        )


@pytest.mark.parametrize(("bits", "bytes_each"), [(None, 4), (8, 1), (4, 0.5), (3, 3 / 8), (2, 0.25)])
def test_the_file_has_the_size_of_the_coefficients_and_little_more(bits, bytes_each, tmp_path):
    config = NolaConfig(r=2, num_basis=512, target_modules=["query", "value"], quant_bits=bits)
    model = tiny_hosts.perturb(get_peft_model(Wide(), config))
    assert model.get_nb_trainable_parameters()[0] == 48 * 1024
    model.save_pretrained(str(tmp_path))
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 49_152 * bytes_each < size <= 49_152 * bytes_each + 16 * 1024


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of the tiny Llama, and what its file holds."""
    trained("llama").save_pretrained(str(tmp_path))
    return tmp_path, load_file(tmp_path / "adapter_model.safetensors")


def load(folder, state=None, name="llama", host=None, **config):
    if state is not None:
        save_file(state, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return PeftModel.from_pretrained(tiny_hosts.host(name) if host is None else host, str(folder))


COEFFICIENTS = "model.layers.1.self_attn.q_proj.nola_coefficients.b"


def test_a_missing_and_an_unexpected_key_are_refused(saved):
    folder, state = saved
    whole = f"base_model.model.{COEFFICIENTS}"
    lost = {key: value for key, value in state.items() if key != whole}
    with pytest.raises(ValueError, match=rf"without \['{COEFFICIENTS}'\] and with \[\], expected"):
        load(folder, lost)
    extra = "model.layers.1.self_attn.o_proj.nola_coefficients.b"
    with pytest.raises(ValueError, match=rf"without \[\] and with \['{extra}'\], expected"):
        load(folder, state | {f"base_model.model.{extra}": state[whole].clone()})
    with pytest.raises(ValueError, match=r"with \['lora'\]"):
        load(folder, state | {"base_model.model.lora": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"without .*k_proj.nola_coefficients.b'\] and with \[.*q_proj"):
        load(folder, state, target_modules=["k_proj", "v_proj", "down_proj"], basis_checksum=None)


def test_another_shape_is_refused(saved):
    folder, state = saved
    whole = f"base_model.model.{COEFFICIENTS}"
    with pytest.raises(ValueError, match=rf"shape of {COEFFICIENTS} \(1, 4\), expected \(1, 5\)"):
        load(folder, state | {whole: state[whole][:, :4].contiguous()})
    with pytest.raises(ValueError, match=r"shape of .*a \(1, 7\), expected \(1, 8\)"):
        load(folder, state, num_basis=[8, 5])


def test_another_seed_generator_or_basis_is_refused(saved, monkeypatch):
    folder, state = saved
    with pytest.raises(ValueError, match="checksum of its bases"):
        load(folder, state, basis_seed=1)
    with pytest.raises(ValueError, match="with the seed 0, expected 1"):
        load(folder, state, basis_seed=1, basis_checksum=None)
    with pytest.raises(ValueError, match="with the seed 1, expected 0"):
        load(folder, state | {f"{ROOT}seed": torch.tensor([1])}, basis_seed=0)
    both = state | {f"{ROOT}seed": torch.tensor([1])}
    for change in ({"basis_seed": 1}, {"basis_seed": 1, "share_basis": False}):
        with pytest.raises(ValueError, match=r"checksum of its bases [0-9a-f]{64}, expected [0-9a-f]{64}"):
            load(folder, both, **change)
    for change in ({"basis_distribution": "normal"}, {"r": 2}, {"share_basis": False}, {"init": "mean"}):
        with pytest.raises(ValueError, match="checksum of its bases"):
            load(folder, state, basis_seed=0, **change)
        json_file = folder / "adapter_config.json"
        json_file.write_text(json.dumps(json.loads(json_file.read_text()) | {
            "basis_distribution": "uniform", "r": 3, "share_basis": True, "init": "noop"}))  # fmt: skip
    load(folder, state)
    older = "philox4x64-10, 16 bits a value, 0"
    with pytest.raises(ValueError, match=f"generator {older}, expected {basis.GENERATOR}"):
        load(folder, state | {f"{ROOT}generator": torch.tensor(list(older.encode()), dtype=torch.uint8)})
    draw = Stream.draw
    monkeypatch.setattr(Stream, "draw", lambda *args: draw(*args) * 1.0001)
    with pytest.raises(ValueError, match="checksum of its bases"):
        load(folder, state)


def test_a_host_of_another_width_is_refused_though_the_coefficients_would_fit(saved):
    folder, state = saved
    host = tiny_hosts.host("llama")
    for layer in host.model.layers:
        layer.self_attn.q_proj = nn.Linear(12, 18)
    with pytest.raises(ValueError, match="checksum of its bases"):
        load(folder, state, host=host)
    folder.joinpath("unique").mkdir()
    trained("llama", share_basis=False).save_pretrained(str(folder / "unique"))
    with pytest.raises(ValueError, match="checksum of its bases"):
        load(folder / "unique", host=host)


def test_saved_bases_make_the_generator_unimportant(tmp_path, monkeypatch):
    model = trained("llama", save_basis=True)
    computed = outputs("llama", model)
    model.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert tuple(state[f"{ROOT}basis.12x3.A"].shape) == (7, 36)
    assert tuple(state[f"{ROOT}basis.20x3.A0"].shape) == (1, 60)
    monkeypatch.setattr(Stream, "draw", lambda *_: pytest.fail("drawn"))
    read = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(tmp_path))
    assert torch.equal(outputs("llama", read), computed)
    read.save_pretrained(str(tmp_path / "again"))
    damaged = state | {f"{ROOT}basis.12x3.A": state[f"{ROOT}basis.12x3.A"] + 1}
    with pytest.raises(ValueError, match="checksum of its bases"):
        load(tmp_path, damaged)
    short = state | {f"{ROOT}basis.12x3.A": state[f"{ROOT}basis.12x3.A"][:6].clone()}
    with pytest.raises(ValueError, match=r"shape of .*basis\.12x3\.A \(6, 36\), expected \(7, 36\)"):
        load(tmp_path, short)
    lost = {key: value for key, value in state.items() if "basis.12x3.A" not in key}
    with pytest.raises(ValueError, match=r"without .*basis\.12x3\.A'"):
        load(tmp_path, lost)


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_saved_bases_are_those_of_their_adapter_alone(tmp_path, cache_bytes):
    """Another adapter of the same seed has more bases, or a file with fewer."""
    computed = {}
    for count in (7, 4):
        model = trained("llama", save_basis=True, num_basis=count, cache_bytes=cache_bytes)
        computed[count] = outputs("llama", model)
        model.save_pretrained(str(tmp_path / str(count)))
    alone = trained("llama", num_basis=12, cache_bytes=cache_bytes)
    read = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(tmp_path / "7"))
    read.add_adapter("more", tiny_hosts.config("llama", num_basis=12, cache_bytes=cache_bytes))
    read.load_adapter(str(tmp_path / "4"), "fewer")
    state = get_peft_model_state_dict(alone)
    set_peft_model_state_dict(read, state, adapter_name="more")
    for adapter, expected in {"more": outputs("llama", alone), "fewer": computed[4], "default": computed[7]}.items():
        read.set_adapter(adapter)
        assert torch.equal(outputs("llama", read), expected), adapter


@pytest.mark.parametrize("from_a_file", [True, False])
def test_a_model_that_changes_its_dtype_lets_go_of_bases_in_the_old_one(from_a_file, tmp_path):
    model = trained("llama", save_basis=from_a_file, cache_bytes=10**6)
    model.save_pretrained(str(tmp_path))
    if from_a_file:
        model = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(tmp_path))
    outputs("llama", model)
    factors = [pair for layer in tiny_hosts.nola_layers(model).values() for pair in layer.nola_factors["default"]]
    assert all(factor.bank.kept for factor in factors)
    model.double()
    assert not any(factor.bank.kept for factor in factors)


def test_what_transformers_saved_is_read_too(tmp_path):
    """Its integration puts PEFT's prefix before every key, our own among them."""
    host = tiny_hosts.host("llama")
    host.add_adapter(tiny_hosts.config("llama"))
    tiny_hosts.perturb(host)
    expected = outputs("llama", host)
    host.save_pretrained(str(tmp_path))
    read = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(tmp_path))
    assert torch.equal(outputs("llama", read), expected)


EARLIER = {  # written when alpha and beta lay side by side, and the scales of all modules together
    "plain": ("gpt2", {}),
    "three_bits": ("gpt2", {"quant_bits": 3}),
    "with_bases": ("gpt2", {"save_basis": True, "share_basis": False}),
    "by_transformers": ("llama", {}),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("folder", EARLIER)
def test_files_of_the_first_layout_are_read_and_saved_in_this_one(folder, low_cpu_mem_usage, tmp_path):
    (name, options), expected = EARLIER[folder], str(Path(__file__).parent / "earlier_layout" / folder)
    read = PeftModel.from_pretrained(tiny_hosts.host(name), expected, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(outputs(name, read), outputs(name, trained(name, **options)))
    read.save_pretrained(str(tmp_path))
    host = tiny_hosts.host(name)
    host.load_adapter(str(tmp_path))
    assert torch.equal(outputs(name, host), outputs(name, read))


@pytest.mark.parametrize("folder", EARLIER)
def test_a_file_of_the_first_layout_is_refused_by_loaders_that_would_lose_it(folder):
    """Transformers would find none of its keys, and compute without the adapter."""
    host = tiny_hosts.host(EARLIER[folder][0])
    keys = set(host.state_dict())
    with pytest.raises(ValueError, match=r"first layout, which only `PeftModel.from_pretrained` reads.*save it again"):
        host.load_adapter(str(Path(__file__).parent / "earlier_layout" / folder))
    assert set(host.state_dict()) == keys


def test_damaged_files_of_the_first_layout_are_refused(tmp_path):
    folder = Path(__file__).parent / "earlier_layout" / "three_bits"
    state = load_file(folder / "adapter_model.safetensors")
    model, key = tiny_hosts.adapted("gpt2", quant_bits=3), "base_model.model.transformer.h.0.mlp.c_fc.nola_coefficients"
    scales = state["base_model.nola_scales"]
    changes = [
        (key, state[key][:, :-1], r"packed coefficients of torch\.uint8 \(1, 12\), expected uint8 \(1, 13\)"),
        (key, state[key].repeat(2, 1), r"number of rows of .*c_fc\.nola_coefficients"),
        ("base_model.nola_scales", scales[1:], r"shape of nola_scales \(5, 2\), expected \(6, 2\)"),
    ]
    for changed, value, message in changes:
        with pytest.raises(ValueError, match=message):
            set_peft_model_state_dict(model, state | {changed: value})


def test_the_folder_says_what_has_to_be_imported(tmp_path):
    """PEFT knows the method only where limbeck is imported, and says no more than its name."""
    for _ in range(2):
        trained("llama").save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["package"] == "limbeck"
    card = (tmp_path / "README.md").read_text()
    assert card.count("import limbeck.adapters") == 1
    assert card.startswith("---")
    host = tiny_hosts.host("llama")
    host.add_adapter(tiny_hosts.config("llama"))
    host.save_pretrained(str(tmp_path / "host"))
    assert "import limbeck.adapters" in (tmp_path / "host" / "README.md").read_text()
    with pytest.raises(ValueError, match="package 'another', expected one of limbeck"):
        NolaConfig(package="another")


def test_two_adapters_of_one_model_are_saved_and_loaded_apart(tmp_path):
    model = trained("gpt2")
    model.add_adapter("other", tiny_hosts.config("gpt2", basis_seed=3, num_basis=4, quant_bits=4))
    model.set_adapter("other")
    tiny_hosts.perturb(model, seed=8)
    expected = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        expected[adapter] = outputs("gpt2", model)
    model.save_pretrained(str(tmp_path))
    read = PeftModel.from_pretrained(tiny_hosts.host("gpt2"), str(tmp_path / "other"), adapter_name="renamed")
    assert torch.equal(outputs("gpt2", read), expected["other"])
    read.load_adapter(str(tmp_path), "second")
    read.set_adapter("second")
    assert torch.equal(outputs("gpt2", read), expected["default"])
    read.set_adapter("renamed")
    assert torch.equal(outputs("gpt2", read), expected["other"])


def test_a_state_dict_goes_into_a_model_that_has_already_computed():
    """What was built from the old coefficients is not used for the new ones."""
    one, two = trained("vit"), tiny_hosts.perturb(tiny_hosts.adapted("vit"), seed=4)
    outputs("vit", two)
    set_peft_model_state_dict(two, get_peft_model_state_dict(one))
    assert torch.equal(outputs("vit", two), outputs("vit", one))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_through_the_meta_device_gives_the_same(saved, low_cpu_mem_usage):
    folder, _ = saved
    read = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(outputs("llama", read), outputs("llama", trained("llama")))
