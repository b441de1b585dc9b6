"""SinKD between decoders: a language model is taught to classify in words, and a part of it learns from it.

The teacher's last layers are fine-tuned. The student is another decoder of the same vocabulary, or the first layers of
the untrained teacher (`first-4`), which then shares the frozen embeddings and head with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import generation, generation_cells
from limbeck.models import language
from limbeck.params import positive


@dataclass(frozen=True)
class Params(generation_cells.Section):
    """The section of params/sinkd.yaml; sources stand there."""

    teacher_trained_layers: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        positive(teacher_trained_layers=self.teacher_trained_layers)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, the selection runs, then every arm by seed."""
    return generation_cells.cells(params, seeds)


def run(cell: Cell, params: Params, place: Workspace) -> generation.Steps:
    """Train and score one cell; yields once a step."""
    tokenizer, data = generation.prepare(params, ends=False)
    if cell.coordinates["phase"] == "teacher":
        model = language.load(params.teacher, tokenizer, seed=params.teacher_seed)
        model = language.train_last_layers(model, params.teacher_trained_layers)
        return (yield from generation.train_teacher(generation.Run(model, data, params, place)))
    model = _student(params, tokenizer)
    return (yield from generation.train_student(generation.Run(model, data, params, place), cell.coordinates))


def _student(params: Params, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The student at its start, the same for every seed: seeds differ in the order of the texts."""
    _, first, layers = params.student.rpartition("first-")
    model = language.load(params.teacher if first else params.student, tokenizer, seed=params.teacher_seed)
    if first:
        model = language.keep_first_layers(model, int(layers))
    return language.train_last_layers(model, model.config.num_hidden_layers)
