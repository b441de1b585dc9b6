"""README.md is read in one sitting, runs as it stands and points at things that exist; so do the pages around it."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys

import nbformat
import pytest
import yaml
from dvc.cli.parser import get_main_parser

from limbeck import paths
from limbeck.exhibits import readme

FRONT = paths.ROOT / "README.md"
PAGES = sorted(
    page for folder in (".", "docs", "results", "notebooks", "data") for page in (paths.ROOT / folder).glob("*.md")
)
MEASURED = [  # a number of the findings, and the row of an exhibit's table whose mean it is
    ("0.22", "default/sinkd/fig_permutation", {"arm": "sinkhorn", "rows": "own", "metric": "test/score"}),
    ("0.64", "default/sinkd/fig_permutation", {"arm": "kl", "rows": "own", "metric": "test/score"}),
    ("3.09", "default/nola/table_text", {"arm": "none", "metric": "validation/loss"}),
    ("2.31", "default/nola/table_text", {"arm": "nola_fifth", "metric": "validation/loss"}),
    ("2.12", "default/nola/table_text", {"arm": "lora_1", "metric": "validation/loss"}),
    ("0.874", "default/kdrl/table_main", {"arm": "kdrl", "metric": "test/accuracy"}),
    ("0.863", "default/kdrl/table_main", {"arm": "kd", "metric": "test/accuracy"}),
    ("0.860", "default/kdrl/table_main", {"arm": "grpo", "metric": "test/accuracy"}),
    ("0.892", "default/kdrl/table_main", {"arm": "rejection", "metric": "test/accuracy"}),
    ("0.10", "full/kdrl/fig_teacher_distance", {"arm": "kdrl", "teacher": "terse", "metric": "test/accuracy"}),
    ("0.86", "full/kdrl/fig_teacher_distance", {"arm": "grpo", "teacher": "teacher", "metric": "test/accuracy"}),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def name(page):
    return page.relative_to(paths.ROOT).as_posix()


def prose(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page, language):
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def commands():
    """Every command of the front page, without its comment: in plain blocks, and in the text."""
    lines = [line for block in blocks(FRONT, "") for line in block.splitlines()]
    lines += [text for text in re.findall(r"`([^`]+)`", prose(FRONT)) if " " in text]
    words = [shlex.split(part, comments=True) for line in dict.fromkeys(lines) for part in line.split("&&")]
    found = {" ".join(command): command for command in words if command and command[0] in RUNNABLE}
    return list(found.values())


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def make_knows(target):
    return subprocess.run(["make", "-n", target], cwd=paths.ROOT, capture_output=True, check=False).returncode == 0


def dvc_knows(*arguments):
    options = get_main_parser().parse_args(arguments)
    stages = yaml.safe_load((paths.ROOT / "dvc.yaml").read_text())["stages"]
    return set(getattr(options, "targets", None) or ()) <= set(stages)


def python_knows(option, module, *arguments):
    notebooks = [argument for argument in arguments if argument.endswith(".ipynb")]
    return option == "-m" and importlib.util.find_spec(module) and all((paths.ROOT / x).is_file() for x in notebooks)


RUNNABLE = {
    "make": make_knows,
    "dvc": dvc_knows,
    "python": python_knows,
    "pytest": lambda *options: importlib.util.find_spec("nbmake") and importlib.util.find_spec("xdist"),
    "source": lambda script: script == ".venv/bin/activate",
    "git": lambda command, *arguments: command == "diff" and (paths.ROOT / arguments[-2]).is_dir(),
    "pip": lambda command, *arguments: command in ("install", "wheel"),
}


def test_the_front_page_is_short():
    text = FRONT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 24_000


@pytest.mark.parametrize("place", range(3), ids=["sinkd", "nola", "kdrl"])
def test_each_snippet_runs_as_it_stands(place, tmp_path):
    snippets = blocks(FRONT, "python")
    assert len(snippets) == 3
    done = subprocess.run(
        [sys.executable, "-c", snippets[place]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d\.\d", done.stdout)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_each_command_names_things_that_exist(command):
    assert RUNNABLE[command[0]](*command[1:])


def test_the_commands_of_the_front_page_were_found():
    assert {command[0] for command in commands()} == set(RUNNABLE)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_link_points_at_something(page):
    for place in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = place.partition("#")
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{place} in {name(page)}"
        assert not anchor or anchor in anchors(target), f"{place} in {name(page)}"


def test_each_page_says_what_the_exhibits_say_today():
    for page, text in readme.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{name(page)} is old: make readme"


@pytest.mark.parametrize(("number", "exhibit", "place"), MEASURED)
def test_the_findings_name_what_was_measured(number, exhibit, place):
    table = json.loads((paths.RESULTS / f"{exhibit}.json").read_text())["table"]
    [mean] = [row["mean"] for row in table if place.items() <= row.items()]
    assert f"{mean:.{len(number) - 2}f}" == number
    assert number in FRONT.read_text(encoding="utf-8").partition("The five findings")[2].partition("\n## ")[0]


@pytest.mark.parametrize("notebook", sorted(paths.NOTEBOOKS.glob("use_it_*.ipynb")), ids=lambda path: path.stem)
def test_each_notebook_for_own_data_has_a_row_and_its_parameters_are_explained(notebook):
    assert f"| [{notebook.stem}](notebooks/{notebook.name}) |" in FRONT.read_text(encoding="utf-8")
    cells = nbformat.read(notebook, as_version=4).cells
    [source] = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    explained = (paths.ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in explained} == set()
