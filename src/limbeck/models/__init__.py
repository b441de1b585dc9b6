"""Models: pretrained, drawn or cut out of others, by architecture.

Here: where any of them computes, in which precision and mode, what of it trains, and whether a shortcut to its logits
gives what the model itself says.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_agreed: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode for a while; afterwards each of its modules is in the mode that it was in.

    In training mode dropout draws, and with gradient checkpointing transformers ignores the cache.
    Raises ValueError for a module that stays in training mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for name, module in model.named_modules():
            if module.training:
                raise ValueError(
                    f"received the module {name!r}, which stays in training mode; expected one that leaves it"
                )
        yield
    finally:
        for module, training in modes:
            module.training = training


def agrees(
    model: nn.Module,
    name: str,
    shortcut: Callable[[], Tensor],
    own: Callable[[], Tensor],
    *,
    tolerance: float = 0.0,
) -> bool:
    """Whether a shortcut gives what the model's own forward does; tried once per model and name of the shortcut.

    In evaluation mode and without gradient. At tolerance 0 to the bit, else up to that share of the largest finite
    value. A shortcut that raises does not agree.
    Raises ValueError for a model that answers twice otherwise to one question.
    """
    known = _agreed.setdefault(model, {})
    if name not in known:
        with torch.no_grad(), evaluating(model):
            expected = own()
            if not _equal(expected, own(), 0.0):
                raise ValueError("received a model that answers otherwise when asked again, expected no chance in it")
            try:
                known[name] = _equal(expected, shortcut(), tolerance)
            except Exception:  # whatever it is: the way of the model's own forward is left
                known[name] = False
    return known[name]


def likeliest(logits: Float[Tensor, "*row classes"]) -> Int[Tensor, "*row"]:
    """The index of each row's largest logit. Raises ValueError for NaN, which torch takes for the largest."""
    if (missing := logits.isnan()).any():
        row = missing.nonzero()[0, :-1].tolist()
        raise ValueError(f"received {int(missing.sum())} NaN among the logits, the first in row {row}, expected none")
    return logits.argmax(-1)


def _equal(expected: Tensor, received: Tensor, tolerance: float) -> bool:
    largest = expected.masked_fill(~expected.isfinite(), 0).abs().max().item() if tolerance else 0.0
    same = received.shape == expected.shape
    return same and torch.allclose(received, expected, rtol=0.0, atol=tolerance * largest, equal_nan=True)
