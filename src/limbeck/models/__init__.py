"""Models: pretrained, drawn or cut out of others, by architecture.

Here: where any of them computes and in which precision, and what of it trains.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_WIDE = 256


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def device(name: str) -> torch.device:
    """`auto` is cuda where there is one, else the CPU; anything else is a torch device."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def precision(name: str, *, width: int, where: torch.device) -> torch.dtype:
    """The dtype of the matrix products: `auto` is bfloat16 where that is faster, else float32.

    Faster on cuda, and from a hidden width of 256 on CPUs that multiply it in hardware (AMX, or AVX-512 with BF16);
    elsewhere it can be many times slower.
    """
    if name != "auto":
        return getattr(torch, name)
    hardware = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    fast = where.type == "cuda" or (where.type == "cpu" and width >= _WIDE and hardware)
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def autocast(where: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype` where it is not float32.

    On a CPU, attention is then written out: the backward of the fused one takes ten times as long in bfloat16 as in
    float32 (torch 2.13), a third of a training step.
    """
    low = dtype != torch.float32
    written_out = sdpa_kernel(SDPBackend.MATH) if low and where.type == "cpu" else contextlib.nullcontext()
    with torch.autocast(where.type, dtype, enabled=low), written_out:
        yield
