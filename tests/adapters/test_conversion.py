"""An adapter as plain LoRA: stock LoRA, loaded from its files, gives the same outputs."""

import re

import pytest
import tiny_hosts
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file

from limbeck.adapters import to_lora


def outputs(name, model):
    with torch.no_grad():
        return tiny_hosts.outputs(name, model, torch.float64)


def trained(name, **options):
    if name == "conv":  # LoRA knows neither dilation nor padding by reflection
        options = {"target_modules": ["wide", "narrow"]} | options
    return tiny_hosts.perturb(tiny_hosts.adapted(name, torch.float64, **options))


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
@pytest.mark.parametrize("options", [{}, {"quant_bits": 4, "init": "mean"}, {"share_basis": False}])
def test_stock_lora_has_the_same_outputs(name, options, tmp_path):
    model = trained(name, **options)
    state, config = to_lora(model)
    assert not [key for key in state if "nola" in key]
    save_file(state, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(str(tmp_path))
    lora = PeftModel.from_pretrained(tiny_hosts.host(name, torch.float64), str(tmp_path))
    assert {type(module).__module__ for module in lora.modules() if hasattr(module, "lora_A")} == {
        "peft.tuners.lora.layer"
    }
    torch.testing.assert_close(outputs(name, lora), outputs(name, model), atol=1e-12, rtol=1e-12)
    assert (outputs(name, lora) - outputs(name, tiny_hosts.host(name, torch.float64))).abs().max() > 1e-3
    merged = lora.merge_and_unload()
    torch.testing.assert_close(outputs(name, merged), outputs(name, model), atol=1e-12, rtol=1e-12)


def test_the_rank_is_that_of_the_adapter_and_twice_it_where_two_blocks_are_fused():
    state, config = to_lora(trained("gpt2"))
    shapes = {key.split("h.0.")[1]: tuple(value.shape) for key, value in state.items() if "h.0." in key}
    assert shapes == {
        "attn.c_attn.lora_A.weight": (6, 12),
        "attn.c_attn.lora_B.weight": (36, 6),
        "mlp.c_fc.lora_A.weight": (3, 12),
        "mlp.c_fc.lora_B.weight": (48, 3),
    }
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (3, 6, True)
    assert set(config.rank_pattern.values()) == {6}
    assert set(config.alpha_pattern.values()) == {12}
    assert not state["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"][12:24].any()


def test_only_the_adapted_modules_become_lora():
    """A target of LoRA also matches by its ending; here names are whole."""
    model = trained("llama", target_modules="model.layers.0.self_attn.q_proj")
    state, config = to_lora(model)
    lora = get_peft_model(tiny_hosts.host("llama", torch.float64), config)
    assert lora.targeted_module_names == ["model.layers.0.self_attn.q_proj"]
    result = set_peft_model_state_dict(lora, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(outputs("llama", lora), outputs("llama", model), atol=1e-12, rtol=1e-12)


def test_a_second_adapter_is_converted_by_its_name():
    model = trained("vit", modules_to_save=None)
    model.add_adapter("other", tiny_hosts.config("vit", basis_seed=4, r=2, modules_to_save=None))
    model.set_adapter("other")
    tiny_hosts.perturb(model)
    state, config = to_lora(model, "other")
    lora = get_peft_model(tiny_hosts.host("vit", torch.float64), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(outputs("vit", lora), outputs("vit", model), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="adapter name 'third', expected one of default, other"):
        to_lora(model, "third")


def test_convolutions_that_lora_computes_otherwise_are_refused():
    model = tiny_hosts.adapted("conv")
    with pytest.raises(ValueError, match=re.escape("received base_model.model.dilated: Conv2d(")):
        to_lora(model)


def test_pefts_own_conversion_agrees_for_linear_layers():
    model = trained("llama")
    config, state = convert_to_lora(model, rank=3)
    lora = get_peft_model(tiny_hosts.host("llama", torch.float64), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(
        outputs("llama", lora), outputs("llama", model), atol=1e-4, rtol=1e-4
    )  # an SVD in float32
