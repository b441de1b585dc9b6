"""The DVC pipelines, generated: `python -m limbeck.workflow.stages` writes dvc.yaml and pipelines/full/dvc.yaml.

One stage writes `digests.json`, the hash of all code that an experiment or an exhibit depends on. Then there is one
stage for each experiment, by its paper's train notebook, and one for each exhibit, which may read another's records;
each takes its own digest as a parameter, so that moving code runs nothing again. Code that names another experiment
reads the checkpoints that it leaves. Of params files only what a stage reads counts.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import nbformat
import yaml

from limbeck import assets, digests, params, paths, records

_HEADER = "# Generated from the notebooks, their code and params/ by `make pipeline`; a test holds it to them.\n"
_READS = re.compile(r'records\.read\("\w+", "(\w+)", profile\)')
_SHARED = ["device", "precision", "seeds", "threads"]
_DIGESTS = digests.FILE.name


def experiments(paper: str, profile: str) -> list[str]:
    """The experiments of a paper that have a section for the profile."""
    return [name for name, profiles in params.experiments(paper).items() if profile in profiles]


def papers() -> list[str]:
    """The papers, by their train notebooks."""
    return sorted(path.parent.name for path in paths.NOTEBOOKS.glob("*/train.ipynb"))


def exhibits(paper: str, experiment: str) -> list[Path]:
    """The exhibit notebooks that read an experiment's records."""
    notebooks = (path for path in sorted((paths.NOTEBOOKS / paper).glob("*.ipynb")) if path.stem != "train")
    return [path for path in notebooks if source(path) == experiment]


def source(notebook: Path) -> str:
    """The experiment whose records an exhibit reads: the one that it names, else that of its own stem."""
    match = _READS.search("\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells))
    return match[1] if match else notebook.stem


def inputs(notebook: Path, parameters: dict[str, Any]) -> dict[str, str]:
    """The sha256 of every file, relative to the root, that a run of the notebook reads, and the digest of its code."""
    paper, experiment = notebook.parent.name, parameters.get("experiment")
    if experiment:
        files = ["params.yaml", f"params/{paper}.yaml"]
        code = digests.of_experiment(paper, experiment)
    else:
        file = records.path(paper, source(notebook), parameters["profile"])
        files = [f"data/claims/{paper}.yaml", *([_relative(file)] if file.is_file() else [])]
        code = digests.of_notebook(notebook)
    sums = {file: hashlib.sha256((paths.ROOT / file).read_bytes()).hexdigest() for file in files}
    return {_relative(notebook): digests.of_notebook(notebook), "code": code} | sums


def stages(profile: str) -> dict[str, Any]:
    """The stages of a profile; `profile` may be DVC's own variable."""
    by_name: dict[str, Any] = {}
    section_profile = "default" if profile.startswith("$") else profile
    for paper in papers():
        for experiment in experiments(paper, section_profile):
            by_name[f"{paper}-{experiment}-train"] = _train(paper, experiment, profile, section_profile)
            for notebook in exhibits(paper, experiment):
                by_name[f"{paper}-{notebook.stem}"] = _exhibit(notebook, profile)
    return by_name


def _train(paper: str, experiment: str, profile: str, section_profile: str) -> dict[str, Any]:
    notebook = paths.NOTEBOOKS / paper / "train.ipynb"
    needed = [f"data/raw/{asset}" for asset in assets.named(_words(params.section(paper, experiment, section_profile)))]
    sources = digests.words(paper, experiment) & set(experiments(paper, section_profile)) - {experiment}
    needed += [f"data/checkpoints/{profile}/{paper}/{other}" for other in sources]
    return {
        "cmd": f"python -m limbeck.workflow.notebooks {_relative(notebook)} experiment={experiment} profile={profile}",
        **({"deps": sorted(needed)} if needed else {}),
        "params": [
            {_DIGESTS: [f"{paper}.{experiment}-train", f"{paper}.train"]},
            {"params.yaml": list(_SHARED)},
            {f"params/{paper}.yaml": _places(paper, experiment, profile)},
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
        "deps": sorted([f"data/claims/{paper}.yaml", measured]),
        "params": [{_DIGESTS: [f"{paper}.{exhibit}"]}],
        "outs": [{out: {"cache": False}} for out in outs],
    }


def _relative(path: Path) -> str:
    return path.relative_to(paths.ROOT).as_posix()


def texts() -> dict[Path, str]:
    """Both pipeline files, as they must be."""
    fetched = [name for name, asset in assets.manifest().items() if not asset.on_request]
    prepare = {
        "cmd": "python -m limbeck.assets",
        "deps": ["data/assets.yaml"],
        "params": [{_DIGESTS: ["assets.fetch"]}],
        "outs": [{f"data/raw/{name}": {"persist": True}} for name in sorted(fetched)],
    }
    digest = {
        "cmd": "python -m limbeck.digests",
        "deps": ["notebooks", "src/limbeck"],
        "outs": [{_DIGESTS: {"cache": False}}],
    }
    full = {name: {"wdir": "../.."} | stage for name, stage in stages("full").items()}
    return {
        paths.ROOT / "dvc.yaml": _dump({"digests": digest, "prepare": prepare} | stages("${profile}")),
        paths.ROOT / "pipelines" / "full" / "dvc.yaml": _dump(full),
    }


def _dump(content: dict[str, Any]) -> str:
    return _HEADER + yaml.safe_dump({"stages": content}, sort_keys=False, width=120)


if __name__ == "__main__":
    for path, text in texts().items():
        records.replace_text(path, text)
