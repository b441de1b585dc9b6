"""What SinKD's encoder experiments share before training: their parameters, splits, the teacher and its students.

A pretrained encoder is fine-tuned as teacher. A student is the first layers of the
same pretrained encoder (`first-2`), or as many layers drawn at random over its embeddings (`random-3`).
"""

import functools
from dataclasses import dataclass

from transformers import PreTrainedModel

from limbeck.experiments.sinkd import section as common
from limbeck.experiments.sinkd.section import SPLITS
from limbeck.models import encoders
from limbeck.params import positive
from limbeck.tasks import classification

Splits = dict[str, classification.Encoded]


@dataclass(frozen=True)
class Section(common.Section):
    """What every encoder experiment has in params/sinkd.yaml; sources stand there."""

    model: str
    temperature: float
    p: int
    group: int
    dkd_target: float
    dkd_rest: float
    rkd_angle: float

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        positive(group=self.group)


def layers_of(student: str) -> tuple[str, int]:
    """`first-2` as ("first", 2). Raises ValueError for another spelling."""
    kind, _, layers = student.partition("-")
    if kind not in ("first", "random") or not layers.isdecimal():
        raise ValueError(f"a student is spelled first-N or random-N, N layers, got {student!r}")
    return kind, int(layers)


@functools.lru_cache(maxsize=8)
def _splits(model: str, task: str, longest: int, sizes: tuple[int, ...], seed: int) -> tuple[Splits, tuple[str, ...]]:
    parts = classification.splits(task, sizes, seed=seed)
    names, tokenizer = classification.class_names(parts), encoders.load_tokenizer(model)
    encoded = [classification.encode(part, tokenizer, longest=longest, classes=names) for part in parts]
    return dict(zip(SPLITS, encoded, strict=True)), names


def splits(section: Section, task: str) -> tuple[Splits, tuple[str, ...]]:
    """The three splits of a task by name, and the class names."""
    return _splits(section.model, task, section.longest, section.split_sizes, section.split_seed)


def pretrained(section: Section, classes: int, seed: int, student: str = "") -> PreTrainedModel:
    """The pretrained encoder, or a student of it, with a head of its own; embeddings frozen."""
    model = encoders.load_encoder(section.model, classes=classes, seed=seed)
    if student:
        kind, layers = layers_of(student)
        model = encoders.first_layers(model, layers)
        model = encoders.redraw_layers(model, seed) if kind == "random" else model
    return encoders.read_first_token(encoders.freeze_embeddings(model))


def spelled(task: str) -> str:
    """A task's name as a coordinate or a file may hold it."""
    return "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in task)
