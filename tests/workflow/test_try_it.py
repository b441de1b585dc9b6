"""The last cell of an exhibit, to change and run again: it calls the library, live, in seconds, and writes nothing."""

import ast
import contextlib
import io
import os
import time

import nbformat
import pytest

from limbeck import paths
from limbeck.workflow import stages

LONGEST = 20  # seconds; on a quiet core none takes 2
LIBRARY = ("adapters", "losses", "models", "sampling", "tasks", "training")
EXHIBITS = [
    path
    for paper in stages.papers()
    for name in stages.experiments(paper, "smoke")
    for path in stages.exhibits(paper, name)
]


def cell(path):
    """The cell's imports, its other statements, and its text."""
    text, code = nbformat.read(path, as_version=4).cells[-2:]
    assert text.metadata.tags == code.metadata.tags == ["try-it"]
    assert (text.cell_type, code.cell_type) == ("markdown", "code")
    assert text.source.startswith("**Try it.** ")
    body = ast.parse(code.source).body
    imports = [statement for statement in body if isinstance(statement, ast.Import | ast.ImportFrom)]
    return imports, body[len(imports) :], code.source


@pytest.mark.parametrize("path", EXHIBITS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_cell_to_try_is_short_calls_the_library_and_says_something_in_seconds(path, tmp_path, monkeypatch):
    imports, body, source = cell(path)
    assert body[0].lineno > imports[-1].lineno, "imports come first"
    assert len([line for line in source.splitlines()[imports[-1].lineno :] if line.strip()]) <= 10
    modules = [
        node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module.startswith("limbeck")
    ]
    modules = [module.removeprefix("limbeck").removeprefix(".").partition(".")[0] for module in modules]
    assert modules, "it calls the library"
    assert set(modules) <= {*LIBRARY, ""}
    monkeypatch.chdir(tmp_path)
    names, said, bar = {}, io.StringIO(), io.StringIO()
    exec(compile(ast.Module(imports, []), path.name, "exec"), names)
    before = time.monotonic()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(bar):
        exec(compile(ast.Module(body, []), path.name, "exec"), names)
    assert time.monotonic() - before < LONGEST
    assert said.getvalue() or "100%" in bar.getvalue()
    assert not os.listdir(tmp_path)


def test_every_exhibit_of_an_experiment_has_one_and_no_two_are_alike():
    benches = {"sinkd/table_cost", "kdrl/table_efficiency", "nola/table_cost"}
    exhibits = {path for pattern in ("*/fig_*.ipynb", "*/table_*.ipynb") for path in paths.NOTEBOOKS.glob(pattern)}
    assert {path for path in exhibits if f"{path.parent.name}/{path.stem}" not in benches} == set(EXHIBITS)
    assert len({cell(path)[2] for path in EXHIBITS}) == len(EXHIBITS)
