"""Text classification: examples, splits without duplicates, and token batches without much padding.

A data set is named in the parameters: a task of this package, or a local folder or hub name for `datasets`, with
the columns `text` and `label`, whose splits are pooled without the unlabelled rows (-1). Before splitting, a text
that occurs twice is kept once, and one with two labels is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from limbeck import seeding
from limbeck.tasks import multiwoz_acts


class Example(NamedTuple):
    """One text and the name of its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Encoded:
    """A split as padded token ids, its lengths and its class indices."""

    ids: Int[Tensor, "row time"]
    lengths: Int[Tensor, " row"]
    labels: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Int[Tensor, " batch"]) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"]]:
        """Token ids and attention mask of some rows, no wider than the longest of them."""
        lengths = self.lengths[index]
        positions = torch.arange(int(lengths.max()))
        return self.ids[index, : len(positions)], (positions < lengths[:, None]).long()


def examples(name: str) -> list[Example]:
    """Every example of a data set, without duplicates, in an order that depends on the texts alone."""
    pairs = multiwoz_acts.pairs() if name == multiwoz_acts.NAME else _from_datasets(name)
    labels: dict[str, set[str]] = {}
    spelling: dict[str, str] = {}
    for text, label in pairs:
        key = " ".join(text.lower().split())
        labels.setdefault(key, set()).add(label)
        spelling.setdefault(key, text)
    return [Example(spelling[key], *labels[key]) for key in sorted(labels) if len(labels[key]) == 1]


def _from_datasets(name: str) -> list[tuple[str, str]]:
    from datasets import Dataset, concatenate_datasets, load_dataset  # noqa: PLC0415  (slow, and only needed here)

    rows: Dataset = concatenate_datasets(list(load_dataset(name).values()))
    if missing := {"text", "label"} - set(rows.column_names):
        raise ValueError(
            f"data set {name} needs the columns text and label; {sorted(missing)} not in {rows.column_names}"
        )
    return [(text, str(label)) for text, label in zip(rows["text"], rows["label"], strict=True) if label != -1]


def encode(
    found: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, longest: int
) -> tuple[Encoded, tuple[str, ...]]:
    """Token ids of the examples that have at most `longest` tokens, and the class names in index order."""
    tokens = tokenizer([example.text for example in found])["input_ids"]
    kept = [(ids, example.label) for ids, example in zip(tokens, found, strict=True) if len(ids) <= longest]
    if not kept:
        raise ValueError(f"no text has at most {longest} tokens; the shortest has {min(map(len, tokens), default=0)}")
    classes = tuple(sorted({label for _, label in kept}))
    padded = torch.full((len(kept), longest), tokenizer.pad_token_id)
    for row, (ids, _) in enumerate(kept):
        padded[row, : len(ids)] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids, _ in kept])
    return Encoded(padded, lengths, torch.tensor([classes.index(label) for _, label in kept])), classes


def split(data: Encoded, sizes: Sequence[int], *, seed: int) -> list[Encoded]:
    """Disjoint random parts of the given sizes. Raises ValueError if there are too few rows."""
    if sum(sizes) > len(data):
        raise ValueError(f"splits of {list(sizes)} need {sum(sizes)} rows, the data set has {len(data)}")
    order = torch.randperm(len(data), generator=seeding.generator(seed, "split"))
    parts = torch.split(order[: sum(sizes)], list(sizes))
    return [Encoded(data.ids[part], data.lengths[part], data.labels[part]) for part in parts]


def batches(lengths: Int[Tensor, " row"], *, size: int, seed: int, epoch: int, pool: int = 8) -> list[Tensor]:
    """Row indices of one epoch's batches: shuffled, then sorted by length within pools of `pool` batches.

    So a batch holds texts of like length and little padding, yet differs from epoch to epoch; a last short batch is
    kept. Batches are in random order.
    """
    source = seeding.generator(seed, "order", epoch)
    order = torch.randperm(len(lengths), generator=source)
    pools = [chunk[torch.argsort(lengths[chunk], stable=True)] for chunk in torch.split(order, size * pool)]
    cut = [batch for chunk in pools for batch in torch.split(chunk, size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=source).tolist()]
