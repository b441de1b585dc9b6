"""The DVC pipelines, generated: `python -m limbeck.workflow.stages` writes dvc.yaml and pipelines/full/dvc.yaml.

A stage a train notebook and experiment, and a stage an exhibit, which may read another's records. Code dependencies are
the import closure; an experiment that imports another reads the files that it leaves. Of a notebook only the source of
its code cells counts (DVC reads them as parameters), so that saving it in Jupyter makes nothing stale. Of params files
only the sections a stage reads count.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import nbformat
import yaml

from limbeck import assets, closure, params, paths, records

_HEADER = "# Generated from the notebooks, their imports and params/ by `make pipeline`; a test holds it to them.\n"
_READS = re.compile(r'records\.read\("\w+", "(\w+)", profile\)')
_SHARED = ["device", "precision", "seeds", "threads"]


def experiments(paper: str, profile: str) -> list[str]:
    """The experiments of a paper that have a section for the profile."""
    return [name for name, profiles in params.experiments(paper).items() if profile in profiles]


def papers() -> list[str]:
    """The papers, by their train notebooks."""
    return sorted(path.parent.name for path in paths.NOTEBOOKS.glob("*/train.ipynb"))


def exhibits(paper: str, experiment: str) -> list[Path]:
    """The exhibit notebooks that read an experiment's records."""
    own = (path for path in sorted((paths.NOTEBOOKS / paper).glob("*.ipynb")) if path.stem != "train")
    return [path for path in own if source(path) == experiment]


def source(notebook: Path) -> str:
    """The experiment whose records an exhibit reads: the one that it names, else that of its own stem."""
    named = _READS.search("\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells))
    return named[1] if named else notebook.stem


def code(notebook: Path, experiment: str | None = None) -> list[str]:
    """The package files that a notebook's code cells import, to the end, and the experiment's if it runs one."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    modules = set().union(*(closure.imports(cell.source) for cell in cells))
    if experiment:
        modules.add(f"limbeck.experiments.{notebook.parent.name}.{experiment}")
    files = closure.files(*modules)
    style = [path.with_name("limbeck.mplstyle") for path in files if path.name == "figures.py"]
    return sorted(_relative(path) for path in [*files, *style])


def inputs(notebook: Path, parameters: dict[str, Any]) -> list[str]:
    """Every file, relative to the root, that a run of the notebook reads."""
    paper, experiment = notebook.parent.name, parameters.get("experiment")
    if experiment:
        read = ["params.yaml", f"params/{paper}.yaml"]
    else:
        file = records.path(paper, source(notebook), parameters["profile"])
        read = [f"data/claims/{paper}.yaml", *([_relative(file)] if file.is_file() else [])]
    return sorted([_relative(notebook), *code(notebook, experiment), *read])


def checksums(files: list[str]) -> dict[str, str]:
    """sha256 of each file, relative to the root."""
    return {file: hashlib.sha256((paths.ROOT / file).read_bytes()).hexdigest() for file in files}


def stages(profile: str) -> dict[str, Any]:
    """The stages of a profile; `profile` may be DVC's own variable."""
    found: dict[str, Any] = {}
    of = "default" if profile.startswith("$") else profile
    for paper in papers():
        for experiment in experiments(paper, of):
            found[f"{paper}-{experiment}-train"] = _train(paper, experiment, profile, of)
            for notebook in exhibits(paper, experiment):
                found[f"{paper}-{notebook.stem}"] = _exhibit(notebook, profile)
    return found


def _train(paper: str, experiment: str, profile: str, of: str) -> dict[str, Any]:
    notebook = paths.NOTEBOOKS / paper / "train.ipynb"
    files = code(notebook, experiment)
    needed = [f"data/raw/{asset}" for asset in assets.named(_words(params.section(paper, experiment, of)))]
    for other in set(experiments(paper, of)) - {experiment}:
        if f"src/limbeck/experiments/{paper}/{other}.py" in files:
            needed.append(f"data/checkpoints/{profile}/{paper}/{other}")
    return {
        "cmd": f"python -m limbeck.workflow.notebooks {_relative(notebook)} experiment={experiment} profile={profile}",
        "deps": sorted([*files, *needed]),
        "params": [
            {"params.yaml": list(_SHARED)},
            {f"params/{paper}.yaml": _places(paper, experiment, profile)},
            {_relative(notebook): _sources(notebook)},
        ],
        "outs": [
            {f"results/{profile}/{paper}/{experiment}.jsonl": {"cache": False, "persist": True}},
            {f"data/checkpoints/{profile}/{paper}/{experiment}": {"persist": True}},
        ],
    }


def _places(paper: str, experiment: str, profile: str) -> list[str]:
    """What a stage reads of its params file; with DVC's own variable, `shared` for every profile it can stand for."""
    choices = [profile]
    if profile.startswith("$"):
        choices = [name for name in params.experiments(paper)[experiment] if name != "full"]
    layers = {layer for choice in choices for layer in params.layers(paper, experiment, choice)}
    laid_under = {f"{key}.{name}" for key, name in layers if key != experiment or name in params.BASES}
    return sorted(laid_under | {f"{experiment}.{profile}"})


def _words(section: Any) -> set[str]:
    """Every text in a section's values, at any depth, and every key."""
    if isinstance(section, dict):
        return _words([*section, *section.values()])
    if isinstance(section, list):
        return set().union(*map(_words, section))
    return {section} if isinstance(section, str) else set()


def _exhibit(notebook: Path, profile: str) -> dict[str, Any]:
    paper, exhibit = notebook.parent.name, notebook.stem
    measured = f"results/{profile}/{paper}/{source(notebook)}.jsonl"
    outs = [
        f"results/{profile}/{paper}/{exhibit}.json",
        f"results/{profile}/{paper}/{exhibit}.svg",
        f"results/{profile}/executed/{paper}/{exhibit}.ipynb",
    ]
    return {
        "cmd": f"python -m limbeck.workflow.notebooks {_relative(notebook)} profile={profile}",
        "deps": sorted([*code(notebook), f"data/claims/{paper}.yaml", measured]),
        "params": [{_relative(notebook): _sources(notebook)}],
        "outs": [{out: {"cache": False}} for out in outs],
    }


def _sources(notebook: Path) -> list[str]:
    """The code cells' sources, as DVC names a place in a JSON file."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [f"cells.{index}.source" for index, cell in enumerate(cells) if cell.cell_type == "code"]


def _relative(path: Path) -> str:
    return path.relative_to(paths.ROOT).as_posix()


def texts() -> dict[Path, str]:
    """Both pipeline files, as they must be."""
    fetched = [name for name, asset in assets.manifest().items() if not asset.on_request]
    prepare = {
        "cmd": "python -m limbeck.assets",
        "deps": sorted(["data/assets.yaml", *map(_relative, closure.files("limbeck.assets"))]),
        "outs": [{f"data/raw/{name}": {"persist": True}} for name in sorted(fetched)],
    }
    full = {name: {"wdir": "../.."} | stage for name, stage in stages("full").items()}
    return {
        paths.ROOT / "dvc.yaml": _dump({"prepare": prepare} | stages("${profile}")),
        paths.ROOT / "pipelines" / "full" / "dvc.yaml": _dump(full),
    }


def _dump(found: dict[str, Any]) -> str:
    return _HEADER + yaml.safe_dump({"stages": found}, sort_keys=False, width=120)


if __name__ == "__main__":
    for path, text in texts().items():
        records.replace_text(path, text)
