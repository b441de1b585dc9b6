"""What others compute for us is compared with a small twin: a kernel that is wrong on some processors is named."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from limbeck.adapters import NolaConfig, factor

LEVELS = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
LEVELS += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]


@pytest.fixture
def bitsandbytes():
    factor._read_back.cache_clear()
    yield pytest.importorskip("bitsandbytes")
    factor._read_back.cache_clear()


def in_four_bits(bitsandbytes, width, kind="nf4", dtype=torch.float32):
    """A layer, and its weight by looking its numbers up."""
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    made = bitsandbytes.nn.Linear4bit(width, 5, bias=False, compute_dtype=dtype, quant_type=kind)
    made.weight = bitsandbytes.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type=kind)
    made = made.to("cpu")
    numbers = torch.stack([made.weight.view(-1) >> 4, made.weight.view(-1) & 15], 1).view(-1).long()
    blocks = nn.functional.pad(weight.to(dtype).float().view(-1), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1).repeat_interleave(64)[: weight.numel()]
    return made, (torch.tensor(LEVELS)[numbers[: weight.numel()]] * scales).view_as(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 32, 40, 64, 96, 100, 128, 160, 192, 320])
def test_four_bits_that_are_not_refused_multiply_as_their_levels_do(bitsandbytes, width, dtype):
    """On processors with AVX-512, bitsandbytes 0.50 is wrong where blocks end in the middle of rows."""
    base, twin = in_four_bits(bitsandbytes, width, dtype=dtype)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    right = torch.allclose(base(x).float(), x.float() @ twin.t(), rtol=0.05, atol=0.3)
    config = NolaConfig(r=2, num_basis=3, target_modules=["0"])
    if right:
        get_peft_model(nn.Sequential(base), config)
    else:
        with pytest.raises(ValueError, match=rf"received 0 of {width} inputs in nf4, which bitsandbytes reads"):
            get_peft_model(nn.Sequential(base), config)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("kernel", ["quantize_4bit", "dequantize_4bit", "matmul_4bit"])
def test_a_wrong_kernel_is_refused_by_name(bitsandbytes, kernel, kind, monkeypatch):
    base, _ = in_four_bits(bitsandbytes, 64, kind)
    where = bitsandbytes if kernel == "matmul_4bit" else bitsandbytes.functional
    right = getattr(where, kernel)

    def wrong(weight, *args, **kwargs):
        out = right(weight.roll(1, -1) if kernel == "quantize_4bit" else weight, *args, **kwargs)
        return out.roll(1, -1) if kernel != "quantize_4bit" else out

    monkeypatch.setattr(where, kernel, wrong)
    with pytest.raises(ValueError, match=rf"received 0 of 64 inputs in {kind}, which bitsandbytes .* expected"):
        get_peft_model(nn.Sequential(base), NolaConfig(r=2, num_basis=3, target_modules=["0"]))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("width", [1, 3, 8, 17, 31, 32, 33, 63, 64, 65, 100, 129])
def test_torchs_products_and_convolutions_are_those_of_float64(width, dtype, bound):
    """oneDNN takes other kernels by dtype, width and processor."""
    generator = torch.Generator().manual_seed(width)
    x, w = (torch.randn(*s, generator=generator).to(dtype) for s in ((5, width), (7, width)))
    expected = x.double() @ w.double().t()
    torch.testing.assert_close((x @ w.t()).double(), expected, rtol=bound, atol=bound * width**0.5)
    torch.testing.assert_close(nn.functional.linear(x, w).double(), expected, rtol=bound, atol=bound * width**0.5)
    image, kernel = (torch.randn(*s, generator=generator).to(dtype) for s in ((2, width, 5, 4), (3, width, 3, 2)))
    expected = nn.functional.unfold(image.double(), (3, 2), padding=1).transpose(1, 2) @ kernel.double().flatten(1).t()
    found = nn.functional.conv2d(image, kernel, padding=1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound * (6 * width) ** 0.5)
