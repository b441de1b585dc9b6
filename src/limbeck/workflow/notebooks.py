"""Run a notebook strictly: `python -m limbeck.workflow.notebooks notebooks/sinkd/train.ipynb experiment=table_encoder`.

Papermill, and five things that it leaves to chance: a parameter that the notebook does not declare or never reads is an
error; the kernel is this interpreter's and the working directory is the root; cells tagged `try-it` are left out; the
run fails if an input changed while it went; and what is kept of the executed notebook has no times, counters or paths
in it. Only what runs here writes into results/: an exhibit's executed copy goes to results/<profile>/executed/, how it
was run to results/<profile>/provenance/. Any other executed copy goes to data/executed/.
"""

import ast
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import papermill
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from limbeck import digests, paths, records
from limbeck.experiments.ledger import lock
from limbeck.workflow import stages


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The one cell tagged `parameters`. Raises ValueError unless there is exactly one."""
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"expected one cell tagged parameters, got {len(tagged)}")
    return tagged[0]


def defaults(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """The parameters that a notebook declares, with the literals it gives them; None for what it computes."""
    declared: dict[str, Any] = {}
    for node in _tree(parameters_cell(notebook)).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                declared |= _assigned(target, node.value)
    return declared


def _assigned(target: ast.expr, value: ast.expr) -> dict[str, Any]:
    """What one assignment gives to each name: `warm_up, steps = 400, 200` gives two."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts, strict=True)
        return {name: literal for pair in pairs for name, literal in _assigned(*pair).items()}
    try:
        literal = ast.literal_eval(value) if isinstance(target, ast.Name) else None
    except ValueError:
        literal = None
    return {node.id: literal for node in ast.walk(target) if isinstance(node, ast.Name)}


def _tree(cell: nbformat.NotebookNode) -> ast.Module:
    """The syntax of a cell, its magics as the calls that IPython makes of them."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


def check_parameters(notebook: nbformat.NotebookNode, given: dict[str, Any]) -> dict[str, Any]:
    """The declared parameters with the given values in place.

    Raises ValueError for a name that is not declared, or is declared and read by no other cell.
    """
    declared = defaults(notebook)
    if unknown := sorted(set(given) - set(declared)):
        raise ValueError(f"unknown parameter {', '.join(unknown)}; the notebook declares {', '.join(declared)}")
    others = [cell for cell in notebook.cells if cell.cell_type == "code" and cell is not parameters_cell(notebook)]
    names_read = {node.id for cell in others for node in ast.walk(_tree(cell)) if isinstance(node, ast.Name)}
    if unread := sorted(set(declared) - names_read):
        raise ValueError(f"no cell reads parameter {', '.join(unread)}")
    return declared | given


def run(path: Path, given: dict[str, Any]) -> Path:
    """Execute a notebook and return where its executed copy lies."""
    notebook = digests.read(path)
    notebook.cells = [cell for cell in notebook.cells if "try-it" not in cell.metadata.get("tags", [])]
    parameters = check_parameters(notebook, given)
    of_paper = path.parent.parent == paths.NOTEBOOKS
    name = f"{parameters['experiment']}-{path.stem}" if "experiment" in parameters else path.stem
    raw = paths.DATA / "executed" / parameters.get("profile", "") / path.parent.name / f"{name}.ipynb"
    with lock(raw.with_name(f".{name}.lock"), wait=True):  # two runs at once would mix in one file
        before = stages.inputs(path, parameters) if of_paper else {}
        nbformat.write(notebook, raw)
        started = time.monotonic()
        _execute(raw, given)
        seconds = time.monotonic() - started
        after = stages.inputs(path, parameters) if of_paper else {}
        if changed := [name for name, checksum in after.items() if before.get(name) != checksum]:
            raise ValueError(
                f"{', '.join(changed)} changed while {name} ran; its results may mix old and new: run it again"
            )
        executed, results = raw, paths.RESULTS / parameters.get("profile", "")
        if of_paper:
            place = results / "provenance" / path.parent.name / f"{name}.json"
            records.replace_text(place, _provenance(before, seconds, place))
            executed = raw if "experiment" in parameters else results / "executed" / path.parent.name / path.name
        records.replace_text(executed, canonical(nbformat.read(raw, as_version=4)))
        return executed


def _execute(raw: Path, given: dict[str, Any]) -> None:
    """Run a notebook where it lies, in a kernel that knows itself to be the runner's."""
    told = {paths.RUNNER: "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    runtime = paths.scratch(raw.parent, f"{raw.stem}.kernel")  # of a kernel that is killed nothing stays elsewhere
    with runtime as folder, mock.patch.dict(os.environ, told | {"JUPYTER_RUNTIME_DIR": str(folder)}):
        papermill.execute_notebook(
            raw,
            raw,
            given,
            kernel_name="python3",
            cwd=paths.ROOT,
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )


def canonical(notebook: nbformat.NotebookNode) -> str:
    """An executed notebook as text that depends only on what was run: outputs stay, the rest of the run goes."""
    for key in set(notebook.metadata) - {"kernelspec", "language_info"}:
        del notebook.metadata[key]
    notebook.metadata["language_info"] = {"name": "python"}
    for index, cell in enumerate(notebook.cells):
        cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        cell["id"] = f"cell-{index}"
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    return nbformat.writes(notebook) + "\n"


def _provenance(inputs: dict[str, str], seconds: float, place: Path) -> str:
    """Commit, versions, machine, seconds, the checksum of every input; the reseals that were told there stay."""
    told = paths.read_json(place) if place.is_file() else {}
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    packages = ("torch", "transformers", "datasets", "peft", "POT", "numpy", "scipy", "pandas", "matplotlib", "dvc")
    return (
        json.dumps(
            {
                "commit": _git("rev-parse", "HEAD"),
                "modified": bool(_git("status", "--porcelain", "--", "src", "params", "params.yaml", "notebooks")),
                "seconds": round(seconds, 1),
                "python": platform.python_version(),
                "versions": {name: versions[name] for name in packages if name in versions},
                "machine": machine(),
                "inputs": inputs,
                **({"resealed": told["resealed"]} if "resealed" in told else {}),
            },
            indent=1,
            sort_keys=True,
        )
        + "\n"
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """What this machine is, as provenance has it."""
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _main(arguments: list[str]) -> None:
    if not arguments or not all("=" in argument for argument in arguments[1:]):
        raise ValueError(
            f"usage: python -m limbeck.workflow.notebooks NOTEBOOK [name=value ...]; got {' '.join(arguments)}"
        )
    given = dict(argument.split("=", 1) for argument in arguments[1:])
    run(Path(arguments[0]).resolve(), {name: _value(text) for name, text in given.items()})


def _value(text: str) -> Any:
    """A value as Python reads it, and what is no literal of Python as YAML does: `smoke`, `true`."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return yaml.safe_load(text)


if __name__ == "__main__":
    try:
        _main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"limbeck.workflow.notebooks: {error}")
