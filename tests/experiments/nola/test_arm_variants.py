"""What the ablations change of an attached adapter, its scale, bases and bits, against a plain twin."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from limbeck import models, seeding
from limbeck.adapters import NolaConfig
from limbeck.adapters.basis import Stream
from limbeck.adapters.factor import packed
from limbeck.experiments.nola import arms
from limbeck.training import supervised

IN, OUT, RANK, NUMBER = 6, 5, 2, 9


def module(dtype=torch.float64):
    """One frozen linear layer of 6 inputs and 5 outputs."""
    layer = nn.utils.skip_init(nn.Linear, IN, OUT, bias=False, dtype=dtype)
    layer.weight.data.normal_(generator=seeding.generator(0, "layer"))
    return nn.Sequential(layer).requires_grad_(False)


def nola(dtype=torch.float64, **more):
    return get_peft_model(
        module(dtype), NolaConfig(**{"r": RANK, "num_basis": NUMBER, "nola_alpha": 3, "target_modules": ["0"]} | more)
    )


def lora(dtype=torch.float64):
    """LoRA of which nothing is 0."""
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(module(dtype), LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"]))
    return shaken(model)


def shaken(model):
    source = seeding.generator(1, "shaken")
    for weight in models.trainable(model).values():
        weight.data.normal_(generator=source)
    return model


def data(rows=8):
    source = seeding.generator(2, "data")
    return [torch.randn(rows, width, generator=source, dtype=torch.float64) for width in (IN, OUT)]


def delta(model):
    (layer,) = (m for m in model.modules() if hasattr(m, "get_delta_weight"))
    return layer.get_delta_weight("default").detach()


def trained(model, rate, clip_norm, steps=6):
    """The loss of every step."""
    x, y = data()
    batches = [torch.arange(8)] * steps
    run = supervised.fit(
        models.trainable(model),
        lambda rows: {"loss/square": (model(x[rows]) - y[rows]).square().mean()},
        batches,
        learning_rate=rate,
        clip_norm=clip_norm,
        state=None,
        save_every=1,
    )
    return [step["loss/square"] for step in run]


@pytest.mark.parametrize("clip_norm", [0.05, 1e9])
def test_unscaled_training_is_that_of_coefficients_without_the_root(clip_norm):
    """A twin with A = A0 + sum alpha A_i, in float64, by another implementation of AdamW; also where it clips."""
    x, y = data()
    shapes = {"A": (IN, RANK), "B": (RANK, OUT)}
    drawn = {n: Stream(0, "x".join(map(str, s)), n, s).draw(0, NUMBER).double() for n, s in shapes.items()}
    start = Stream(0, "6x2", "A0", shapes["A"]).draw(0, 1).double().view(IN, RANK) / math.sqrt(IN)
    alpha, beta = (torch.zeros(NUMBER, dtype=torch.float64, requires_grad=True) for _ in "AB")
    optimiser = torch.optim.AdamW([alpha, beta], lr=0.01, weight_decay=0.0, foreach=False)
    weight, losses = module()[0].weight, []
    for step in range(6):
        a, b = start + (alpha @ drawn["A"]).view(IN, RANK), (beta @ drawn["B"]).view(RANK, OUT)
        loss = (x @ weight.T + 1.5 * x @ a @ b - y).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([alpha, beta], clip_norm)
        optimiser.param_groups[0]["lr"] = 0.01 * (1 - step / 6)
        optimiser.step()
    model = nola()
    root = arms.unscale(model)
    assert root == 3.0
    assert trained(model, root * 0.01, clip_norm) == pytest.approx(losses, rel=1e-10)
    assert losses != pytest.approx(trained(nola(), 0.01, clip_norm), rel=1e-3), "the scale changes something"


def test_unscaled_training_needs_one_number_of_bases():
    with pytest.raises(ValueError, match=r"received k and l among \[3, 4\], expected one number"):
        arms.unscale(nola(num_basis=(3, 4)))


def test_orthogonal_bases_have_the_variance_and_the_span_of_the_uniform_ones_and_are_used():
    model, plain = (nola(num_basis=(7, 4)) for _ in range(2))
    arms.orthogonalise(model)
    given = model.base_model.bank.given
    assert {(stream.factor, len(bases)) for stream, bases in given.items()} == {("A", 7), ("B", 4)}
    for stream, bases in given.items():
        uniform = stream.draw(0, len(bases))
        expected = torch.eye(len(bases)) * stream.size / 3
        torch.testing.assert_close(bases @ bases.T, expected, atol=1e-5, rtol=1e-5)
        assert torch.linalg.matrix_rank(torch.cat([bases, uniform]), rtol=1e-5) == len(bases)
        torch.testing.assert_close(bases[0] / bases[0].norm(), uniform[0] / uniform[0].norm())
    a, b = (given[stream].double() for stream in sorted(given, key=lambda stream: stream.factor))
    start = Stream(0, "6x2", "A0", (IN, RANK)).draw(0, 1).double().view(IN, RANK) / math.sqrt(IN)
    layer = next(m for m in shaken(model).modules() if hasattr(m, "coefficients"))
    alpha, beta = (c.detach()[0] for c in layer.coefficients("default"))
    left, right = start + (alpha @ a).view(IN, RANK) / math.sqrt(7), (beta @ b).view(RANK, OUT) / 2
    torch.testing.assert_close(delta(model), 1.5 * (left @ right).T)
    assert not torch.allclose(delta(model), delta(shaken(plain)))


def test_more_bases_than_entries_cannot_be_orthogonal():
    with pytest.raises(ValueError, match="received 11 bases of 10 entries"):
        arms.orthogonalise(nola(num_basis=11))


def nearest(vector, bits):
    """The nearest level of each value, by looking at all of them."""
    top = 2 ** (bits - 1) - 1
    levels = [step * max(map(abs, vector)) / top for step in range(-top, top + 1)]
    return [min(levels, key=lambda level: abs(level - value)) for value in vector]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lora_is_rounded_by_rows_of_a_and_columns_of_b_after_and_in_training_alike(bits):
    model, other = lora(), lora()
    (layer,) = (m for m in model.modules() if hasattr(m, "get_delta_weight"))
    a = torch.tensor([nearest(row, bits) for row in layer.lora_A["default"].weight.tolist()])
    b = torch.tensor([nearest(column, bits) for column in layer.lora_B["default"].weight.T.tolist()]).T
    arms.round_after(model, bits)
    torch.testing.assert_close(delta(model), (1.5 * b @ a).double(), rtol=1e-5, atol=1e-6)
    arms.round_in_training(other, bits)
    x, _ = data()
    torch.testing.assert_close(other(x), model(x))
    assert not torch.allclose(lora()(x), model(x), rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 8])
def test_nola_in_training_computes_with_what_rounding_after_leaves(bits):
    model, other = shaken(nola()), shaken(nola())
    arms.round_after(model, bits)
    arms.round_in_training(other, bits)
    x, _ = data()
    torch.testing.assert_close(other(x), model(x))
    assert not torch.allclose(shaken(nola())(x), model(x), rtol=1e-4)


def test_the_gradient_passes_the_rounding_of_lora_straight():
    """It is that of a model which holds the rounded numbers."""
    straight, held = lora(), lora()
    arms.round_in_training(straight, 3)
    arms.round_after(held, 3)
    x, y = data()
    for model in (straight, held):
        (model(x) - y).square().sum().backward()
    gradients = [[weight.grad for weight in models.trainable(model).values()] for model in (straight, held)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_size_of_nola_is_that_of_the_tensors_in_its_file(bits):
    model = shaken(nola(torch.float32, num_basis=(9, 5)))
    assert arms.number_bytes(model, None) == 4 * (9 + 5)
    arms.round_after(model, bits)
    file = get_peft_model_state_dict(model)
    held = [tensor.nbytes for name, tensor in file.items() if ".nola_coefficients." in name]
    assert arms.number_bytes(model, bits) == sum(held)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_size_of_lora_counts_two_vectors_a_rank_also_in_training(bits):
    model = lora(torch.float32)
    assert arms.number_bytes(model, None) == 4 * RANK * (IN + OUT)
    vectors = [torch.zeros(RANK, width, dtype=torch.int8) for width in (IN, OUT)]
    expected = sum(packed(vector, bits).nbytes + 4 * RANK for vector in vectors)
    assert arms.number_bytes(model, bits) == expected
    arms.round_in_training(model, bits)
    assert arms.number_bytes(model, bits) == expected
