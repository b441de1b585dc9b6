"""The DVC pipelines, generated: `python -m limbeck.workflow.stages` writes dvc.yaml and pipelines/full/dvc.yaml.

One stage writes `digests.json`, the hash of all code that an experiment or an exhibit depends on. Then there is one
stage for each experiment, by its paper's train notebook, and one for each exhibit, which may read another's records;
each takes its own digest as a parameter, so that moving code runs nothing again. Of params files only what a stage
reads counts. The last stage sums the verdicts up.

Every file of the pipelines is in git, so a fresh clone is up to date. Assets are parameters, by their checksum, and a
stage fetches what it lacks of them; checkpoints are nothing to DVC: an experiment that reads another's depends on its
records, and first has them trained where they are missing.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

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
    return [path.parent.name for path in paths.visible(paths.NOTEBOOKS, "*/train.ipynb")]


def exhibits(paper: str, experiment: str) -> list[Path]:
    """The exhibit notebooks that read an experiment's records."""
    notebooks = (path for path in paths.visible(paths.NOTEBOOKS / paper, "*.ipynb") if path.stem != "train")
    return [path for path in notebooks if source(path) == experiment]


def source(notebook: Path) -> str:
    """The experiment whose records an exhibit reads: the one that it names, else that of its own stem."""
    match = _READS.search("\n".join(cell.source for cell in digests.read(notebook).cells))
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
    needed = assets.named(_words(params.section(paper, experiment, section_profile)))
    sources = sorted(digests.words(paper, experiment) & set(experiments(paper, section_profile)) - {experiment})
    command = f"python -m limbeck.workflow.notebooks {_relative(notebook)} experiment="
    fetch = [f"python -m limbeck.assets {' '.join(needed)}"] if needed else []
    return {
        "cmd": [*fetch, *(f"{command}{name} profile={profile}" for name in (*sources, experiment))],
        **({"deps": [f"results/{profile}/{paper}/{name}.jsonl" for name in sources]} if sources else {}),
        "params": [
            {_DIGESTS: [f"{paper}.{experiment}-train", f"{paper}.train"]},
            {"params.yaml": list(_SHARED)},
            {f"params/{paper}.yaml": _places(paper, experiment, profile)},
            *([{"data/assets.yaml": [f"{name}.sha256" for name in needed]}] if needed else []),
        ],
        "outs": [{f"results/{profile}/{paper}/{experiment}.jsonl": {"cache": False, "persist": True}}],
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


def _metrics(by_name: dict[str, Any], profile: str) -> dict[str, Any]:
    """The stage that sums up what the exhibits of some stages decided, and writes their curves out."""
    files = [next(iter(out)) for stage in by_name.values() for out in stage["outs"]]
    exhibits = [file for file in files if file.endswith(".json")]
    measured = [f"results/{profile}/{paper}/{experiment}.jsonl" for paper, experiment in curved(profile)]
    claims = [f"data/claims/{paper}.yaml" for paper in papers()]
    return {
        "cmd": f"python -m limbeck.workflow.metrics {profile}",
        "deps": sorted([*claims, *exhibits, *measured, "src/limbeck/workflow/metrics.py"]),
        "outs": [{f"{file.removesuffix('.jsonl')}.curves.csv": {"cache": False}} for file in measured],
        "metrics": [{f"results/{profile}/metrics.json": {"cache": False}}],
    }


def curved(profile: str) -> list[tuple[str, str]]:
    """The experiments of a profile's pipeline of which an exhibit draws the curves, each with its paper."""
    section_profile = "full" if profile == "full" else "default"
    return [
        (paper, experiment)
        for paper in papers()
        for experiment in experiments(paper, section_profile)
        if any("records.curves(" in path.read_text(encoding="utf-8") for path in exhibits(paper, experiment))
    ]


def _plots(by_name: dict[str, Any], profile: str, root: str) -> list[Any]:
    """What `dvc plots` shows: the curves and the exhibits; `root` leads there from the pipeline's folder."""
    curves = [f"{root}results/{profile}/{paper}/{name}.curves.csv" for paper, name in curved(profile)]
    files = [next(iter(out)) for stage in by_name.values() for out in stage["outs"]]
    return [
        *({file: {"template": "curves", "x": "step", "y": "validation/accuracy"}} for file in curves),
        *(f"{root}{file}" for file in files if file.endswith(".svg")),
    ]


def texts() -> dict[Path, str]:
    """Both pipeline files, as they must be."""
    outs = [{_DIGESTS: {"cache": False}}]
    digest = {"cmd": "python -m limbeck.digests", "deps": ["notebooks", "src/limbeck"], "outs": outs}
    full = {name: {"wdir": "../.."} | stage for name, stage in _with_metrics("full").items()}
    return {
        paths.ROOT / "dvc.yaml": _dump({"digests": digest} | _with_metrics("${profile}"), "${profile}", ""),
        paths.ROOT / "pipelines" / "full" / "dvc.yaml": _dump(full, "full", "../../"),
    }


def _with_metrics(profile: str) -> dict[str, Any]:
    by_name = stages(profile)
    return by_name | {"metrics": _metrics(by_name, profile)}


def _dump(by_name: dict[str, Any], profile: str, root: str) -> str:
    content = {"stages": by_name, "plots": _plots(by_name, profile, root)}
    return _HEADER + yaml.safe_dump(content, sort_keys=False, width=120)


if __name__ == "__main__":
    for path, text in texts().items():
        records.replace_text(path, text)
