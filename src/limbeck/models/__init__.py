"""Models: pretrained, drawn or cut out of others, by architecture.

Here: where any of them computes and in which precision, and what of it trains.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def device(name: str) -> torch.device:
    """`auto` is cuda where there is one, else the CPU; anything else is a torch device.

    Raises ValueError for a name that torch does not know, and for cuda where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"received device {name!r}, expected auto, cpu, cuda or another of torch's: {error}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"received device {name!r}, but torch finds no such device here; expected auto or cpu")
    return where


def precision(name: str, where: torch.device) -> torch.dtype:
    """The dtype of the matrix products: `auto` is bfloat16 on cuda and float32 on every CPU.

    So two CPUs differ in last bits only, whatever they have in hardware. Raises ValueError for a name that is no dtype
    of real numbers.
    """
    if name != "auto":
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"received precision {name!r}, expected auto, float32, bfloat16 or another of torch's")
        return dtype
    return torch.bfloat16 if where.type == "cuda" else torch.float32


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
