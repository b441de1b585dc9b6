"""Imports point one way, and results/*.json are the only bridge from experiments to exhibits."""

import ast
import subprocess
import sys

import pytest

from limbeck import closure, paths

BELOW = {
    "losses": {"losses", "seeding"},
    "adapters": {"adapters", "seeding"},
    "tasks": {"tasks", "assets", "carriers", "params", "paths", "seeding"},
    "training": {"training", "losses", "sampling", "models", "assets", "carriers", "paths", "seeding"},
    "sampling": {"sampling", "models", "assets", "carriers", "paths", "seeding"},
    "models": {"models", "assets", "carriers", "paths", "seeding"},
    "language_models": {"language_models", "models", "assets", "carriers", "paths", "seeding"},
    "answers": {"answers", "models", "tasks", "assets", "carriers", "params", "paths", "seeding"},
    "efficientnet": {"efficientnet", "assets", "carriers", "paths", "seeding"},
    "residual": {"residual", "seeding"},
    "image_models": {"image_models", "adapters", "efficientnet", "models", "assets", "carriers", "paths", "seeding"},
    "text_scores": {"text_scores", "tasks", "assets", "carriers", "params", "paths", "seeding"},
    "evaluation": {"evaluation", "models", "tasks", "assets", "carriers", "params", "paths", "seeding"},
}
EXHIBITS = ("records", "intervals", "rules", "claims", "figures", "readme")


def parts(module):
    package = paths.ROOT / "src" / "limbeck"
    files = (file.relative_to(package) for file in closure.files(f"limbeck.{module}"))
    return {file.parts[0].removesuffix(".py") for file in files} - {"__init__"}


def modules(folder):
    files = (paths.ROOT / "src" / "limbeck" / folder).rglob("*.py")
    return [".".join(file.relative_to(paths.ROOT / "src" / "limbeck").with_suffix("").parts) for file in files]


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_knows_only_what_lies_below_it(layer):
    for module in modules(layer) if (paths.ROOT / "src" / "limbeck" / layer).is_dir() else [layer]:
        assert parts(module) <= BELOW[layer], module


def test_experiments_know_no_figures_and_write_only_through_the_ledger():
    for module in [*modules("experiments/sinkd"), *modules("experiments/kdrl"), *modules("experiments/nola")]:
        assert not parts(module) & {"figures", "claims", "notebooks", "readme", "records"}, module


@pytest.mark.slow
@pytest.mark.parametrize("module", EXHIBITS)
def test_what_draws_exhibits_never_loads_torch(module):
    code = f"import sys, limbeck.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("file", sorted((paths.ROOT / "src").rglob("*.py")), ids=lambda file: file.stem)
def test_a_module_keeps_to_its_budget(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 300
    if len(lines) > 200:
        assert "200 lines" in file.read_text().split('"""')[1], f"{file} has {len(lines)} lines and does not say why"


@pytest.mark.parametrize("file", sorted((paths.ROOT / "src").rglob("*.py")), ids=lambda file: file.stem)
def test_a_function_keeps_to_its_budget(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40 + len((ast.get_docstring(node) or "").splitlines()), node.name


DRAWS = {"rand", "randn", "randint", "randperm", "normal", "normal_", "uniform_", "multinomial", "bernoulli", "dropout"}


def test_nothing_in_the_package_draws_from_or_seeds_a_global_generator():
    for file in (paths.ROOT / "src").rglob("*.py"):
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
