"""Cells of one experiment, run by the code that PYTHONPATH names: what they measure and leave, to the bit.

`reseal` runs this file as a script twice, by the code of an older commit and by today's, with the same request: so it
imports nothing of the package by name but in the functions that stand first, which know the older names too. A cell
that reads a file which another cell leaves, of whatever experiment, has that one run before it.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

_SAMPLES = ("test_samples", "validation_samples")
Report = dict[str, Any]


# What the code under test calls its own things: the only part that knows names which may change.
@functools.cache
def ledger_of(paper: str, experiment: str, profile: str) -> Any:
    """The tree's own view of an experiment: `module`, `section`, `cells`, `settings`, `device`, `hash`."""
    return importlib.import_module("limbeck.experiments.ledger").Ledger(paper, experiment, profile)


def workspace(*values: Any) -> Any:
    """Where a cell runs: checkpoints, state, earlier records, device, precision."""
    for module, name in (("runs", "Workspace"), ("runs", "Place"), ("cells", "Place")):
        try:
            return getattr(importlib.import_module(f"limbeck.experiments.{module}"), name)(*values)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ValueError("expected limbeck.experiments to have a Workspace or a Place, found neither")


def wave(cell: Any) -> int:
    """When a cell's wave comes."""
    return cell.wave if hasattr(cell, "wave") else cell.turn


def files(cell: Any) -> tuple[str, ...]:
    """What a cell leaves for others."""
    return cell.checkpoint_files if hasattr(cell, "checkpoint_files") else cell.leaves


def capped(section: Any) -> Any:
    """A section, and its parts, of which an evaluation draws one sample of each problem: of eight it takes minutes."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section) if field.init}
    parts = {name: capped(value) for name, value in values.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(section, **parts, **{name: 1 for name in _SAMPLES if name in values})


def loops() -> list[Any]:
    """The modules whose `fit(_, _, steps, ...)` is a training loop."""
    return [importlib.import_module(f"limbeck.training.{name}") for name in ("supervised", "grpo")]


def spelled(coordinates: dict[str, Any]) -> str:
    """A cell's name, as its record has it."""
    return ",".join(f"{name}={value}" for name, value in coordinates.items())


def shortened(fit: Callable[..., Generator], first: int) -> Callable[..., Generator]:
    """A loop that takes its first steps alone and measures once, after them.

    Its curve has as many windows as the whole one would have, all alike, for what is read off it afterwards.
    """
    signature = inspect.signature(fit)
    third = list(signature.parameters)[2]

    @functools.wraps(fit)
    def loop(*values: Any, **keywords: Any) -> Generator:
        call = signature.bind(*values, **keywords)
        steps = call.arguments[third]
        if len(steps) <= first:
            return (yield from fit(*values, **keywords))
        call.arguments[third] = steps[:first]
        if "save_every" in call.arguments:
            window, call.arguments["save_every"] = call.arguments["save_every"], first
        else:
            run = call.arguments["run"]
            window, settings = run.settings.save_every, dataclasses.replace(run.settings, save_every=first)
            call.arguments["run"] = dataclasses.replace(run, settings=settings)
        curve = yield from fit(*call.args, **call.kwargs)
        return {name: values * -(-len(steps) // window) for name, values in curve.items()}

    return loop


class Probe:
    """A request, and what has been run for it."""

    def __init__(self, request: Report) -> None:
        self.request, self.folder = request, Path(request["folder"])
        self.checkpoints = self.folder / "checkpoints"
        self.measured: dict[str, dict[str, tuple[Any, Report]]] = {}

    def run_all(self) -> None:
        """Run the cells that are asked for, or all."""
        experiment, names = self.request["experiment"], self.request["cells"]
        for cell in sorted(self.ledger(experiment).cells, key=wave):
            if names is None or spelled(cell.coordinates) in names:
                self.run(experiment, cell)

    def ledger(self, experiment: str) -> Any:
        """An experiment of the request's paper and profile."""
        return ledger_of(self.request["paper"], experiment, self.request["profile"])

    def run(self, experiment: str, cell: Any) -> bool:
        """Run a cell, after those whose files it reads, and report it; whether it ended."""
        measured = self.measured.setdefault(experiment, {})
        name = spelled(cell.coordinates)
        if name in measured:
            return "error" not in measured[name][1]
        place = self.folder / "cells" / experiment / f"{name}.json"
        report = json.loads(place.read_text()) if place.is_file() else {"error": "not run"}
        while "error" in report:
            try:
                report = self._measure(experiment, cell)
            except Exception as error:  # whatever it is, it is this cell's outcome
                report = {"error": "".join(traceback.format_exception_only(error)).strip()}
                if not self._provide(experiment, cell, str(error)):
                    break
        measured[name] = cell, report
        _replace(place, json.dumps(report, sort_keys=True))
        return "error" not in report

    def _measure(self, experiment: str, cell: Any) -> Report:
        """One cell's result and what it leaves, the state of its last step among it."""
        ledger, folder = self.ledger(experiment), self.checkpoints / experiment
        folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / "state" / "state.safetensors"
        state.unlink(missing_ok=True)
        before = _stamps(folder)
        precision = self.request["precision"] or ledger.settings.precision
        section = ledger.section if self.request["first"] is None else capped(ledger.section)
        place = workspace(folder, state, self._earlier(experiment, cell), ledger.device, precision)
        steps = ledger.module.run(cell, section, place)
        try:
            while True:
                next(steps)
        except StopIteration as stop:
            result = stop.value
        written = [path for path, stamp in sorted(_stamps(folder).items()) if before.get(path) != stamp]
        contents = {path.relative_to(folder).as_posix(): content(path) for path in written}
        contents |= {"state of the last step": content(state)} if state.is_file() else {}
        state.unlink(missing_ok=True)
        return json.loads(json.dumps(vars(result) | {"files": contents}))

    def _earlier(self, experiment: str, cell: Any) -> list[Report]:
        """The records of earlier waves: those that the request has, else those of the cells that were run."""
        ledger = self.ledger(experiment)
        if experiment == self.request["experiment"] and self.request["records"] is not None:
            earlier = [other.coordinates for other in ledger.cells if wave(other) < wave(cell)]
            return [record for record in self.request["records"] if record["cell"] in earlier]
        return [
            {"cell": other.coordinates, "params": other.inputs, **report}
            for other, report in self.measured.get(experiment, {}).values()
            if wave(other) < wave(cell) and "error" not in report
        ]

    def _provide(self, experiment: str, cell: Any, complaint: str) -> bool:
        """Run the cells that leave the files which an error speaks of; whether there is one more file for it."""
        match = re.search(re.escape(str(self.checkpoints)) + r"/(\w+)", complaint)
        source = match[1] if match else experiment
        ledger, folder = self.ledger(source), self.checkpoints / source
        lacking = [
            other
            for other in sorted(ledger.cells, key=wave)
            if (source != experiment or wave(other) < wave(cell))
            and not all((folder / name).is_file() for name in files(other))
        ]
        mentioned = [c for c in lacking if any(_speaks_of(complaint, name) for name in files(c))]
        ended = [self.run(source, other) for other in mentioned or lacking]
        return any(ended)


def _speaks_of(complaint: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(Path(name).stem)}(?![\w-])", complaint) is not None


def _stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def content(path: Path) -> str | dict[str, str]:
    """Hashes of a file: of every tensor where it holds tensors, with its type and shape; else of its bytes."""
    if path.suffix != ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, framework="pt") as file:
        return {name: _hash(file.get_tensor(name)) for name in sorted(file.keys())}


def _hash(tensor: torch.Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _hashes(cells: Iterable[Any], ledger: Any) -> dict[str, str]:
    return {spelled(cell.coordinates): ledger.hash(cell) for cell in cells}


def main(request: Report) -> None:
    """Answer a request: the hashes of an experiment's cells, or cells run, whole or their `first` steps."""
    ledger = ledger_of(request["paper"], request["experiment"], request["profile"])
    if request["kind"] == "hashes":
        _replace(Path(request["folder"]) / "hashes.json", json.dumps(_hashes(ledger.cells, ledger)))
        return
    torch.set_num_threads(ledger.settings.threads)
    torch.backends.cudnn.allow_tf32 = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if request["first"] is not None:
        for module in loops():
            module.fit = shortened(module.fit, request["first"])
    Probe(request).run_all()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
