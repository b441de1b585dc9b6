"""What PEFT must go on doing for a method that is not in its enum. A release that changes it fails here."""

import inspect
import subprocess
import sys

import peft
import pytest
import tiny_hosts
from peft import mapping
from peft.utils import PeftType, get_peft_model_state_dict, save_and_load, set_peft_model_state_dict

from limbeck.adapters import NolaConfig
from limbeck.adapters.model import NolaModel


def test_peft_still_refuses_unknown_names_and_does_not_know_this_one():
    assert "NOLA" not in list(PeftType), "PEFT has a NOLA of its own: `register` would hide it"
    with pytest.raises(ValueError, match="Unknown PEFT type NOLA"):
        peft.utils.register_peft_method(name="nola", config_cls=NolaConfig, model_cls=NolaModel)


def test_the_tables_are_plain_dictionaries_that_hold_the_method():
    tables = {
        "PEFT_TYPE_TO_CONFIG_MAPPING": NolaConfig,
        "PEFT_TYPE_TO_TUNER_MAPPING": NolaModel,
        "PEFT_TYPE_TO_PREFIX_MAPPING": "nola_",
    }
    for name, entry in tables.items():
        assert type(getattr(mapping, name)) is dict, name
        assert getattr(mapping, name)["NOLA"] is entry or getattr(mapping, name)["NOLA"] == entry
    names = {name for name in vars(mapping) if name.startswith("PEFT_TYPE_TO_")}
    assert names == {*tables, "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"}, "a table that `register` does not know"
    assert save_and_load.PEFT_TYPE_TO_TUNER_MAPPING is mapping.PEFT_TYPE_TO_TUNER_MAPPING
    assert list(mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values()).count("nola_") == 1


def test_the_hooks_that_a_checkpoint_goes_through_have_the_expected_arguments():
    saved, loaded = (
        list(inspect.signature(getattr(peft.tuners.tuners_utils.BaseTuner, name)).parameters)
        for name in ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")
    )
    assert saved == ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"]
    assert loaded == ["model", "config", "adapter_name", "state_dict"]


def test_a_dictionary_gives_the_configuration():
    assert mapping.get_peft_config({"peft_type": "NOLA", "r": 3}) == NolaConfig(r=3)


@pytest.mark.slow
def test_a_process_that_has_not_imported_it_cannot_load_one_and_says_so(tmp_path):
    tiny_hosts.adapted("mlp").save_pretrained(str(tmp_path))
    for line, status in {"import peft": "KeyError: 'NOLA'", "import limbeck.adapters, peft": ""}.items():
        code = f"{line}; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert bool(done.returncode) == bool(status)
        assert status in done.stderr


def test_layers_injected_without_a_peft_model_work_and_have_the_same_checkpoint():
    whole = tiny_hosts.perturb(tiny_hosts.adapted("llama"))
    state = get_peft_model_state_dict(whole)
    bare = peft.inject_adapter_in_model(tiny_hosts.config("llama"), tiny_hosts.host("llama"))
    assert not set_peft_model_state_dict(bare, state).unexpected_keys
    assert tiny_hosts.outputs("llama", bare).equal(tiny_hosts.outputs("llama", whole))
    own = get_peft_model_state_dict(bare)
    assert {key.removeprefix("base_model.model.") for key in state} == set(own)
    again = peft.inject_adapter_in_model(tiny_hosts.config("llama"), tiny_hosts.host("llama"))
    set_peft_model_state_dict(again, own)
    assert tiny_hosts.outputs("llama", again).equal(tiny_hosts.outputs("llama", whole))
