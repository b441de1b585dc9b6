"""Each kind of layer computes with W + s A B, where A B is written out from its bases."""

import itertools
import warnings

import materialised
import pytest
import tiny_hosts
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from limbeck.adapters import NolaConfig, quantise
from limbeck.adapters.basis import Bank, Stream
from limbeck.adapters.config import INITS


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, **options)


LAYERS = {
    "linear": lambda: nn.Linear(5, 6),
    "linear without bias": lambda: nn.Linear(5, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 5),
    "1x1": lambda: conv(5, 6, 1),
    "3x2": lambda: conv(5, 6, (3, 2)),
    "stride and padding": lambda: conv(5, 6, 3, stride=2, padding=1),
    "same": lambda: conv(5, 6, 3, padding="same"),
    "dilation": lambda: conv(5, 6, 3, padding=2, dilation=2, bias=False),
    "reflect": lambda: conv(5, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: conv(5, 6, 3, padding=1, padding_mode="circular"),
}


def one(kind, seed=0, **options):
    """(adapted model, frozen layer, input), in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = LAYERS[kind]().double()
        x = torch.randn(2, 5, 7, 6) if isinstance(layer, nn.Conv2d) else torch.randn(2, 3, 5)
    options = {"r": 2, "num_basis": (4, 3), "nola_alpha": 3, "target_modules": ["layer"]} | options
    return get_peft_model(One(layer), NolaConfig(**options)), layer, x.double().requires_grad_()


def with_update(layer, x, update):
    """What the layer makes of x when its weight, as a matrix [in, out], is `update` larger."""
    if isinstance(layer, Conv1D):
        return x @ (layer.weight + update) + layer.bias
    weight = layer.weight + update.t().reshape(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        return F.conv2d(x, weight, layer.bias, layer.stride, 0, layer.dilation)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "mean"},
        {"share_basis": False, "cache_bytes": 0, "chunk_size": 3},
        {"basis_distribution": "normal", "cache_bytes": 0, "chunk_size": 1},
        {"basis_distribution": "rademacher", "basis_seed": 9},
    ],
)
def test_output_and_gradients_are_those_of_the_written_out_update(kind, options):
    model, layer, x = one(kind, **options)
    tiny_hosts.perturb(model)
    config, (adapter,) = model.peft_config["default"], tiny_hosts.nola_layers(model).values()
    alpha, beta = adapter.coefficients("default")
    shape = (adapter.in_features, adapter.out_features)
    keys = materialised.shared_keys(config, shape) if config.share_basis else ("layer", "layer")
    expected = with_update(layer, x, materialised.update(config, keys, shape, alpha[0], beta[0]))
    output = model(x)
    close = 1e-6 if config.basis_distribution == "normal" else 1e-11  # another inverse of the normal CDF
    torch.testing.assert_close(output, expected, atol=close, rtol=close)
    direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    wanted = torch.autograd.grad((expected * direction).sum(), (x, alpha, beta))
    given = torch.autograd.grad((output * direction).sum(), (x, alpha, beta))
    torch.testing.assert_close(given, wanted, atol=10 * close, rtol=10 * close)
    assert min(grad.abs().max() for grad in wanted) > 1e-3


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_is_the_same_update_and_unmerging_takes_it_away(kind):
    model, layer, x = one(kind)
    tiny_hosts.perturb(model)
    weight, apart = layer.weight.clone(), model(x)
    (adapter,) = tiny_hosts.nola_layers(model).values()
    alpha, beta = adapter.coefficients("default")
    shape = (adapter.in_features, adapter.out_features)
    config = model.peft_config["default"]
    update = materialised.update(config, materialised.shared_keys(config, shape), shape, alpha[0], beta[0])
    model.merge_adapter()
    moved = layer.weight - weight if isinstance(layer, Conv1D) else (layer.weight - weight).flatten(1).t()
    torch.testing.assert_close(moved, update, atol=1e-12, rtol=0)
    assert moved.abs().max() > 0.1
    torch.testing.assert_close(model(x), apart, atol=1e-12, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.weight, weight, atol=1e-14, rtol=0)


@pytest.mark.parametrize("slices", [("q", "v"), ("k",), ("v", "q", "k")])
@pytest.mark.parametrize("share_basis", [True, False])
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
def test_fused_blocks_are_matrices_of_their_own(slices, share_basis, layer):
    inside, width = 5, 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = (nn.Linear(inside, 3 * width) if layer == "linear" else Conv1D(3 * width, inside)).double()
        x = torch.randn(2, 3, inside).double()
    config = NolaConfig(
        r=2, num_basis=(4, 3), target_modules=["layer"], fused_slices={"layer": slices}, share_basis=share_basis
    )
    model = tiny_hosts.perturb(get_peft_model(One(base), config))
    (adapter,) = tiny_hosts.nola_layers(model).values()
    update, shape = torch.zeros(inside, 3 * width).double(), (inside, width)
    for block, alpha, beta in zip(slices, *adapter.coefficients("default"), strict=True):
        keys = materialised.shared_keys(config, shape) if share_basis else (f"layer.{block}",) * 2
        start = {"q": 0, "k": width, "v": 2 * width}[block]
        update[:, start : start + width] = materialised.update(config, keys, shape, alpha, beta)
    torch.testing.assert_close(model(x), with_update(base, x, update), atol=1e-12, rtol=0)
    touched = (model(x) - base(x)).detach().abs().amax((0, 1)).view(3, width).amax(1)
    assert [bool(t > 1e-3) for t in touched] == [name in slices for name in ("q", "k", "v")]
    delta = adapter.get_delta_weight("default")
    torch.testing.assert_close(delta if layer == "conv1d" else delta.t(), update.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_the_count_is_the_number_of_coefficients_whatever_the_rank(name):
    matrices = {"mlp": 2, "gpt2": 2 * (2 + 1), "llama": 2 * 3, "t5": (2 + 1) * 2 + (4 + 1) * 2, "vit": 4, "conv": 3}
    for r in (1, 3, 11):
        model = tiny_hosts.adapted(name, r=r, modules_to_save=None)
        assert model.get_nb_trainable_parameters()[0] == matrices[name] * (7 + 5)
    budgets = [tiny_hosts.adapted(name, num_basis=(1, j), modules_to_save=None) for j in (1, 2, 3)]
    assert [b.get_nb_trainable_parameters()[0] for b in budgets] == [matrices[name] * (1 + j) for j in (1, 2, 3)]


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_the_start_changes_nothing_and_only_beta_learns_at_first(name):
    model = tiny_hosts.adapted(name)
    with torch.no_grad():  # attention takes other kernels where a weight is to train
        assert torch.equal(tiny_hosts.outputs(name, model), tiny_hosts.outputs(name, tiny_hosts.host(name)))
    tiny_hosts.outputs(name, model).square().sum().backward()
    for layer in tiny_hosts.nola_layers(model).values():
        assert not layer.nola_coefficients["default"].a.grad.any()
        assert layer.nola_coefficients["default"].b.grad.abs().min() > 0


@pytest.mark.parametrize("name", tiny_hosts.HOSTS)
def test_the_mean_start_moves_the_output_and_both_learn(name):
    model = tiny_hosts.adapted(name, init="mean")
    base, adapted = tiny_hosts.outputs(name, tiny_hosts.host(name)), tiny_hosts.outputs(name, model)
    assert (adapted - base).abs().max() > 1e-6
    adapted.square().sum().backward()
    for layer in tiny_hosts.nola_layers(model).values():
        assert all(c.grad.abs().min() > 0 for c in layer.coefficients("default"))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit"])
def test_an_initialiser_of_the_host_reaches_neither_bases_nor_coefficients(name, init):
    model = tiny_hosts.adapted(name, init=init)
    before = {key: layer.built("default") for key, layer in tiny_hosts.nola_layers(model).items()}
    host = model.get_base_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for parameter in host.parameters():
            vars(parameter).pop("_is_hf_initialized", None)
        for module in host.modules():
            vars(module).pop("_is_hf_initialized", None)
        host.apply(host._init_weights)
    key, layer = next(iter(tiny_hosts.nola_layers(model).items()))
    assert not torch.equal(layer.weight, dict(tiny_hosts.host(name).named_modules())[key].weight), "nothing was drawn"
    for key, layer in tiny_hosts.nola_layers(model).items():
        for old, new in zip(before[key], layer.built("default"), strict=True):
            assert torch.equal(old, new)


def test_a_basis_as_large_as_the_factor_fits_any_matrix_of_the_rank():
    """k = in r and l = r out: A and B are free, so NOLA is LoRA."""
    r, inside, out = 2, 5, 6
    model, *_ = one("linear", r=r, num_basis=(inside * r, r * out), init="mean", nola_alpha=r)
    (adapter,) = tiny_hosts.nola_layers(model).values()
    source = torch.Generator().manual_seed(0)
    factors = [torch.randn(s, generator=source, dtype=torch.float64) for s in ((inside, r), (r, out))]
    for coefficients, wanted, factor in zip(
        adapter.coefficients("default"), factors, adapter.nola_factors["default"], strict=True
    ):
        stream, number = factor.streams[0], factor.number
        drawn = materialised.bases(0, stream.key, stream.factor, stream.shape, number).flatten(1)
        solved = torch.linalg.solve(drawn.t() / number**0.5, wanted.flatten())
        coefficients.data.copy_(solved)
    torch.testing.assert_close(adapter.get_delta_weight("default").t(), factors[0] @ factors[1], atol=1e-9, rtol=0)


def test_with_nested_bases_the_best_residual_never_grows():
    """Bases are numbered without end, so those of a larger k contain those of a smaller."""
    target = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).flatten()
    residuals = []
    for k in range(1, 21):
        drawn = Stream(0, "5x4", "A", (5, 4)).draw(0, k).double().t()
        best = torch.linalg.lstsq(drawn, target[:, None]).solution
        residuals.append((drawn @ best - target[:, None]).norm().item())
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(residuals))
    assert residuals[-1] < 1e-9 < residuals[-2]


def test_a_convolution_to_few_channels_is_as_loras():
    model, layer, x = one("stride and padding")
    tiny_hosts.perturb(model)
    (adapter,) = tiny_hosts.nola_layers(model).values()
    a, b = adapter.built("default")
    lora = get_peft_model(One(layer), LoraConfig(r=2, lora_alpha=3, target_modules=["layer"]))
    lora.base_model.model.layer.lora_A["default"].weight.data = a[0].t().reshape(2, 5, 3, 3)
    lora.base_model.model.layer.lora_B["default"].weight.data = b[0].t()[:, :, None, None]
    torch.testing.assert_close(model(x), lora(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("trains", [True, False])
def test_coefficients_that_are_moved_train_as_before(trains):
    model = tiny_hosts.adapted("mlp")
    for layer in tiny_hosts.nola_layers(model).values():
        layer.requires_grad_(trains)
        layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
        for coefficients in layer.coefficients("default"):
            assert (coefficients.device.type, coefficients.requires_grad) == ("meta", trains)


def coarser(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantise(model, bits=2)


def other_numbers(model):
    for layer in tiny_hosts.nola_layers(model).values():
        for coefficients in layer.coefficients("default"):
            coefficients.data.mul_(-3)


def other_scale(model):
    for layer in tiny_hosts.nola_layers(model).values():
        layer.scaling["default"] *= 7


def another_bank(model):
    for layer in tiny_hosts.nola_layers(model).values():
        for factor in layer.nola_factors["default"]:
            factor.take_from(Bank({s: torch.zeros(20, s.size) for s in factor.streams}))


def another_adapter(model):
    model.add_adapter("other", NolaConfig(r=3, num_basis=2, basis_seed=4, init="mean", target_modules=["layer"]))
    model.merge_adapter(adapter_names=["other"])
    model.set_adapter("other")


def deleted(model):
    for layer in tiny_hosts.nola_layers(model).values():
        layer.delete_adapter("default")


def broken(model):
    model.add_adapter("nan", NolaConfig(r=1, num_basis=2, init="mean", target_modules=["layer"]))
    for layer in tiny_hosts.nola_layers(model).values():
        layer.coefficients("nan")[0].data.fill_(torch.nan)
    model.merge_adapter(adapter_names=["nan"])


MEANWHILE = [coarser, other_numbers, other_scale, another_bank, another_adapter, deleted, broken]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "3x2"])
@pytest.mark.parametrize("meanwhile", MEANWHILE, ids=lambda change: change.__name__)
def test_unmerging_gives_the_base_to_the_bit_whatever_has_become_of_the_adapter(meanwhile, kind, dtype):
    """PEFT subtracts what the adapter is now, so its base is off by the difference."""
    model, layer, _ = one(kind)
    tiny_hosts.perturb(model.to(dtype))
    before = layer.weight.clone()
    for safe_merge in (True, False):
        model.merge_adapter(safe_merge=safe_merge)
        assert not torch.equal(layer.weight, before)
        if not safe_merge:
            meanwhile(model)
        model.unmerge_adapter()
        assert torch.equal(layer.weight, before)
        assert not any(layer.merged for layer in tiny_hosts.nola_layers(model).values())


def test_unmerging_after_a_change_of_dtype_gives_the_base_in_it():
    model, layer, _ = one("linear")
    tiny_hosts.perturb(model)
    before = layer.weight.clone()
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before.float())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "3x2"])
def test_unmerging_keeps_what_else_was_done_to_the_base(kind):
    model, layer, _ = one(kind)
    tiny_hosts.perturb(model)
    wanted = layer.weight * 0.5 + 1
    delta = next(iter(tiny_hosts.nola_layers(model).values())).get_delta_weight("default")
    model.merge_adapter()
    layer.weight.data.sub_(delta).mul_(0.5).add_(1).add_(delta)
    other_numbers(model)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.weight, wanted, atol=1e-13, rtol=0)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_that_is_computed_is_no_place_to_merge(wrap):
    """What is written to it is lost at its next computation, and the branch would be skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = wrap(nn.Linear(5, 6))
    model = tiny_hosts.perturb(
        get_peft_model(One(layer), NolaConfig(r=2, num_basis=3, target_modules=["layer"])), spread=2
    )
    x = torch.ones(1, 5)
    expected = model(x)
    with pytest.raises(ValueError, match=r"received a weight that is computed from others, .* expected a parameter"):
        model.merge_adapter()
    assert torch.equal(model(x), expected)
