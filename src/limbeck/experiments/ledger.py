"""Which cells of an experiment are missing or stale, and the running of those.

A cell's hash covers its coordinates, its inputs (hyperparameters, checksums of assets), the machine's part of
params.yaml (threads, device, precision) and the code that it reaches (`digests`). A cell is settled when its
record carries that hash and the hash is in the list of what was run with the checkpoints at hand (`settled.json`,
beside them). So a fresh clone, which has records but no checkpoints, retrains; a killed run goes on where it was; and
an added seed runs alone. The records of `full` take hours, and are taken as they were committed; if one is added on
another machine, its teacher is trained again there.

Cells run side by side in `workers` processes, each of one thread: on two cores that is a third faster than one process
of two threads. A process claims a cell by a lock that dies with it, and merges its record into the experiment's file
under another, so any number of them can work on one ledger.
"""

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from limbeck import digests, models, params, paths, records
from limbeck.experiments.runs import Cell, Result, Workspace, execute

_TRUSTED = ("full",)
_WAIT = 0.2  # seconds between two looks at what other processes have settled


def run(paper: str, experiment: str, profile: str) -> list[dict[str, Any]]:
    """Bring every cell of an experiment up to date and return all its records, in the order of the cells.

    A notebook run by hand trains with the profile `smoke` alone, which is not in git; of others it shows the records.
    Raises ValueError for bad parameters, before anything is written, and where the records could not be written.
    """
    if paths.by_hand() and profile != "smoke":
        train = f"notebooks/{paper}/train.ipynb experiment={experiment} profile={profile}"
        sys.stdout.write(f"Shown from records; `python -m limbeck.workflow.notebooks {train}` trains them.\n")
        return records.read(paper, experiment, profile)
    ledger = Ledger(paper, experiment, profile)
    ledger.check_writable()
    count = min(ledger.settings.workers, len(ledger.stale())) - 1
    command = [sys.executable, "-m", __name__, paper, experiment, profile, str(os.getpid())]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT / "src"), "TQDM_DISABLE": "1"}
    helpers = [subprocess.Popen(command, env=environment) for _ in range(count)]
    try:
        ledger.work()
    finally:
        for helper in helpers:
            helper.terminate()
            helper.wait()
    ledger.prune()
    return list(ledger.measured().values())


class Ledger:
    """The cells of one experiment, their records, and which of them stand."""

    def __init__(self, paper: str, experiment: str, profile: str) -> None:
        self.module = importlib.import_module(digests.module_of(paper, experiment))
        self.settings = params.settings()
        self.section = params.load(paper, experiment, profile, self.module.Params)
        self.cells: list[Cell] = self.module.cells(self.section, self.settings.seeds)
        self.device = models.device(self.settings.device)
        machine = [self.settings.threads, self.settings.device, self.settings.precision]
        self.common = [paper, experiment, *machine, digests.of_experiment(paper, experiment)]
        self.identity = {"paper": paper, "experiment": experiment, "profile": profile}
        self.file = records.path(paper, experiment, profile)
        self.checkpoints = paths.DATA / "checkpoints" / profile / paper / experiment
        self.resume = paths.DATA / "resume" / profile / paper / experiment / self.device.type

    def hash(self, cell: Cell) -> str:
        """What the cell's record must carry to stand."""
        parts = [*self.common, cell.coordinates, cell.inputs]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def measured(self) -> dict[frozenset, dict[str, Any]]:
        """Every record in the file, also stale ones, by cell. Raises ValueError if a line is damaged."""
        return records.read_by_cell(self.file)

    def settled(self) -> set[str]:
        """The hashes of the cells that were run with the checkpoints at hand."""
        file = self.checkpoints / "settled.json"
        hashes = paths.read_json(file) if file.is_file() else []
        if not isinstance(hashes, list) or not all(isinstance(one, str) for one in hashes):
            raise ValueError(f"{file}: expected a list of hashes, got others; delete it, and its cells are run again")
        return set(hashes)

    def stale(self) -> list[Cell]:
        """The cells that must run: those that do not stand, and those that left a file which is gone but needed."""
        settled, measured = self.settled(), self.measured()  # in this order: a record is written before it is listed

        def stands(cell: Cell) -> bool:
            record = measured.get(records.cell_key(cell.coordinates), {"hash": None})
            trusted = self.identity["profile"] in _TRUSTED or self.hash(cell) in settled
            return trusted and record["hash"] == self.hash(cell)

        missing = [cell for cell in self.cells if not stands(cell)]
        lost = [c for c in self.cells if not all((self.checkpoints / name).is_file() for name in c.checkpoint_files)]
        return [cell for cell in self.cells if cell in missing or (missing and cell in lost)]

    def check_writable(self) -> None:
        """Raise ValueError where results/ or data/ is read-only: a training that cannot be recorded does not begin."""
        for place in (self.file, self.checkpoints, self.resume):
            folder = next(folder for folder in place.parents if folder.is_dir())
            if not os.access(folder, os.W_OK):
                raise ValueError(f"received {folder}, which is read-only, expected to write {place}: let it be written")

    def work(self, parent: int | None = None) -> None:
        """Run stale cells until none is left; one whose wave has not come, or that another process runs, can wait.

        A process that helps another stops, at the next step, when its `parent` is gone.
        """
        self.parent = parent
        while stale := self.stale():
            for cell in stale:
                if cell.wave == min(other.wave for other in stale) and self._claim_and_run(cell):
                    break
            else:
                self._check_parent()
                time.sleep(_WAIT)

    def _check_parent(self) -> None:
        if self.parent is not None and os.getppid() != self.parent:
            sys.exit("the process that this one helped is gone")

    def _claim_and_run(self, cell: Cell) -> bool:
        """Run a cell unless another process is at it or has just settled it; whether it was run."""
        with lock(self.resume / f"{self.hash(cell)}.lock", wait=False) as mine:
            if not mine or cell not in self.stale():
                return False
            state = self.resume / self.hash(cell) / "state.safetensors"
            known = list(self.measured().values())
            workspace = Workspace(self.checkpoints, state, known, self.device, self.settings.precision)
            self._settle(cell, self._run(cell, workspace))
            shutil.rmtree(state.parent, ignore_errors=True)
            return True

    def _run(self, cell: Cell, workspace: Workspace) -> Result:
        """Run one cell to its end, with a bar that says what it is."""
        number = f"{self.cells.index(cell) + 1}/{len(self.cells)}"
        label = " ".join([*self.identity.values(), number, records.cell_name(cell.coordinates)])
        with tqdm(desc=label, unit="step", mininterval=1.0, dynamic_ncols=True, file=sys.stderr) as bar:

            def on_step(step: dict[str, Any]) -> None:
                self._check_parent()
                bar.total = step["steps"]
                bar.update(step["step"] - bar.n)

            threads, cells = self.settings.threads, self.cells
            return execute(self.module, self.section, cells, cell, workspace, threads=threads, on_step=on_step)

    def _settle(self, cell: Cell, result: Result) -> None:
        """Write the record, then list it as settled: a kill in between loses nothing but the list's entry."""
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
        with self._merging():
            self._write(self.measured() | {records.cell_key(cell.coordinates): record})
            self._list(self.settled() | {self.hash(cell)})

    def prune(self) -> None:
        """Delete the records of cells that the parameters no longer name, and the states of runs that cannot go on."""
        named = {records.cell_key(cell.coordinates) for cell in self.cells}
        with self._merging():
            self._write({cell: record for cell, record in self.measured().items() if cell in named})
            self._list(self.settled() & {self.hash(cell) for cell in self.cells})
        if self.is_of_this_code():
            with lock(paths.DATA / "resume" / "awaiting.lock", wait=True):  # of all experiments
                records.end_awaiting("{profile}/{paper}/{experiment}".format(**self.identity))
        shutil.rmtree(self.resume, ignore_errors=True)

    def is_of_this_code(self) -> bool:
        """Whether every cell has a record that carries its hash."""
        measured = self.measured()
        hashes = {records.cell_key(cell.coordinates): self.hash(cell) for cell in self.cells}
        return {key: record["hash"] for key, record in measured.items()} == hashes

    def renew(self, hashes: dict[str, str]) -> None:
        """Give the settled cells and the records that have these hashes their new ones: a reseal's last step."""
        with self._merging():
            if settled := self.settled():  # a clone without checkpoints gets no folder of them
                self._list({hashes.get(one, one) for one in settled})
            measured = self.measured()
            self._write({key: run | {"hash": hashes.get(run["hash"], run["hash"])} for key, run in measured.items()})

    def _merging(self) -> contextlib.AbstractContextManager[bool]:
        """The lock of whoever changes the file, on any device; it outlives `prune`."""
        return lock(self.resume.with_name("merge.lock"), wait=True)

    def _write(self, measured: dict[frozenset, dict[str, Any]]) -> None:
        """Write the records in the order of the cells; those of cells that are no longer named come last."""
        order = {records.cell_key(cell.coordinates): number for number, cell in enumerate(self.cells)}
        cells = sorted(measured, key=lambda cell: order.get(cell, len(order)))
        records.write(self.file, [measured[cell] for cell in cells])

    def _list(self, hashes: set[str]) -> None:
        records.replace_text(self.checkpoints / "settled.json", json.dumps(sorted(hashes), indent=1) + "\n")


@contextlib.contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an advisory lock, which ends with the process; yields False, at once, if it is taken and we do not wait."""
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _opened(path: Path) -> TextIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process, which has ended, deletes the folder
            return path.open("w")


if __name__ == "__main__":
    Ledger(*sys.argv[1:4]).work(parent=int(sys.argv[4]))
