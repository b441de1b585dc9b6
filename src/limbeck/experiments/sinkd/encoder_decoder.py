"""SinKD between encoder-decoders: a T5 is taught to classify in words, and a smaller T5 learns from it.

All weights of both are trained. An answer ends in the end token, which is a position of every loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import generation, generation_cells
from limbeck.models import language


@dataclass(frozen=True)
class Params(generation_cells.Section):
    """The section of params/sinkd.yaml; sources stand there."""


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, the selection runs, then every arm by seed."""
    return generation_cells.cells(params, seeds)


def run(cell: Cell, params: Params, place: Workspace) -> generation.Steps:
    """Train and score one cell; yields once a step. An untrained model is drawn by the cell's seed."""
    tokenizer, data = generation.prepare(params, ends=True)
    teaching = cell.coordinates["phase"] == "teacher"
    name = params.teacher if teaching else params.student
    model = language.load(name, tokenizer, seed=cell.coordinates["seed"])
    run = generation.Run(model, data, params, place)
    return (yield from generation.train_teacher(run) if teaching else generation.train_student(run, cell.coordinates))
