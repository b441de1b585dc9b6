"""A compiled model is one graph, as with LoRA, and computes and learns as it does uncompiled."""

import copy
import pickle

import jaxtyping
import pytest
import tiny_hosts
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from limbeck.adapters import NolaConfig, quantise
from limbeck.adapters.factor import Factor

BACKENDS = ["eager", "aot_eager"]  # the second traces the backward too, and hands over other tensors than the model's


@pytest.fixture(autouse=True)
def plain():
    """Without the checks of types and shapes that tests put around every function: dynamo cannot see through them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", False)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("adapter", ["lora", "nola"])
def test_two_layers_are_one_graph_without_breaks(adapter, trains):
    host, config = tiny_hosts.host("mlp"), {"target_modules": ["first", "second"], "inference_mode": not trains}
    model = get_peft_model(host, (LoraConfig if adapter == "lora" else NolaConfig)(**config)).train(trains)
    explained = torch._dynamo.explain(model)(torch.ones(4, 6))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"cache_bytes": 0, "chunk_size": 3, "share_basis": False}),
        ("mlp", {"quant_bits": 3}),
        ("gpt2", {}),
        ("conv", {"init": "mean"}),
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("t5", {}, marks=pytest.mark.slow),
        pytest.param("vit", {}, marks=pytest.mark.slow),
    ],
)
def test_a_whole_graph_computes_and_learns_the_same_bits(name, options, backend):
    results = []
    for compiled in (True, False):
        model = tiny_hosts.perturb(tiny_hosts.adapted(name, modules_to_save=None, **options))
        host = model.get_base_model()
        if compiled:
            host.forward = torch.compile(host.forward, fullgraph=True, backend=backend)
        outputs = []
        for _ in range(3):
            output = tiny_hosts.outputs(name, model)
            output.square().sum().backward()
            outputs.append(output.detach())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.data.sub_(1e-3 * parameter.grad)
        results.append((outputs, gradients(model)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(*results[0][0][:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_fixed_coefficients_factors_are_built_once_and_a_change_is_noticed(monkeypatch, backend):
    built, build = [], Factor._build
    monkeypatch.setattr(Factor, "_build", lambda *args: built.append(args) or build(*args))
    model = tiny_hosts.perturb(tiny_hosts.adapted("mlp", modules_to_save=None)).requires_grad_(False)
    compiled, x = torch.compile(model, fullgraph=True, backend=backend), torch.ones(4, 6)
    for _ in range(3):
        assert torch.equal(compiled(x), model(x))
    assert len(built) == 4  # A and B of two layers
    layer = tiny_hosts.nola_layers(model)["first"]
    before = compiled(x)
    layer.coefficients("default")[1].data.mul_(2)
    assert not torch.equal(compiled(x), before)
    assert torch.equal(compiled(x), model(x))
    quantise(model, bits=2)
    assert torch.equal(compiled(x), model(x))
    model.merge_adapter()
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_graph_writes_into_its_values_does_not_reach_the_kept_ones(backend):
    model = tiny_hosts.perturb(tiny_hosts.adapted("mlp", modules_to_save=None)).requires_grad_(False)
    layer = tiny_hosts.nola_layers(model)["first"]
    factor, (alpha, _) = layer.nola_factors["default"][0], layer.coefficients("default")
    expected = factor(alpha).clone()
    doubled = torch.compile(lambda c: factor(c).mul_(2), fullgraph=True, backend=backend)
    for _ in range(2):
        assert torch.equal(doubled(alpha), 2 * expected)
        assert torch.equal(factor(alpha), expected)


def test_layers_of_one_shape_share_a_graph():
    """As many as a model has: a graph for each would meet dynamo's limit of recompilations."""
    host = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    names = [str(i) for i in range(12)]
    model = get_peft_model(host, NolaConfig(r=2, num_basis=3, target_modules=names, init="mean"))
    tiny_hosts.perturb(model)
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def through(layer, x):
        return layer(x)

    x = torch.linspace(-1, 1, 6)[None]
    for layer in tiny_hosts.nola_layers(model).values():
        assert torch.equal(through(layer, x), layer(x))
    assert counter.frame_count == 1


def pickled(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_has_factors_of_its_own(copied):
    model = tiny_hosts.perturb(tiny_hosts.adapted("mlp", modules_to_save=None)).requires_grad_(False)
    x, twin = torch.ones(4, 6), copied(model)
    expected = model(x)
    for layer in tiny_hosts.nola_layers(model).values():
        for factor in layer.nola_factors["default"]:
            factor.bits = 2
    assert torch.equal(torch.compile(twin, fullgraph=True, backend="eager")(x), expected)
    del model
    assert torch.equal(torch.compile(twin, fullgraph=True, backend="eager")(x), expected)
