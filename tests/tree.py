"""A temporary copy of the tree, so that neither the tests nor a smoke run changes anything committed.

`python tests/tree.py test` runs every test and notebook in a copy; `python tests/tree.py smoke` runs there, with the
smoke profile, every experiment and the whole chain.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from limbeck import assets
from limbeck.workflow import stages

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT / "data" / "raw"
TESTS = "pytest -n 2 --dist loadfile --durations=15 --cov --cov-report=term"
NOTEBOOKS = "pytest --nbmake -n 2 notebooks"  # README.md's


def copy(destination: Path, *, profile: str | None = None) -> Path:
    """Copy what git would commit, with the assets but those on request, and set the profile; returns its root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, destination / name)
    if RAW.is_dir():
        on_request = shutil.ignore_patterns(*(name for name, asset in assets.manifest().items() if asset.on_request))
        shutil.copytree(RAW, destination / "data" / "raw", copy_function=shutil.copy2, ignore=on_request)
    if profile:
        settings = destination / "params.yaml"
        settings.write_text(settings.read_text().replace("profile: default", f"profile: {profile}", 1))
    subprocess.run(["git", "init", "--quiet"], cwd=destination, check=True)
    return destination


def environment(root: Path) -> dict[str, str]:
    """The environment in which the copy's package, and this interpreter's programs, come first."""
    programs = Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root / "src"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def train(root: Path) -> None:
    """Run at smoke size the experiments that DVC's default pipeline leaves out: some start from what it has trained."""
    for paper in stages.papers():
        for experiment in sorted({*stages.experiments(paper, "smoke")} - {*stages.experiments(paper, "default")}):
            cell = [f"notebooks/{paper}/train.ipynb", f"experiment={experiment}", "profile=smoke"]
            command = [sys.executable, "-m", "limbeck.workflow.notebooks", *cell]
            subprocess.run(command, cwd=root, env=environment(root), check=True)


def main(what: str) -> int:
    """Run the tests or the smoke chain in a copy; returns the exit status of the first command that fails."""
    commands = {"test": [TESTS, NOTEBOOKS], "smoke": ["dvc repro"]}[what]
    with tempfile.TemporaryDirectory(prefix="limbeck-") as folder:
        root = copy(Path(folder).resolve(), profile="smoke" if what == "smoke" else None)
        done = [subprocess.run(command.split(), cwd=root, env=environment(root), check=False) for command in commands]
        failed = next((run.returncode for run in done if run.returncode), 0)
        if what == "smoke" and not failed:
            train(root)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
