import os

import pytest

from limbeck import closure, paths


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package limbeck of four modules: top imports middle (through a parenthesis), middle imports bottom."""
    folder = tmp_path / "src" / "limbeck"
    (folder / "losses").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "losses" / "__init__.py").write_text("")
    (folder / "losses" / "bottom.py").write_text('"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    (folder / "middle.py").write_text("import limbeck.losses.bottom as b\n")
    (folder / "top.py").write_text("from limbeck import (\n    middle,\n)\nimport json\n")
    (folder / "aside.py").write_text("")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return folder


def names(files):
    return [file.stem for file in files]


def test_imports_are_followed_to_the_end_with_the_packages_on_the_way(package):
    assert names(closure.files("limbeck.top")) == ["__init__", "__init__", "bottom", "middle", "top"]
    assert names(closure.files("limbeck.aside")) == ["__init__", "aside"]


def test_a_changed_statement_below_changes_the_digest_above_and_no_other(package):
    top, aside = closure.digest("limbeck.top"), closure.digest("limbeck.aside")
    (package / "losses" / "bottom.py").write_text("def f(x):\n    return x - 1\n")
    assert closure.digest("limbeck.top") != top
    assert closure.digest("limbeck.aside") == aside


def test_comments_layout_docstrings_and_caches_leave_the_digest_alone(package):
    before = closure.digest("limbeck.top")
    (package / "losses" / "bottom.py").write_text('def f(x):  # why\n    """Other."""\n    return (x + 1)\n')
    (package / "__pycache__").mkdir()
    os.utime(package / "top.py", (0, 0))
    assert closure.digest("limbeck.top") == before


def test_importing_a_name_out_of_a_module_finds_the_module():
    assert closure.module_file("limbeck.closure.digest") is None
    assert [f.stem for f in closure.files("limbeck.paths.ROOT")] == ["__init__", "paths"]


def test_each_experiment_depends_on_the_losses_it_imports_and_not_on_figures():
    for experiment in ("table_divergences", "fig_toy_divergences"):
        found = names(closure.files(f"limbeck.experiments.sinkd.{experiment}"))
        assert {"transport", "divergence", experiment} <= set(found)
        assert not {"figures", "ledger", "notebooks", "claims"} & set(found)
