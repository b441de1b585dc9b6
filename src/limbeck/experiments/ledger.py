"""Which cells of an experiment are missing or stale, and the running of those.

A cell's hash covers its coordinates, its inputs (hyperparameters, checksums of assets), the machine's part of
params.yaml (threads, device, precision) and the code of its experiment's import closure. A cell is settled when its
record carries that hash and the hash is in the list of what was run with the checkpoints at hand (`settled.json`,
beside them). So a fresh clone, which has records but no checkpoints, retrains; a killed run goes on where it was;
and an added seed runs alone. The records of `full` take hours, and are taken as they were committed; if one is
added on another machine, its teacher is trained again there.
"""

import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from tqdm import tqdm

from limbeck import closure, models, params, paths, records
from limbeck.experiments.cells import Cell, Place, Result

_TRUSTED = ("full",)


def run(paper: str, experiment: str, profile: str) -> list[dict[str, Any]]:
    """Bring every cell of an experiment up to date and return all its records, in the order of the cells.

    Raises ValueError for bad parameters, before anything is written.
    """
    module_name = f"limbeck.experiments.{paper}.{experiment}"
    if closure.module_file(module_name) is None:
        raise ValueError(f"expected an experiment of {paper} (a module {module_name}), got {experiment!r}")
    module = importlib.import_module(module_name)
    settings = params.settings()
    section = params.load(paper, experiment, profile, module.Params)
    device = models.device(settings.device)
    machine = [settings.threads, settings.device, settings.precision]
    ledger = Ledger(paper, experiment, profile, [*machine, closure.digest(module_name)], device.type)
    cells = module.cells(section, settings.seeds)
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for position, cell in enumerate(cells):
        if ledger.is_stale(cell, cells):
            label = (
                f"{paper} {experiment} [{profile}] {position + 1}/{len(cells)} {records.cell_name(cell.coordinates)}"
            )
            place = Place(
                ledger.checkpoints,
                ledger.state(cell),
                [ledger.record(c) for c in cells[:position]],
                device,
                settings.precision,
            )
            ledger.settle(cell, _drive(module, cell, section, place, label))
    ledger.prune(cells)
    return [ledger.record(cell) for cell in cells]


def _drive(module: ModuleType, cell: Cell, section: Any, place: Place, label: str) -> Result:
    """Run one cell to its end, with a bar that says what it is."""
    steps = module.run(cell, section, place)
    with tqdm(desc=label, unit="step", mininterval=1.0, dynamic_ncols=True, file=sys.stderr) as bar:
        while True:
            try:
                record = next(steps)
            except StopIteration as stop:
                return stop.value
            bar.total = record["steps"]
            bar.update(record["step"] - bar.n)


class Ledger:
    """The records of one experiment, and which of them stand."""

    def __init__(self, paper: str, experiment: str, profile: str, common: list, device: str) -> None:
        self.identity = {"paper": paper, "experiment": experiment, "profile": profile}
        self.common = common
        self.results = paths.RESULTS / profile / paper / experiment
        self.checkpoints = paths.DATA / "checkpoints" / profile / paper / experiment
        self.resume = paths.DATA / "resume" / profile / paper / experiment / device
        self.settled_file = self.checkpoints / "settled.json"
        self.settled: set[str] = (
            set(json.loads(self.settled_file.read_text())) if self.settled_file.is_file() else set()
        )

    def hash(self, cell: Cell) -> str:
        """What the cell's record must carry to stand."""
        parts = [self.identity["paper"], self.identity["experiment"], cell.coordinates, cell.inputs, *self.common]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def path(self, cell: Cell) -> Path:
        """Where the cell's record lies."""
        return self.results / f"{records.cell_name(cell.coordinates)}.json"

    def state(self, cell: Cell) -> Path:
        """Where an interrupted run of the cell keeps its state."""
        return self.resume / self.hash(cell) / "state.safetensors"

    def record(self, cell: Cell) -> dict[str, Any]:
        """The cell's record. Raises ValueError if the file is damaged."""
        return records.read_one(self.path(cell))

    def stands(self, cell: Cell) -> bool:
        """Whether the cell's record has today's hash and was made with the checkpoints at hand."""
        trusted = self.identity["profile"] in _TRUSTED or self.hash(cell) in self.settled
        return trusted and self.path(cell).is_file() and self.record(cell)["hash"] == self.hash(cell)

    def is_stale(self, cell: Cell, cells: list[Cell]) -> bool:
        """Whether the cell must run: it does not stand, or a cell that must run needs a file that it leaves."""
        lost = not all((self.checkpoints / name).is_file() for name in cell.leaves)
        return not self.stands(cell) or (lost and not all(self.stands(other) for other in cells))

    def settle(self, cell: Cell, result: Result) -> None:
        """Write the record, then list it as settled, then drop the resume state: a kill in between loses nothing."""
        record = {
            **self.identity,
            "cell": cell.coordinates,
            "hash": self.hash(cell),
            "params": cell.inputs,
            "metrics": result.metrics,
            "curve": result.curve,
            "trainable_parameters": result.trainable_parameters,
            "dtype": result.dtype,
        }
        records.write(self.path(cell), record)
        self.settled.add(self.hash(cell))
        self._write_settled()
        shutil.rmtree(self.state(cell).parent, ignore_errors=True)

    def prune(self, cells: list[Cell]) -> None:
        """Delete the records of cells that the parameters no longer name, and the states of runs that cannot go on."""
        kept = {self.path(cell) for cell in cells}
        for path in set(self.results.glob("*.json")) - kept:
            path.unlink()
        shutil.rmtree(self.resume, ignore_errors=True)
        self.settled &= {self.hash(cell) for cell in cells}
        self._write_settled()

    def _write_settled(self) -> None:
        records.replace_text(self.settled_file, json.dumps(sorted(self.settled), indent=1) + "\n")
