"""What users of PEFT do with an adapter, on a host of each kind."""

import copy
import pickle
import warnings

import pytest
import tiny_hosts
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch.utils.checkpoint import checkpoint

from limbeck.adapters.basis import Stream

DTYPES = {torch.float32: 2e-5, torch.bfloat16: 0.2}  # how far rounding in the host may take an output of about 3
EVERY = [(name, dtype) for name in tiny_hosts.HOSTS for dtype in DTYPES]
LANGUAGE = ["gpt2", "llama", "t5"]


def close(received, expected, dtype=torch.float32):
    torch.testing.assert_close(received, expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])


def outputs(name, model, dtype=torch.float32):
    with torch.no_grad():
        return tiny_hosts.outputs(name, model, dtype)


def trained(name, dtype=torch.float32, **options):
    return tiny_hosts.perturb(tiny_hosts.adapted(name, dtype, **options))


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_a_few_steps_lower_the_loss_and_leave_the_host_as_it_was(name, dtype):
    model = tiny_hosts.adapted(name, dtype, modules_to_save=None)
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = (tiny_hosts.outputs(name, model, dtype) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key in frozen)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_disabling_gives_the_host_and_enabling_the_adapter(name, dtype):
    model = trained(name, dtype)
    adapted = outputs(name, model, dtype)
    base = outputs(name, tiny_hosts.host(name, dtype), dtype)
    assert (adapted - base).abs().max() > DTYPES[dtype]
    with model.disable_adapter():
        assert torch.equal(outputs(name, model, dtype), base)
    assert torch.equal(outputs(name, model, dtype), adapted)
    assert all(p.requires_grad for key, p in model.named_parameters() if "nola_" in key)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_merging_keeps_the_outputs_and_unmerging_gives_the_weights_back(name, dtype):
    model = trained(name, dtype)
    adapted, before = outputs(name, model, dtype), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter(safe_merge=True)
    close(outputs(name, model, dtype), adapted, dtype)
    weights = [layer.weight for layer in tiny_hosts.nola_layers(model).values()]
    assert weights[0].dtype == dtype
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        with model.disable_adapter():  # unmerges
            close(outputs(name, model, dtype), outputs(name, tiny_hosts.host(name, dtype), dtype), dtype)
    whole = model.merge_and_unload(safe_merge=True)
    assert type(whole) is type(tiny_hosts.host(name))
    assert not [key for key in whole.state_dict() if "nola" in key]
    close(outputs(name, whole, dtype), adapted, dtype)


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_two_adapters_with_other_seeds_ranks_and_counts_live_side_by_side(name):
    model = trained(name)
    one = outputs(name, model)
    model.add_adapter("other", tiny_hosts.config(name, basis_seed=1, r=2, num_basis=4, share_basis=False))
    assert torch.equal(outputs(name, model), one)
    model.set_adapter("other")
    assert not [k for k, p in model.named_parameters() if ".default" in k and p.requires_grad and "nola_" in k]
    two = outputs(name, tiny_hosts.perturb(model, seed=1))
    alone = tiny_hosts.adapted(name, basis_seed=1, r=2, num_basis=4, share_basis=False)
    assert torch.equal(two, outputs(name, tiny_hosts.perturb(alone, seed=1)))
    assert (one - two).abs().max() > 1e-3
    for adapter, expected in (("default", one), ("other", two), ("default", one)):
        model.set_adapter(adapter)
        assert torch.equal(outputs(name, model), expected)


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_adapters_add_and_merge_on_top_of_each_other(name):
    options = {"modules_to_save": None}
    model = trained(name, **options)
    model.add_adapter("other", tiny_hosts.config(name, basis_seed=1, **options))
    model.set_adapter("other")
    tiny_hosts.perturb(model, seed=1)
    model.base_model.set_adapter(["default", "other"])
    both = outputs(name, model)
    layers = tiny_hosts.nola_layers(model)
    deltas = {key: layer.get_delta_weight("default") + layer.get_delta_weight("other") for key, layer in layers.items()}
    sums = tiny_hosts.host(name)
    for key, delta in deltas.items():
        sums.get_submodule(key).weight.data += delta
    close(both, outputs(name, sums))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.merge_adapter(["default"])
        model.base_model.merge_adapter(["default", "other"])
    assert {tuple(layer.merged_adapters) for layer in layers.values()} == {("default", "other")}
    close(outputs(name, model), both)
    model.unmerge_adapter()
    close(outputs(name, model), both)
    model.base_model.set_adapter("default")
    close(outputs(name, model), outputs(name, trained(name, **options)))


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_a_deleted_adapter_leaves_nothing(name):
    model = trained(name)
    one = outputs(name, model)
    keys = set(model.state_dict())
    model.add_adapter("other", tiny_hosts.config(name, basis_seed=1))
    model.set_adapter("other")
    outputs(name, tiny_hosts.perturb(model))
    with pytest.warns(UserWarning, match="other was active which is now deleted"):
        model.delete_adapter("other")
    assert set(model.state_dict()) == keys
    assert torch.equal(outputs(name, model), one)
    assert all(set(layer.nola_factors) == {"default"} for layer in tiny_hosts.nola_layers(model).values())
    model.delete_adapter("default")
    assert not [key for key in model.state_dict() if "nola_" in key]


@pytest.mark.parametrize("name", ["mlp", "vit", "conv"])
def test_modules_to_save_train_and_are_saved(name, tmp_path):
    model = trained(name)
    (head,) = tiny_hosts.TARGETS[name]["modules_to_save"]
    assert f"base_model.model.{head}.weight" in get_peft_model_state_dict(model)
    assert f"base_model.model.{head}.bias" in get_peft_model_state_dict(model)
    model.save_pretrained(str(tmp_path))
    read = PeftModel.from_pretrained(tiny_hosts.host(name), str(tmp_path))
    assert torch.equal(outputs(name, read), outputs(name, model))


@pytest.mark.parametrize("name", [*LANGUAGE, "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient_and_builds_nothing_twice(name, reentrant, monkeypatch):
    draws, draw = [], Stream.draw
    monkeypatch.setattr(Stream, "draw", lambda *args: draws.append(args) or draw(*args))
    grads, amounts = [], []
    for checkpointed in (False, True):
        model = trained(name, torch.float64, cache_bytes=0)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if hasattr(model, "enable_input_require_grads"):
                model.enable_input_require_grads()
        draws.clear()
        tiny_hosts.outputs(name, model, torch.float64).square().sum().backward()
        amounts.append(len(draws))
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)
    assert amounts[0] == amounts[1]


def test_checkpointing_a_plain_module_works_too():
    model, x = trained("mlp"), torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = torch.autograd.grad(model(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)[0]
    assert torch.equal(plain, again)


def test_micro_batches_build_each_factor_once(monkeypatch):
    model = trained("llama", cache_bytes=0)
    draws, draw = [], Stream.draw
    monkeypatch.setattr(Stream, "draw", lambda *args: draws.append(args) or draw(*args))
    counts = []
    for _ in range(3):
        loss = tiny_hosts.outputs("llama", model).square().sum()
        counts.append(len(draws))
        draws.clear()
        loss.backward()
        draws.clear()
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_copies_and_pickles_compute_the_same_and_hold_no_bases(name):
    model = trained(name)
    computed = outputs(name, model)
    copied = copy.deepcopy(model)
    data = pickle.dumps(model)
    assert len(data) < len(pickle.dumps(trained(name, num_basis=(7, 5)))) + 1000  # one that has built nothing
    assert torch.equal(outputs(name, pickle.loads(data)), computed)  # noqa: S301
    tiny_hosts.perturb(model, seed=3)
    assert torch.equal(outputs(name, copied), computed)
    assert not torch.equal(outputs(name, model), computed)


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_casting_the_whole_model_rounds_coefficients_but_draws_no_other_basis(name):
    model = trained(name, modules_to_save=None)
    outputs(name, model)
    model.to(torch.bfloat16)
    other = trained(name, torch.bfloat16, modules_to_save=None)
    other.to(torch.bfloat16)
    assert torch.equal(outputs(name, model, torch.bfloat16), outputs(name, other, torch.bfloat16))
    layer, reference = (next(iter(tiny_hosts.nola_layers(m).values())) for m in (model, other))
    assert layer.built("default")[0].dtype == torch.float32
    assert torch.equal(layer.built("default")[0], reference.built("default")[0])


def test_coefficients_of_a_half_precision_host_are_not_rounded(tmp_path):
    for flag in (True, False):
        model = get_peft_model(
            tiny_hosts.host("llama", torch.bfloat16), tiny_hosts.config("llama", init="mean"), low_cpu_mem_usage=False
        )
        assert all(p.unique().item() in (torch.tensor(1 / 7).item(), torch.tensor(1 / 5).item()) for p in
                   model.parameters() if p.requires_grad)  # fmt: skip
        tiny_hosts.perturb(model).save_pretrained(str(tmp_path))
        read = PeftModel.from_pretrained(
            tiny_hosts.host("llama", torch.bfloat16), str(tmp_path), low_cpu_mem_usage=flag
        )
        for one, two in zip(
            get_peft_model_state_dict(model).values(), get_peft_model_state_dict(read).values(), strict=True
        ):
            assert torch.equal(one, two)


def test_a_sum_of_adapters_is_refused():
    model = trained("mlp")
    with pytest.raises(ValueError, match="received add_weighted_adapter for NOLA, expected LoRA"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_batch_of_several_adapters_is_refused_rather_than_computed_with_one():
    model = trained("llama")
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="received adapter_names for NOLA, expected none"):
        model(input_ids=tokens, adapter_names=["default", "__base__"])
    model(input_ids=tokens)


def test_a_merge_that_would_give_nan_is_refused_and_changes_nothing():
    model = trained("mlp")
    layer = model.base_model.model.first
    layer.nola_coefficients["default"].a.data[0, 0] = torch.nan
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default seems"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.weight, weight)


def test_merging_into_integers_is_refused():
    model = trained("mlp")
    layer = model.base_model.model.first
    layer.base_layer.weight = torch.nn.Parameter(torch.zeros(9, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight of torch\.int8, expected floating point"):
        model.merge_adapter()


def test_peft_reports_on_the_layers(capsys):
    model = trained("mlp")
    model.print_trainable_parameters()
    assert f"trainable params: {2 * (7 + 5) + 30:,d} ||" in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (True, ["default"], 3)
    assert {layer.module_type for layer in model.get_layer_status()} >= {"NolaLinear"}


def test_all_linear_and_the_default_targets_of_a_host_are_found():
    model = get_peft_model(tiny_hosts.host("llama"), tiny_hosts.config("llama", target_modules="all-linear"))
    assert len(tiny_hosts.nola_layers(model)) == 14
    model = get_peft_model(tiny_hosts.host("llama"), tiny_hosts.config("llama", target_modules=None))
    assert {key.rpartition(".")[2] for key in tiny_hosts.nola_layers(model)} == {"q_proj", "v_proj"}
    options = {"layers_to_transform": [1], "exclude_modules": ["v_proj"]}
    model = get_peft_model(tiny_hosts.host("llama"), tiny_hosts.config("llama", **options))
    assert [key.split(".")[2:] for key in tiny_hosts.nola_layers(model)] == [
        ["1", "self_attn", "q_proj"],
        ["1", "mlp", "down_proj"],
    ]


def test_nothing_in_a_whole_step_touches_a_global_generator(global_generators):
    for options in ({}, {"cache_bytes": 0}, {"init": "mean", "share_basis": False}):
        host = tiny_hosts.host("gpt2")
        before = global_generators()
        model = get_peft_model(host, tiny_hosts.config("gpt2", **options))
        tiny_hosts.outputs("gpt2", model).sum().backward()
        model.merge_adapter()
        assert global_generators() == before


def test_shared_bases_are_drawn_once_for_a_shape(monkeypatch):
    """Property 10: sharing costs no coefficient, and here L = 2 layers draw half as much."""
    draws, draw, counts = [], Stream.draw, []
    monkeypatch.setattr(Stream, "draw", lambda *args: draws.append(args) or draw(*args))
    for share_basis in (True, False):
        draws.clear()
        model = trained("llama", share_basis=share_basis)
        tiny_hosts.outputs("llama", model).sum().backward()
        counts.append((model.get_nb_trainable_parameters()[0], sum(c * s.size for s, _, c in draws if s.factor == "B")))
    assert counts[0][0] == counts[1][0]
    shapes = {"q": 3 * 12, "v": 3 * 6, "down": 3 * 12}
    assert counts[1][1] == 2 * 5 * sum(shapes.values())
    assert counts[0][1] == 5 * (shapes["q"] + shapes["v"])  # q and down have the same outputs
