"""What a profile says, for `dvc metrics`, `dvc exp` and `dvc plots`: `python -m limbeck.workflow.metrics default`.

metrics.json has the main claims, each with our number and the verdict, and how often each verdict stands in each role.
A `.curves.csv` beside an experiment's records has its curves, means over the seeds.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from limbeck import paths, records
from limbeck.workflow import stages

_DRAWN = ["validation/accuracy", "rollout/length"]


def texts(profile: str) -> dict[Path, str]:
    """A profile's metrics and curves, by their files."""
    metrics = json.dumps(summary(profile), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    curved = {
        records.path(*name, profile).with_suffix(".curves.csv"): curves(*name, profile)
        for name in stages.curved(profile)
    }
    return {paths.RESULTS / profile / "metrics.json": metrics} | curved


def summary(profile: str) -> dict[str, Any]:
    """paper -> main claim -> ours, verdict; and `counts`: paper -> role -> verdict -> how many claims."""
    by_paper: dict[str, Any] = {"counts": {}}
    for paper in stages.papers():
        claims = paths.read_yaml(paths.DATA / "claims" / f"{paper}.yaml")
        roles = {claim["id"]: claim.get("role", "exploratory") for claim in claims}
        exhibits = paths.visible(paths.RESULTS / profile / paper, "*.json")
        decided = [claim for file in exhibits for claim in records.read_exhibit(file)["claims"]]
        main = [claim for claim in decided if roles.get(claim["id"]) == "main"]
        by_paper[paper] = {claim["id"]: {key: claim[key] for key in ("ours", "verdict")} for claim in main}
        by_paper["counts"][paper] = counts = {}
        for claim in decided:
            counts.setdefault(roles.get(claim["id"], "exploratory"), Counter())[claim["verdict"]] += 1
    return by_paper


def curves(paper: str, experiment: str, profile: str) -> str:
    """Each arm's curve in each setting as CSV, one row per window; a setting names what else the cells vary in."""
    runs = [run for run in records.read(paper, experiment, profile) if run["cell"].get("phase", "final") == "final"]
    frame = records.curves(runs)
    others = sorted({name for run in runs for name in run["cell"]} - {"phase", "arm", "seed"})
    varied = [name for name in others if frame[name].nunique(dropna=False) > 1]
    settings = (row.dropna() for _, row in frame[varied].iterrows())
    frame["setting"] = [", ".join(f"{name} {value}" for name, value in row.items()) for row in settings]
    means = frame.groupby(["setting", "arm", "window"])[["step", *_DRAWN]].mean().reset_index()
    return means.drop(columns="window").to_csv(index=False, float_format="%.6g", lineterminator="\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for path, text in texts(name).items():
            records.replace_text(path, text)
