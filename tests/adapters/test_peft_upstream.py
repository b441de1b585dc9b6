"""What PEFT's, transformers' and TRL's own suites ask of LoRA, asked of NOLA beside it: the same must hold for both."""

import json
import warnings

import pytest
import tiny_hosts
import tokenizers
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

TARGETS = tiny_hosts.TARGETS["llama"]["target_modules"]


def config(method, **options):
    if method == "lora":
        names = {"nola_alpha": "lora_alpha"}
        options = {names.get(name, name): value for name, value in options.items() if name != "basis_seed"}
        return LoraConfig(r=3, **{"target_modules": TARGETS} | options)
    kinds = {"packed": {"quant_bits": 4}, "with bases": {"save_basis": True}, "unique": {"share_basis": False}}
    return tiny_hosts.config("llama", **kinds.get(method, {}), **options)


METHODS = pytest.mark.parametrize("method", ["lora", "nola", "packed", "with bases", "unique"])
OURS = pytest.mark.parametrize("method", ["nola", "packed", "with bases", "unique"])
BOTH = pytest.mark.parametrize("method", ["lora", "nola"])


def outputs(model, dtype=torch.float32):
    with torch.no_grad():
        return tiny_hosts.outputs("llama", model, dtype)


def trained(method, dtype=torch.float32, seed=0, **options):
    return tiny_hosts.perturb(get_peft_model(tiny_hosts.host("llama", dtype), config(method, **options)), seed).eval()


@pytest.fixture
def base(tmp_path):
    """Where the host is saved."""
    tiny_hosts.host("llama").save_pretrained(str(tmp_path / "base"))
    return str(tmp_path / "base")


def host(base):
    return LlamaForCausalLM.from_pretrained(base)


def saved(method, base, folder, seed=0, **options):
    """A trained adapter's folder, and what the model computes with it."""
    model = tiny_hosts.perturb(get_peft_model(host(base), config(method, **options)), seed).eval()
    model.save_pretrained(str(folder))
    return str(folder), outputs(model)


@METHODS
def test_transformers_reads_a_model_from_the_folder_of_an_adapter(method, base, tmp_path):
    folder, expected = saved(method, base, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(outputs(model), expected)
    assert (expected - outputs(host(base))).abs().max() > 0.01
    assert model.active_adapters() == ["default"]


@BOTH
def test_the_trunk_alone_is_read_with_its_adapter(method, base, tmp_path):
    """As sentence-transformers does, which asks for the model without its head."""
    folder, _ = saved(method, base, tmp_path / "adapter")
    tokens, trunk = torch.arange(1, 7)[None], AutoModel.from_pretrained(folder)
    with torch.no_grad():
        whole = PeftModel.from_pretrained(host(base), folder)(tokens, output_hidden_states=True)
        assert torch.equal(trunk(tokens).last_hidden_state, whole.hidden_states[-1])


@METHODS
def test_transformers_loads_switches_saves_and_deletes_adapters(method, base, tmp_path):
    plain, expected = outputs(host(base)), {}
    model = host(base)
    for seed, name in enumerate(("one", "other")):
        folder, expected[name] = saved(method, base, tmp_path / name, seed, basis_seed=seed)
        assert not model.load_adapter(folder, adapter_name=name).mismatched_keys
    for name, computed in expected.items():
        model.set_adapter(name)
        assert torch.equal(outputs(model), computed), name
    model.disable_adapters()
    assert torch.equal(outputs(model), plain)
    model.enable_adapters()
    model.save_pretrained(str(tmp_path / "again"))
    read = PeftModel.from_pretrained(host(base), str(tmp_path / "again"))
    assert torch.equal(outputs(read), expected["other"])
    model.set_adapter("one")
    model.delete_adapter("other")
    assert torch.equal(outputs(model), expected["one"])
    model.delete_adapter("one")
    assert torch.equal(outputs(model), plain)
    assert not [key for key in model.state_dict() if "nola" in key or "lora" in key]


@pytest.mark.parametrize(
    "changes", [{"basis_seed": 1}, {"r": 2}, {"basis_distribution": "normal"}, {"share_basis": False}, {"init": "mean"}]
)
def test_transformers_refuses_other_bases_and_leaves_the_model_as_it_was(changes, base, tmp_path):
    folder, _ = saved("nola", base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = host(base)
    keys, plain = set(model.state_dict()), outputs(model)
    with pytest.raises(ValueError, match=r"checksum of its bases [0-9a-f]{64}, expected [0-9a-f]{64}, as saved"):
        model.load_adapter(folder)
    assert set(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(outputs(model), plain)


def test_a_config_that_was_saved_serves_another_model_too(tmp_path):
    """What saving writes into the file is no condition on models of the program that saved it."""
    shared = tiny_hosts.config("llama", target_modules=r".*\.[qf]\w+")
    get_peft_model(tiny_hosts.host("llama"), shared).save_pretrained(str(tmp_path))
    get_peft_model(tiny_hosts.host("vit"), shared)


@BOTH
def test_names_of_which_one_begins_another_do_not_mix(method, tmp_path):
    model = trained(method)
    for seed, name in enumerate(("one", "one_more", "more_one"), 1):
        model.add_adapter(name, config(method, basis_seed=seed))
        model.set_adapter(name)
        tiny_hosts.perturb(model, seed)
    model.save_pretrained(str(tmp_path))
    for name in ("one", "one_more", "more_one"):
        model.set_adapter(name)
        read = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(tmp_path / name), adapter_name="one")
        assert torch.equal(outputs(read), outputs(model)), name


@METHODS
def test_a_pickled_file_is_read(method, tmp_path):
    model = trained(method)
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_hosts.host("llama"), str(tmp_path))), outputs(model))


@METHODS
def test_keys_without_pefts_prefix_fit_an_injected_model(method, tmp_path):
    """Others cut the prefix off by its length, whatever a key begins with."""
    model = trained(method)
    model.save_pretrained(str(tmp_path))
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in state)
    bare = inject_adapter_in_model(config(method), tiny_hosts.host("llama"))
    set_peft_model_state_dict(bare, {key[len("base_model.model.") :]: value for key, value in state.items()})
    assert torch.equal(outputs(bare), outputs(model))


@BOTH
def test_the_state_dict_of_the_host_is_found_below_the_adapters(method):
    plain = tiny_hosts.host("llama").state_dict()
    below = get_base_model_state_dict(trained(method))
    assert below.keys() == plain.keys()
    assert all(torch.equal(below[key], plain[key]) for key in plain)


@BOTH
def test_status_names_the_method(method):
    assert trained(method).get_model_status().peft_types == {"default": method.upper()}


@BOTH
def test_a_broken_adapter_is_refused_by_a_safe_merge_in_the_same_words(method):
    model = trained(method)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "layer.weight" in key)


@BOTH
def test_another_adapter_changes_nothing_about_what_trains(method):
    model = trained(method)
    trains = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter("other", config(method, basis_seed=1))
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trains


@BOTH
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_adapter_has_the_dtype_of_its_layer_unless_it_is_raised(
    method, dtype, autocast, low_cpu_mem_usage, tmp_path
):
    def dtypes(model):
        return {p.dtype for key, p in model.named_parameters() if f"{method}_" in key}

    expected, options = {torch.float32 if autocast else dtype}, {"autocast_adapter_dtype": autocast}
    model = get_peft_model(tiny_hosts.host("llama", dtype), config(method), **options)
    model.add_adapter("other", config(method, basis_seed=1), **options)
    assert dtypes(model) == expected
    outputs(tiny_hosts.perturb(model), dtype)
    model.save_pretrained(str(tmp_path))
    loading = {"low_cpu_mem_usage": low_cpu_mem_usage} | options
    read = PeftModel.from_pretrained(tiny_hosts.host("llama", dtype), str(tmp_path), **loading)
    read.load_adapter(str(tmp_path / "other"), "other", **loading)
    assert dtypes(read) == expected
    if method == "nola":  # LoRA's numbers are rounded to the dtype of the layer on the way
        assert torch.equal(outputs(read, dtype), outputs(model, dtype))


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


def compiled(model):
    layers = model.get_submodule("base_model.model.model.layers")
    layers[0] = torch.compile(layers[0], backend="eager")
    return model


@OURS
@pytest.mark.parametrize("wrap", [checkpointed, compiled])
def test_wrapped_layers_have_the_keys_of_bare_ones(method, wrap):
    """Of LoRA, PEFT finds no parameter where a layer is wrapped."""
    bare = get_peft_model_state_dict(trained(method))
    state = get_peft_model_state_dict(wrap(trained(method)))
    assert state.keys() == bare.keys()
    assert all(torch.equal(state[key], bare[key]) for key in bare)
    read = wrap(get_peft_model(tiny_hosts.host("llama"), config(method)))
    set_peft_model_state_dict(read, bare)
    again = get_peft_model_state_dict(read)
    assert all(torch.equal(again[key], bare[key]) for key in bare)


@pytest.mark.parametrize("method", ["nola", "unique"])
def test_bases_do_not_depend_on_what_was_wrapped_before(method):
    read = get_peft_model(checkpointed(tiny_hosts.host("llama")), config(method))
    set_peft_model_state_dict(read, get_peft_model_state_dict(trained(method)))
    assert torch.equal(outputs(read), outputs(trained(method)))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@OURS
def test_a_sharded_model_has_the_keys_of_a_bare_one(method, one_process):
    """In bfloat16 throughout: what is flattened together has one dtype."""
    options = {"autocast_adapter_dtype": False}
    model = tiny_hosts.perturb(get_peft_model(tiny_hosts.host("llama", torch.bfloat16), config(method), **options))
    bare = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process and of frozen parameters
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        options = {"use_orig_params": True, "auto_wrap_policy": policy, "device_id": torch.device("cpu")}
        state = get_peft_model_state_dict(FullyShardedDataParallel(model, **options))
    assert state.keys() == bare.keys()
    assert all(torch.equal(state[key], bare[key]) for key in bare)


@METHODS
def test_an_adapter_is_hotswapped_for_another(method, tmp_path):
    model, other = trained(method), trained(method, seed=1)
    other.save_pretrained(str(tmp_path))
    before = outputs(model)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(outputs(model), outputs(other))
    assert not torch.equal(outputs(model), before)


def test_an_adapter_of_other_bases_rank_and_scale_is_hotswapped_too_and_goes_on_training(tmp_path):
    model = trained("nola").train()
    other = trained("nola", seed=1, basis_seed=5, r=3, num_basis=7, nola_alpha=11)
    other.save_pretrained(str(tmp_path / "other"))
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
    assert torch.equal(outputs(model.eval()), outputs(other))
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trains
    model.save_pretrained(str(tmp_path / "again"))
    again = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(tmp_path / "again"))
    assert torch.equal(outputs(again), outputs(other))


@pytest.mark.parametrize("fault", ["merged", "other modules", "damaged"])
def test_a_hotswap_that_cannot_be_leaves_the_adapter_as_it_was(fault, tmp_path):
    model = trained("nola")
    other = trained("nola", seed=1, **({"target_modules": ["v_proj"]} if fault == "other modules" else {}))
    other.save_pretrained(str(tmp_path))
    if fault == "damaged":
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        key = next(key for key in tensors if key.endswith("nola_coefficients.a"))
        save_file(tensors | {key: tensors[key] + 1}, tmp_path / "adapter_model.safetensors")
    if fault == "merged":
        model.merge_adapter()
    before, messages = outputs(model), {"merged": "is merged into", "damaged": "digest", "other modules": "without"}
    with pytest.raises(ValueError, match=messages[fault]):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("order", [("nola", "lora"), ("lora", "nola"), ("nola", "unique"), ("nola", "lora", "unique")])
def test_methods_are_mixed_in_one_model(order):
    """Each adds its own update: alone, together, merged, and not when it is disabled or deleted."""
    host = tiny_hosts.host("llama")
    plain, expected = outputs(host), tiny_hosts.host("llama")
    model = get_peft_model(host, config(order[0]), order[0], mixed=True)
    for method in order[1:]:
        model.add_adapter(method, config(method))
    for seed, method in enumerate(order):
        model.set_adapter(method)
        tiny_hosts.perturb(model, seed)
        alone = get_peft_model(tiny_hosts.host("llama"), config(method), method)
        own = {key.replace(".base_layer", ""): value for key, value in model.named_parameters() if f".{method}." in key}
        for key, value in alone.named_parameters():
            if value.requires_grad:
                value.data.copy_(own[key])
        torch.testing.assert_close(outputs(model), outputs(alone), atol=1e-6, rtol=1e-6)
        for key, layer in alone.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                expected.get_submodule(key).weight.data += layer.get_delta_weight(method)
    model.set_adapter(list(order))
    together = outputs(model)
    torch.testing.assert_close(together, outputs(expected), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    torch.testing.assert_close(outputs(model.merge_and_unload()), together, atol=1e-5, rtol=1e-5)


@METHODS
def test_a_reference_copied_by_names_is_the_policy(method, tmp_path):
    """As trainers of preferences copy it: every parameter with the policy's name between two dots."""
    folder = str(tmp_path)
    trained(method).save_pretrained(folder)
    model = PeftModel.from_pretrained(tiny_hosts.host("llama"), folder, is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])
    for key, parameter in model.named_parameters():
        if ".default." in key:
            model.get_parameter(key.replace(".default.", ".ref.")).data.copy_(parameter.data)
    computed = outputs(model)
    model.set_adapter("ref")
    assert torch.equal(outputs(model), computed)
    assert (computed - outputs(tiny_hosts.host("llama"))).abs().max() > 0.01


@BOTH
def test_a_step_of_grpo_stays_near_a_reference_that_is_the_start(method, tmp_path):
    trl = pytest.importorskip("trl")
    words = tokenizers.models.WordLevel({letter: i for i, letter in enumerate("?<>.abcdefghijklmnop")}, unk_token="?")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<", eos_token=">", padding_side="left")
    policy = trained(method)
    policy.save_pretrained(str(tmp_path / "start"))
    start = PeftModel.from_pretrained(tiny_hosts.host("llama"), str(tmp_path / "start"), is_trainable=True)
    options = {"beta": 0.1, "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4}
    args = trl.GRPOConfig(
        str(tmp_path / "run"), max_steps=2, learning_rate=0.01, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, **options,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        start, lambda completions, **_: [float(len(text)) for text in completions], args=args,
        train_dataset=Dataset.from_dict({"prompt": ["abc", "bcd"] * 2}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    distances = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    trainer.model.set_adapter("ref")
    assert torch.equal(outputs(trainer.model), outputs(policy))
