"""The runner's strictness, and the form of every committed notebook."""

import ast
import json
import re

import nbformat
import pytest
import yaml

from limbeck import paths
from limbeck.workflow import notebooks, stages

COMMITTED = sorted(paths.NOTEBOOKS.glob("*/*.ipynb"))
EXHIBITS = [path for path in COMMITTED if path.stem != "train"]
every_notebook = pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")


def notebook(*cells, parameters='profile = "default"'):
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
    made.cells[0].metadata["tags"] = ["parameters"]
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    return made


def code(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


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
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ")
    assert cells[1].source.startswith("**Claim.**")
    assert "**Scale.**" in cells[1].source
    assert cells[2].metadata["tags"] == ["parameters"]
    assert cells[-1].source.startswith("**Reading.**")
    assert len(re.findall(r"[.?](?=\s|$)", cells[-1].source.removeprefix("**Reading.**"))) == 2, "two sentences"
    assert [cell.cell_type for cell in cells] == ["markdown"] * 2 + ["code"] * (len(cells) - 3) + ["markdown"]


@pytest.mark.parametrize("path", sorted(paths.NOTEBOOKS.rglob("*.ipynb")), ids=lambda path: path.stem)
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
def test_a_notebook_is_committed_without_outputs_and_tested_with_the_smoke_profile(path):
    for cell in code(path):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert code(path)[0].metadata["nbmake"]["mock"] == {"profile": "smoke"}
    profile = notebooks.defaults(nbformat.read(path, as_version=4))["profile"]
    retrained = {name: stages.experiments(path.parent.name, name) for name in ("default", "full")}
    shown = [name for name, experiments in retrained.items() if stages.source(path) in experiments]
    assert profile == (shown[0] if shown else "default" if path.stem == "train" else "bench")


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
    assert executed == [cell.source for cell in committed]
