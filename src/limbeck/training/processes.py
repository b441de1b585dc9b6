"""Work shared by the processes of `torch.distributed`, as accelerate or torchrun start them; alone, all of it."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import Tensor, distributed

T = TypeVar("T")


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def chunk(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items; all parts in the order of the processes are the items.

    Raises ValueError where there are fewer items than processes.
    """
    if len(items) < count():
        raise ValueError(f"received {len(items)} items for {count()} processes, expected at least one each")
    return items[len(items) * rank() // count() : len(items) * (rank() + 1) // count()]


def gathered(part: T) -> list[T]:
    """What each process gives, in their order, on all of them."""
    parts: list[T] = [part] * count()
    if count() > 1:
        distributed.all_gather_object(parts, part)
    return parts


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if count() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)
