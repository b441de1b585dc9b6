"""The small residual network against a float64 twin, and what its batch norm uses in evaluation."""

import pytest
import torch
import torch.nn.functional as F

from limbeck.models import resnet


@pytest.fixture
def model():
    made = resnet.draw(channels=2, width=3, blocks=2, classes=4, seed=0).double()
    source = torch.Generator().manual_seed(1)
    for name, tensor in made.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.add_(0.2 * torch.rand(tensor.shape, generator=source, dtype=torch.float64))
    return made


def images(count=3, side=9):
    return torch.rand(count, 2, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def twin(state, x):
    """Logits in evaluation, from the names of the weights; kernels as matrices on unfolded patches."""

    def conv(x, name, stride):
        weight = state[f"{name}.weight"]
        patches = F.unfold(x, 3, padding=1, stride=stride)
        return (weight.flatten(1) @ patches).unflatten(2, [-(-side // stride) for side in x.shape[2:]])

    def norm(x, name):
        mean, var, scale, shift = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = norm(conv(x, "stem", 1), "norm").clamp(min=0)
    for index, stride in enumerate([1, 1, 2, 1, 2, 1]):
        block = f"blocks.{index}"
        inner = norm(conv(x, f"{block}.first", stride), f"{block}.first_norm").clamp(min=0)
        inner = norm(conv(inner, f"{block}.second", 1), f"{block}.second_norm")
        inner[:, : x.shape[1]] += x[:, :, ::stride, ::stride]
        x = inner.clamp(min=0)
    return x.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


def test_logits_equal_a_twin_in_float64(model):
    logits = model.eval()(images())
    assert logits.std() > 0.01
    torch.testing.assert_close(logits, twin(model.state_dict(), images()), atol=1e-10, rtol=1e-10)


def test_the_network_of_twenty_layers_has_the_published_size():
    """269,722 parameters: 0.27M in He et al., without parameters in the shortcuts."""
    model = resnet.draw(channels=3, width=16, blocks=3, classes=10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    assert sum(parameter.ndim > 1 for parameter in model.parameters()) == 20


def test_the_seed_draws_the_start_and_no_global_generator_is_touched(global_generators):
    before = global_generators()
    one, same, other = (resnet.draw(channels=1, width=8, blocks=1, classes=10, seed=s).state_dict() for s in (0, 0, 1))
    assert global_generators() == before
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["stem.weight"], other["stem.weight"])
    assert one["blocks.2.second.weight"].std() == pytest.approx((2 / 288) ** 0.5, rel=0.05)
    assert one["head.weight"].std() == pytest.approx(32**-0.5, rel=0.15)


def test_statistics_are_means_over_batches_whatever_was_seen_before(model):
    seen = images(8)
    model.train()(images(2) * 9)
    resnet.measure_statistics(model, seen, size=4)
    assert not model.training
    maps = [F.conv2d(batch, model.stem.weight, padding=1) for batch in (seen[:4], seen[4:])]
    mean = torch.stack([part.mean((0, 2, 3)) for part in maps]).mean(0)
    spread = torch.stack([part.var((0, 2, 3)) for part in maps]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, mean, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(model.norm.running_var, spread, atol=1e-12, rtol=1e-12)
