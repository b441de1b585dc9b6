"""A configuration is checked when it is made, and JSON gives it back."""

import jaxtyping
import pytest
import tiny_hosts
import torch
from peft import PeftConfig, PeftModel
from torch import nn

from limbeck.adapters import NolaConfig

BAD = [
    ({"num_basis": 0}, "num_basis 0, expected an integer of at least 1"),
    ({"num_basis": (3, 0)}, "num_basis 0, expected"),
    ({"num_basis": (3, 3, 3)}, r"num_basis \(3, 3, 3\), expected an integer or a pair"),
    ({"num_basis": 1.5}, "num_basis 1.5, expected"),
    ({"num_basis": True}, "num_basis True, expected"),
    ({"r": 0}, "r 0, expected an integer of at least 1"),
    ({"nola_alpha": 0}, "nola_alpha 0, expected a positive number"),
    ({"nola_alpha": float("inf")}, "nola_alpha inf, expected"),
    ({"nola_alpha": "8"}, "nola_alpha '8', expected a positive number"),
    ({"basis_seed": True}, "basis_seed True, expected an integer"),
    ({"basis_seed": 1.0}, "basis_seed 1.0, expected an integer"),
    ({"basis_seed": "1"}, "basis_seed '1', expected an integer"),
    ({"basis_seed": -1}, "basis_seed -1, expected an integer of at least 0"),
    ({"basis_seed": 2**63}, "expected less than 2"),
    ({"init": "zeros"}, "init 'zeros', expected one of noop, mean"),
    ({"basis_distribution": "cauchy"}, "basis_distribution 'cauchy', expected one of uniform, normal, rademacher"),
    ({"quant_bits": 5}, "received 5 bits a coefficient, expected one of 2, 3, 4, 8"),
    ({"quant_bits": 0}, "received 0 bits"),
    ({"quant_bits": 4.0}, "received 4.0 bits"),
    ({"chunk_size": 0}, "chunk_size 0, expected"),
    ({"cache_bytes": -1}, "cache_bytes -1, expected"),
    ({"fused_slices": {"c_attn": ("q", "x")}}, r"slices \('q', 'x'\) of c_attn, expected some of q, k, v"),
    ({"fused_slices": ["c_attn"]}, r"fused_slices \['c_attn'\], expected a dict"),
    ({"fused_slices": {"c_attn": ()}}, "slices"),
    ({"fused_slices": {"c_attn": ("q", "q")}}, "slices"),
    ({"layers_pattern": "h"}, "layers_pattern 'h', expected layers_to_transform"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_value_outside_its_range_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        NolaConfig(target_modules=["x"], **options)


def test_no_configuration_starts_dead():
    """A start at zero has A0; without A0, no coefficient is zero."""
    for init in ("noop", "mean"):
        model = tiny_hosts.adapted("mlp", init=init)
        for layer in tiny_hosts.nola_layers(model).values():
            a, b = layer.built("default")
            assert a.abs().sum() > 0
            assert all(bool(c.all()) == (init == "mean") for c in layer.coefficients("default"))
            assert bool(b.any()) == (init == "mean")
        tiny_hosts.outputs("mlp", model).square().sum().backward()
        grads = [layer.nola_coefficients["default"].b.grad for layer in tiny_hosts.nola_layers(model).values()]
        assert all(grad.abs().min() > 0 for grad in grads)


def test_peft_saves_and_reads_it(tmp_path):
    made = NolaConfig(
        r=3, num_basis=(7, 5), nola_alpha=2.5, basis_seed=2**62, target_modules=["a", "b"], init="mean", quant_bits=3,
        share_basis=False, basis_distribution="normal", fused_slices={"a": ("q", "v")}, chunk_size=9, cache_bytes=0,
    )  # fmt: skip
    made.save_pretrained(str(tmp_path))
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is NolaConfig
    assert read == made
    assert read.numbers == (7, 5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.embedding, self.line, self.grouped = nn.Embedding(5, 4), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
        self.fused = nn.Linear(4, 12)
        self.odd = nn.Linear(4, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"target_modules": ["embedding"]}, "target embedding: Embedding.*expected nn.Linear, Conv1D, or nn.Conv2d"),
        ({"target_modules": ["line"]}, "target line: Conv1d.*expected"),
        ({"target_modules": ["grouped"]}, "target grouped: Conv2d.*expected.*one group"),
        ({"target_modules": ["out_proj"]}, "target attention.out_proj, the projection of a MultiheadAttention"),
        ({"target_modules": ["odd"], "fused_slices": {"odd": ("q",)}}, "odd of 10 outputs, expected"),
        ({"target_modules": ["fused"], "fused_slices": {"odd": ("q",)}}, "fused_slices of odd, expected some of fused"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_hosts.get_peft_model(Attention(), NolaConfig(**options))


def test_a_refused_adapter_leaves_no_coefficient_behind():
    model = tiny_hosts.adapted("mlp")
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match="fused_slices of nothing, expected some of"):
        model.add_adapter("bad", tiny_hosts.config("mlp", fused_slices={"nothing": ("q",)}, modules_to_save=None))
    assert model.state_dict().keys() == before.keys()
    assert list(model.peft_config) == ["default"]


def test_the_linear_layers_of_an_encoder_layer_are_adapted_only_where_they_are_called():
    """In evaluation, its fast path reads their weights: PEFT's LoRA does nothing there, unnoticed."""
    config = NolaConfig(target_modules=["linear1"], init="mean", r=2, num_basis=3)
    host = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).eval()
    x = torch.linspace(-1, 1, 24).view(2, 3, 4)
    with pytest.raises(ValueError, match=r"linear1 of a TransformerEncoderLayer.*torch\.backends\.mha"):
        tiny_hosts.get_peft_model(host, config)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            base = host(x)
            assert not torch.equal(tiny_hosts.get_peft_model(host, config)(x), base)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize("name", ["first", "model", "base_model", "a.b", "keys", ""])
def test_an_adapter_name_that_peft_would_confuse_with_a_module_is_refused(name):
    with pytest.raises(ValueError, match=f"adapter name '{name}', expected no dot.* with modules_to_save no part"):
        tiny_hosts.get_peft_model(tiny_hosts.host("mlp"), tiny_hosts.config("mlp"), adapter_name=name)


def test_modules_to_save_are_refused_beside_an_adapter_called_as_a_part_of_their_name():
    model = tiny_hosts.get_peft_model(tiny_hosts.host("mlp"), NolaConfig(target_modules=["first"]), adapter_name="head")
    with pytest.raises(ValueError, match=r"adapter name 'head', expected .* no part of a module's name"):
        model.add_adapter("other", tiny_hosts.config("mlp"))


@pytest.mark.parametrize("name", ["0", "model", "q_proj", "weight", "a", "nola_coefficients", "base_model"])
def test_an_adapter_called_as_a_part_of_a_modules_name_is_saved_beside_another(name, tmp_path):
    """PEFT leaves every key with the name of another adapter out of the state dict that it hands over."""
    model = tiny_hosts.perturb(tiny_hosts.adapted("llama"))
    model.add_adapter(name, tiny_hosts.config("llama", basis_seed=3))
    model.set_adapter(name)
    tiny_hosts.perturb(model, seed=5)
    expected = {}
    for adapter in ("default", name):
        model.set_adapter(adapter)
        expected[adapter] = tiny_hosts.outputs("llama", model)
    assert (expected["default"] - expected[name]).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path))
    for adapter, folder in {"default": tmp_path, name: tmp_path / name}.items():
        for called in ("default", name):
            read = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(folder), adapter_name=called)
            assert torch.equal(tiny_hosts.outputs("llama", read), expected[adapter])
