"""Whatever names the modules to adapt, a name that fits none is refused: half an adapter looks like a whole one."""

import re

import pytest
import tiny_hosts
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from limbeck.adapters import NolaConfig
from limbeck.adapters.model import NolaModel


def mixtral():
    sizes = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 2, "num_key_value_heads": 1, "vocab_size": 20}
    return MixtralForCausalLM(MixtralConfig(**sizes, **experts))


def adapted_names(host, **options):
    return set(tiny_hosts.nola_layers(get_peft_model(host, NolaConfig(r=2, num_basis=3, **options))))


LOST = {
    "a list": ({"target_modules": ["q_proj", "w1", "w2"]}, "target_modules 'w1', 'w2'"),
    "full names": ({"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.w1"]}, "layers.2.mlp.w1"),
    "a pattern": ({"target_modules": r".*\.w1"}, r"\.\*\\\\\.w1"),
    "a group": ({"target_modules": r".*\.(?:q_proj|w1)"}, "target_modules 'w1'"),
    "alternatives": ({"target_modules": r"model.layers.0.self_attn.q_proj|w1"}, "target_modules 'w1'"),
    "some layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "layers_to_transform '2'"),
    "a layer": ({"target_modules": ["q_proj"], "layers_to_transform": 5}, "layers_to_transform '5'"),
    "a layer by default": ({"layers_to_transform": [0, 9]}, "layers_to_transform '9'"),
    "another stack": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        "layers_to_transform '1'",
    ),
    "exclusions": ({"target_modules": ["q_proj"], "exclude_modules": ["k_proj", "w3"]}, "exclude_modules 'w3'"),
    "an exclusion": ({"target_modules": ["q_proj"], "exclude_modules": r".*\.(k_proj|w3)"}, "exclude_modules 'w3'"),
    "all but": ({"target_modules": "all-linear", "exclude_modules": ["w3"]}, "exclude_modules 'w3'"),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "haed"]}, "modules_to_save 'haed'"),
}


@pytest.mark.parametrize("naming", LOST)
def test_a_name_that_fits_no_module_is_refused_before_anything_is_adapted(naming):
    options, message = LOST[naming]
    host = mixtral()
    with pytest.raises(ValueError, match=rf"received .*{message}.* that fit no module, expected .*`named_modules\(\)`"):
        adapted_names(host, **options)
    assert not any("nola" in name for name, _ in host.named_modules())


def test_the_names_that_matched_are_told():
    with pytest.raises(ValueError, match=r"those that matched: q_proj \(model\.layers\.0\.self_attn\.q_proj\)\."):
        adapted_names(mixtral(), target_modules=["q_proj", "w1"])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, {"0.q", "1.q", "lm_head"}),
        ({"target_modules": r".*\.(q|v)_proj"}, {"0.q", "1.q", "0.v", "1.v"}),
        ({"target_modules": r".*\.(?!q|k|o)\w_proj"}, {"0.v", "1.v"}),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {"0.q", "1.q"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]}, {"1.q"}),
        ({"layers_to_transform": 1, "target_modules": ["o_proj"]}, {"1.o"}),
    ],
)
def test_the_same_modules_are_adapted_as_by_lora(options, names):
    expected = {re.sub(r"(\d)\.(\w)$", r"model.layers.\1.self_attn.\2_proj", name) for name in names}
    lora = get_peft_model(mixtral(), LoraConfig(r=2, **options))
    found = {
        name.removeprefix("base_model.model.") for name, module in lora.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted_names(mixtral(), **options) == expected == found


def test_all_linear_layers_and_those_of_a_layer_are_found():
    """LoRA's "all-linear" also adapts the router of Mixtral, which is a parameter."""
    linear = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in "01" for name in "qkvo"}
    assert adapted_names(mixtral(), target_modules="all-linear") == linear
    first = {f"model.layers.0.self_attn.{name}_proj" for name in "qv"}
    assert adapted_names(mixtral(), layers_to_transform=0) == first


def test_targets_that_peft_chooses_are_saved_as_far_as_they_fit(tmp_path, monkeypatch):
    monkeypatch.setitem(NolaModel.target_module_mapping, "mixtral", ["q_proj", "nowhere"])
    model = get_peft_model(mixtral(), NolaConfig(r=2, num_basis=3))
    model.save_pretrained(str(tmp_path))
    assert NolaConfig.from_pretrained(str(tmp_path)).target_modules == {"q_proj"}


def test_layers_beside_a_pattern_are_refused_as_by_lora():
    for targets in (r".*q_proj", "all-linear"):
        with pytest.raises(ValueError, match=r"received layers_to_transform .* would ignore them"):
            NolaConfig(target_modules=targets, layers_to_transform=[1])
