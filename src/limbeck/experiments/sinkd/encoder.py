"""What SinKD's encoder experiments share before training: their parameters, splits, the teacher and its students.

A pretrained encoder is fine-tuned as teacher. A student is the first layers of the
same pretrained encoder (`first-2`), or as many layers drawn at random over its embeddings (`random-3`).
"""

import functools
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from limbeck import models
from limbeck.params import positive
from limbeck.tasks import classification

SPLITS = ("train", "validation", "test")
Splits = dict[str, classification.Encoded]


@dataclass(frozen=True)
class Section:
    """What every encoder experiment has in params/sinkd.yaml; sources stand there."""

    model: str
    longest: int
    split_sizes: tuple[int, ...]
    split_seed: int
    teacher_seed: int
    teacher_epochs: int
    teacher_learning_rate: float
    epochs: int
    learning_rate: float
    batch_size: int
    clip_norm: float
    save_every: int
    matching_batches: int
    kl_temperature: float
    temperature: float
    epsilon: float
    iterations: int
    p: int
    group: int
    dkd_target: float
    dkd_rest: float
    rkd_angle: float

    def __post_init__(self) -> None:
        """Check what no type can."""
        if len(self.split_sizes) != len(SPLITS):
            raise ValueError(f"split_sizes must hold one number each for {', '.join(SPLITS)}, got {self.split_sizes}")
        positive(**{name: value for name, value in asdict(self).items() if type(value) is float})
        positive(batch_size=self.batch_size, epochs=self.epochs, iterations=self.iterations, group=self.group)
        positive(save_every=self.save_every, longest=self.longest)


def layers_of(student: str) -> tuple[str, int]:
    """`first-2` as ("first", 2). Raises ValueError for another spelling."""
    kind, _, layers = student.partition("-")
    if kind not in ("first", "random") or not layers.isdecimal():
        raise ValueError(f"a student is spelled first-N or random-N, N layers, got {student!r}")
    return kind, int(layers)


@functools.lru_cache(maxsize=8)
def _splits(model: str, task: str, longest: int, sizes: tuple[int, ...], seed: int) -> tuple[Splits, tuple[str, ...]]:
    parts = classification.splits(task, sizes, seed=seed)
    names, tokenizer = classification.class_names(parts), models.load_tokenizer(model)
    encoded = [classification.encode(part, tokenizer, longest=longest, classes=names) for part in parts]
    return dict(zip(SPLITS, encoded, strict=True)), names


def splits(section: Section, task: str) -> tuple[Splits, tuple[str, ...]]:
    """The three splits of a task by name, and the class names."""
    return _splits(section.model, task, section.longest, section.split_sizes, section.split_seed)


def pretrained(section: Section, classes: int, seed: int, student: str = "") -> PreTrainedModel:
    """The pretrained encoder, or a student of it, with a head of its own; embeddings frozen."""
    model = models.load_encoder(section.model, classes=classes, seed=seed)
    if student:
        kind, layers = layers_of(student)
        model = models.first_layers(model, layers)
        model = models.redraw_layers(model, seed) if kind == "random" else model
    return models.read_first_token(models.freeze_embeddings(model))


def spelled(task: str) -> str:
    """A task's name as a coordinate or a file may hold it."""
    return "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in task)
