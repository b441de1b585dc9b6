"""Imports point one way, and results/ is the only bridge from experiments to exhibits."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest

from limbeck import paths

MAY_IMPORT = {  # each folder, and each module at the top, names what of the package it may import beside itself
    "__init__": set(),
    "paths": set(),
    "seeding": set(),
    "measurements": {"paths", "records"},
    "params": {"paths"},
    "records": {"params", "paths"},
    "assets": {"paths"},
    "definitions": {"paths"},
    "normal_form": {"definitions"},
    "digests": {"definitions", "normal_form", "paths", "records"},
    "losses": set(),
    "adapters": {"seeding"},
    "models": {"adapters", "assets", "paths", "seeding"},
    "tasks": {"assets", "params", "paths", "seeding"},
    "sampling": {"models", "seeding"},
    "vllm_sampling": {"sampling", "seeding"},
    "training": {"losses", "models", "paths", "sampling"},
    "evaluation": {"models", "tasks"},
    "exhibits": {"paths", "records"},
    "experiments": {"definitions", "digests", "models", "params", "paths", "records"},
    "workflow": {"assets", "definitions", "digests", "experiments", "params", "paths", "records"},
}
LIBRARY = {"losses", "adapters", "models", "tasks", "sampling", "vllm_sampling", "training", "evaluation"}
BELOW_EXPERIMENTS = LIBRARY | {"assets", "experiments", "measurements", "params", "seeding"}
MAY_IMPORT |= {f"experiments.{paper}": BELOW_EXPERIMENTS for paper in ("kdrl", "nola", "sinkd")}
PACKAGE = paths.ROOT / "src" / "limbeck"
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def layer(module):
    """The folder that a module lies in, or itself at the top; each paper's experiments are a folder."""
    folder, _, inside = module.partition(".")
    paper = f"{folder}.{inside.partition('.')[0]}"
    return paper if paper in MAY_IMPORT else folder


def imported(module):
    """The modules of the package that a module imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in (name.removeprefix("limbeck.") for name in names if name.startswith("limbeck.")):
            modules.add(name if name in FILES else name.rpartition(".")[0])
    return modules - {module}


def test_every_folder_says_what_it_may_import():
    assert {layer(module) for module in FILES} == set(MAY_IMPORT)


def test_the_map_names_every_module_in_the_section_of_its_folder_and_no_other():
    sections = (paths.ROOT / "docs" / "map.md").read_text().split("\n## ")[2:]
    named = {(part.splitlines()[0], name) for part in sections for name in re.findall(r"^\| `(\w+)\.py` ", part, re.M)}
    parts = [file.relative_to(PACKAGE) for file in FILES.values() if file.stem != "__init__"]
    assert named == {(part.parent.as_posix().replace(".", "At the top"), part.stem) for part in parts}


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_lies_below_its_folder(module):
    assert {layer(other) for other in imported(module)} - {layer(module)} <= MAY_IMPORT[layer(module)]


def test_no_import_leads_back_to_where_it_came_from():
    order = graphlib.TopologicalSorter({module: imported(module) for module in FILES})
    assert set(order.static_order()) >= set(FILES)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["records", *(name for name in FILES if name.startswith("exhibits."))])
def test_what_draws_exhibits_never_loads_torch(module):
    code = f"import sys, limbeck.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", FILES)
def test_a_module_and_its_functions_keep_to_their_budgets(module):
    text = FILES[module].read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40 + len((ast.get_docstring(node) or "").splitlines()), node.name


DRAWS = {"rand", "randn", "randint", "randperm", "normal", "normal_", "uniform_", "multinomial", "bernoulli", "dropout"}


def test_nothing_in_the_package_draws_from_or_seeds_a_global_generator():
    for file in FILES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                where = f"{file.name}:{node.lineno}"
                if node.func.attr in DRAWS:
                    assert "generator" in {keyword.arg for keyword in node.keywords}, where
                if node.func.attr in ("manual_seed", "seed"):
                    assert ast.unparse(node.func.value) == "torch.Generator(device='cpu')", where
                assert not ast.unparse(node.func).startswith(("random.", "pickle.")), where
                assert ast.unparse(node.func) != "torch.load" or "weights_only=True" in ast.unparse(node), where
                assert not ast.unparse(node.func).startswith("np.random.") or "Philox" in ast.unparse(node.func), where
