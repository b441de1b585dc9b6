"""Cells of experiments on tiny models and texts, driven without a ledger."""

import dataclasses
import importlib

import torch

from limbeck import digests, params
from limbeck.experiments.runs import Workspace

SMALL = {
    "longest": 12,
    "split_sizes": (48, 24, 24),
    "teacher_epochs": 10,
    "teacher_learning_rate": 0.01,
    "epochs": 1,
    "learning_rate": 0.01,
    "batch_size": 16,
    "group": 16,
    "save_every": 1,
    "matching_batches": 1,
}


def section(experiment, model, **changes):
    """The committed smoke section of an experiment on a model from a folder: three steps per epoch."""
    module = importlib.import_module(digests.module_of("sinkd", experiment))
    committed = params.load("sinkd", experiment, "smoke", module.Params)
    return changed(committed, model=model, **SMALL | changes)


def changed(section, **changes):
    """The section with some values changed, in whichever of its parts they stand."""
    if unknown := changes.keys() - params.flat(section).keys():
        raise ValueError(f"received {sorted(unknown)}, expected values of {type(section).__name__}")
    fields = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            fields[field.name] = changed(value, **{k: v for k, v in changes.items() if k in params.flat(value)})
        elif field.name in changes:
            fields[field.name] = changes[field.name]
    return dataclasses.replace(section, **fields)


def place(folder, name, found=()):
    """Where one cell runs: checkpoints in `folder`, its state under its name, after the records `found`."""
    return Workspace(folder, folder / name / "state", list(found), torch.device("cpu"), "float32")


def drive(module, params, cell, where, kill_at=None):
    """A cell's result, or None where it was left at a step."""
    steps = module.run(cell, params, where)
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            return stop.value
        if step["step"] == kill_at:
            return None


def run_all(module, params, folder, seeds=(0,)):
    """The records of every cell, each run with those of the turns before its own."""
    found = []
    for number, cell in enumerate(module.cells(params, seeds)):
        earlier = [run for run in found if run["wave"] < cell.wave]
        result = drive(module, params, cell, place(folder, str(number), earlier))
        found.append(
            {"cell": cell.coordinates, "wave": cell.wave, "checkpoint_files": cell.checkpoint_files} | vars(result)
        )
    return found


def pick(found, **coordinates):
    """The one record at these coordinates."""
    (run,) = [run for run in found if coordinates.items() <= run["cell"].items()]
    return run
