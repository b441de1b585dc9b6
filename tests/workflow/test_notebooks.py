"""The runner's strictness, and the form of every committed notebook."""

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
import yaml

import tree
from limbeck import paths
from limbeck.workflow import notebooks, stages

EVERYWHERE = sorted(path for path in paths.NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
COMMITTED = [path for path in EVERYWHERE if path.parent != paths.NOTEBOOKS]
EXHIBITS = [path for path in COMMITTED if path.stem != "train"]
every_notebook = pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")


def notebook(*cells, parameters='profile = "default"'):
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    return made


def is_run(cell):
    return "try-it" not in cell.metadata.get("tags", [])


def code(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" and is_run(cell)]


def test_given_values_replace_the_declared_ones():
    assert notebooks.check_parameters(notebook("print(profile)"), {"profile": "smoke"}) == {"profile": "smoke"}


def test_a_parameter_that_the_notebook_does_not_declare_is_refused():
    with pytest.raises(ValueError, match="unknown parameter colour; the notebook declares profile"):
        notebooks.check_parameters(notebook("print(profile)"), {"colour": "red"})


def test_a_parameter_that_no_other_cell_reads_is_refused():
    with pytest.raises(ValueError, match="no cell reads parameter profile"):
        notebooks.check_parameters(notebook("print('profile')"), {"profile": "smoke"})


def test_a_notebook_needs_exactly_one_parameters_cell():
    with pytest.raises(ValueError, match="one cell tagged parameters, got 0"):
        notebooks.check_parameters(nbformat.v4.new_notebook(), {})


@pytest.mark.parametrize(
    ("line", "declared"),
    [
        ("warm_up, steps = 400, 200", {"warm_up": 400, "steps": 200}),
        ("rate: float = 1e-3", {"rate": 0.001}),
        ("(a, b), c = (1, 'x'), [2]", {"a": 1, "b": "x", "c": [2]}),
        ("first = second = -1", {"first": -1, "second": -1}),
        ("seeds = list(range(3))  # computed", {"seeds": None}),
        ("%matplotlib inline\nprofile = 'smoke'", {"profile": "smoke"}),
    ],
)
def test_a_parameters_cell_is_read_as_python_reads_it(line, declared):
    assert notebooks.defaults(notebook(parameters=line)) == declared


def test_a_magic_is_no_error_and_reads_its_parameter():
    made = notebook("%matplotlib inline\n!ls\nfiles = !ls {profile}\nprofile?", "%%bash\nls 'here", "print(profile)")
    assert notebooks.check_parameters(made, {}) == {"profile": "default"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("smoke", "smoke"), ("true", True), ("0.5", 0.5), ("[1, 'a']", [1, "a"]), ("", None)],
)
def test_a_value_on_the_command_line_is_one_of_python_or_else_of_yaml(text, value):
    assert notebooks._value(text) == value
    assert type(notebooks._value(text)) is type(value)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root with a paper `toy` of one notebook, whose run reads nothing but input.txt."""
    for constant in ("DATA", "RESULTS", "NOTEBOOKS"):
        monkeypatch.setattr(paths, constant, tmp_path / constant.lower())
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "inputs", lambda *_: {"input.txt": (tmp_path / "input.txt").read_text()})
    (tmp_path / "input.txt").write_text("one")
    (tmp_path / "notebooks" / "toy").mkdir(parents=True)

    def write(*cells):
        path = tmp_path / "notebooks" / "toy" / "fig_toy.ipynb"
        nbformat.write(notebook(*cells), path)
        return path

    return write


@pytest.mark.slow
def test_a_run_twice_leaves_the_same_bytes_and_its_provenance(root, capfd):
    path = root(
        "import pathlib, sys, time\nprint(profile, pathlib.Path.cwd().name)",
        "sys.stderr.write('bar')\ntime.time_ns() > 0",
    )
    first = notebooks.run(path, {"profile": "smoke"}).read_bytes()
    executed = notebooks.run(path, {"profile": "smoke"})
    assert executed == paths.RESULTS / "smoke" / "executed" / "toy" / "fig_toy.ipynb"
    assert executed.read_bytes() == first
    outputs = [output for cell in nbformat.read(executed, as_version=4).cells for output in cell.get("outputs", [])]
    assert outputs[0]["text"] == f"smoke {paths.ROOT.name}\n"
    assert "bar" in capfd.readouterr().err, "progress must reach the terminal"
    provenance = json.loads((paths.RESULTS / "smoke" / "provenance" / "toy" / "fig_toy.json").read_text())
    assert provenance["inputs"] == {"input.txt": "one"}
    assert provenance["versions"]["torch"].startswith("2.")


@pytest.mark.slow
def test_a_run_whose_input_changed_meanwhile_fails_and_has_no_provenance(root):
    path = root("import pathlib\nif profile:\n    pathlib.Path('input.txt').write_text('two')")
    with pytest.raises(ValueError, match=r"input.txt changed while fig_toy ran"):
        notebooks.run(path, {})
    assert not paths.RESULTS.exists()


@pytest.mark.slow
def test_a_notebook_beside_the_papers_needs_no_profile_and_leaves_results_alone(root):
    path = paths.NOTEBOOKS / "own.ipynb"
    nbformat.write(notebook("print(rate, files)", parameters="rate: float = 1\nfiles = !echo here"), path)
    executed = notebooks.run(path, {"rate": 1e-3})
    assert executed == paths.DATA / "executed" / "notebooks" / "own.ipynb"
    assert nbformat.read(executed, as_version=4).cells[-1].outputs[0]["text"] == "0.001 ['here']\n"
    assert not paths.RESULTS.exists()


@pytest.mark.slow
def test_the_runner_leaves_out_what_is_there_to_try(root):
    path = root("print(profile)", "raise RuntimeError")
    made = nbformat.read(path, as_version=4)
    made.cells[-1].metadata["tags"] = ["try-it"]
    nbformat.write(made, path)
    executed = nbformat.read(notebooks.run(path, {}), as_version=4)
    assert [cell.source for cell in executed.cells] == ['profile = "default"', "print(profile)"]


WRITES = """
import pathlib
from matplotlib import pyplot
from limbeck import paths, records
from limbeck.experiments import ledger
from limbeck.exhibits import figures
paths.RESULTS = pathlib.Path("results")
records.write_exhibit("sinkd", "fig_toy", profile, claims=[], table=[])
figures.save(pyplot.figure().suptitle("toy").figure, paths.RESULTS / profile / "sinkd" / "fig_toy.svg")
"""


@pytest.mark.slow
def test_only_the_runner_writes_into_results(root, tmp_path):
    path = root(WRITES)
    nbconvert = [sys.executable, "-m", "papermill", path.name, str(tmp_path / "by_hand.ipynb"), "-k", "python3"]
    subprocess.run(nbconvert, cwd=path.parent, check=True, env=os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"})
    outputs = nbformat.read(tmp_path / "by_hand.ipynb", as_version=4).cells[-1].outputs
    assert [o.text for o in outputs if o.get("name") == "stdout"] == [
        "Nothing was written; `python -m limbeck.workflow.notebooks notebooks/sinkd/fig_toy.ipynb profile=default` "
        "writes what is shown here to results/.\n"
    ]
    assert not list(tmp_path.rglob("fig_toy.json")) + list(tmp_path.rglob("fig_toy.svg"))
    notebooks.run(path, {})
    assert {file.name for file in (paths.RESULTS / "default" / "sinkd").iterdir()} == {"fig_toy.json", "fig_toy.svg"}
    assert paths.RUNNER not in os.environ


def test_a_refused_run_writes_nothing(root):
    path = root("print(profile)")
    with pytest.raises(ValueError, match="unknown parameter"):
        notebooks.run(path, {"prfile": "smoke"})
    assert not paths.RESULTS.exists()
    assert not paths.DATA.exists()


def test_the_command_line_says_what_it_wants():
    with pytest.raises(ValueError, match=r"usage: .* got x.ipynb smoke"):
        notebooks._main(["x.ipynb", "smoke"])


@every_notebook
def test_a_notebook_follows_the_template(path):
    cells = list(filter(is_run, nbformat.read(path, as_version=4).cells))
    assert cells[0].source.startswith("# ")
    assert cells[1].source.startswith("**Claim.**")
    assert "**Scale.**" in cells[1].source
    assert cells[2].metadata["tags"] == ["parameters"]
    assert cells[-1].source.startswith("**Reading.**")
    assert len(re.findall(r"[.?](?=\s|$)", cells[-1].source.removeprefix("**Reading.**"))) == 2, "two sentences"
    assert [cell.cell_type for cell in cells] == ["markdown"] * 2 + ["code"] * (len(cells) - 3) + ["markdown"]


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: path.stem)
def test_a_notebook_keeps_to_its_budget(path):
    lengths = [len(cell.source.splitlines()) for cell in code(path)]
    assert len(lengths) <= 10
    assert max(lengths) <= 12
    assert sum(lengths) <= 70


@every_notebook
def test_a_notebook_defines_nothing_and_imports_from_limbeck_alone(path):
    for cell in code(path):
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for node in nodes:
            assert not isinstance(node, ast.Import), "imports come from limbeck"
            assert not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] == "limbeck"


@every_notebook
def test_a_notebook_is_committed_without_outputs_and_with_the_profile_that_is_published(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert {(cell.execution_count, *cell.outputs) for cell in cells} == {(None,)}
    profile = notebooks.defaults(nbformat.read(path, as_version=4))["profile"]
    retrained = {name: stages.experiments(path.parent.name, name) for name in ("default", "full")}
    shown = [name for name, experiments in retrained.items() if stages.source(path) in experiments]
    assert profile == (shown[0] if shown else "default" if path.stem == "train" else "bench")


@every_notebook
def test_nbmake_trains_at_smoke_size_and_draws_what_is_published(path):
    mocks = [cell.metadata.get("nbmake", {}).get("mock", {}) for cell in code(path)]
    assert mocks[0] == ({"profile": "smoke"} if path.stem == "train" else {})
    assert not any(mocks[1:])


def test_what_jupyterlab_leaves_in_notebooks_is_no_notebook_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    for name in ("use_it_toy", "toy/train", "toy/fig_toy"):
        path = tmp_path / f"{name}.ipynb"
        (path.parent / ".ipynb_checkpoints").mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook(), path)
        nbformat.write(notebook(), path.parent / ".ipynb_checkpoints" / f"{path.stem}-checkpoint.ipynb")
    assert stages.papers() == ["toy"]
    assert stages.exhibits("toy", "fig_toy") == [tmp_path / "toy" / "fig_toy.ipynb"]
    assert not [path for path in EVERYWHERE if ".ipynb_checkpoints" in path.parts]


def test_the_example_workflow_and_make_test_run_the_notebooks_as_the_readme_says():
    workflow = yaml.safe_load((paths.ROOT / ".github" / "workflows" / "notebooks.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["nbmake"]["steps"] if "run" in step]
    assert f"python -m limbeck.assets && {tree.NOTEBOOKS}" in commands
    assert f"python -m limbeck.assets && {tree.NOTEBOOKS}" in (paths.ROOT / "README.md").read_text()


def test_one_stem_names_experiment_notebook_and_claims():
    for paper in stages.papers():
        claimed = {claim["exhibit"] for claim in yaml.safe_load((paths.DATA / "claims" / f"{paper}.yaml").read_text())}
        own = [path for path in EXHIBITS if path.parent.name == paper]
        timed = {path.stem for path in own if 'profile = "bench"' in code(path)[0].source}
        assert {path.stem for path in own} == claimed
        assert {stages.source(path) for path in own} == set(stages.experiments(paper, "smoke")) | timed
        for path in own:
            assert f'exhibit = "{path.stem}"' in "\n".join(cell.source for cell in code(path))


@pytest.mark.parametrize(
    "path", sorted(paths.RESULTS.glob("*/executed/*/*.ipynb")), ids=lambda path: "/".join(path.parts[-4:])
)
def test_what_was_executed_is_what_is_committed(path):
    """Text too: a Reading that came after its run is in the executed copy only if the exhibit was drawn again."""
    cells = nbformat.read(path, as_version=4).cells
    executed = [cell.source for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    committed = nbformat.read(paths.NOTEBOOKS / path.parent.name / path.name, as_version=4).cells
    assert executed == [cell.source for cell in committed if is_run(cell)]
