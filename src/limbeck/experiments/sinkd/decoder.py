"""SinKD between decoders: as `generation`, with only a part of each model trained, and answers without an end token.

The teacher's last layers are fine-tuned. The student is another decoder of the same vocabulary, or the first layers of
the untrained teacher (`first-4`), which then shares the frozen embeddings and head with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import generation
from limbeck.experiments.sinkd.distillation import Steps
from limbeck.models import language
from limbeck.params import positive


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    generation: generation.Params
    teacher_trained_layers: int

    def __post_init__(self) -> None:
        positive(teacher_trained_layers=self.teacher_trained_layers)


def cells(section: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, the selection runs, then every arm by seed."""
    own = {"teacher_trained_layers": section.teacher_trained_layers}
    return [replace(cell, inputs=cell.inputs | own) for cell in generation.cells(section.generation, seeds)]


def run(cell: Cell, section: Params, workspace: Workspace) -> Steps:
    """Train and score one cell; yields once a step."""
    shared = section.generation
    tokenizer, data = generation.tokenizer_and_splits(shared, ends=False)
    if cell.coordinates["phase"] == "teacher":
        model = language.load(shared.teacher, tokenizer, seed=shared.loop.teacher_seed)
        model = language.train_last_layers(model, section.teacher_trained_layers)
    else:
        model = student_at_start(shared, tokenizer)
    return (yield from generation.train(model, data, cell, shared, workspace))


def student_at_start(section: generation.Params, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The student, the same for every seed: seeds differ in the order of the texts."""
    _, first, layers = section.student.rpartition("first-")
    model = language.load(section.teacher if first else section.student, tokenizer, seed=section.loop.teacher_seed)
    if first:
        model = language.keep_first_layers(model, int(layers))
    return language.train_last_layers(model, model.config.num_hidden_layers)
