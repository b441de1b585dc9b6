"""What others depend on: public names, and a wheel that is the library and works without the reproduction."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement

import limbeck
from limbeck import paths

PUBLIC = ("losses", "adapters", "training")
PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
ALONE = """
import sys
sys.path = [{folder!r}, *(path for path in sys.path if {root!r} not in path or "site-packages" in path)]
from importlib.machinery import PathFinder
class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Present
import limbeck, torch
from limbeck.losses import kdrl_loss, sinkhorn_distance, sinkd_loss
from limbeck.adapters import NolaConfig
from limbeck.training import Settings, arm, grpo, objective, supervised
probs = torch.eye(3)
assert limbeck.__file__.startswith({folder!r}), limbeck.__file__
assert sinkhorn_distance(probs, probs.flip(0)) >= 0
print(limbeck.__version__)
"""


@pytest.mark.parametrize("folder", PUBLIC)
def test_every_public_name_is_there_sorted_and_documented(folder):
    module = importlib.import_module(f"limbeck.{folder}")
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__doc__, name


def test_every_loss_of_a_batch_is_public():
    """A function of `losses` that another folder or a reader can call stands in `__all__`, or checks or sums inside."""
    inside = {"Manhattan", "Mask", "Number", "expectation", "logsumexp", "masked", "probability_times", "weighted_sum"}
    inside |= {"wide", "wide_dtype"}
    defined = set()
    for file in (paths.ROOT / "src/limbeck/losses").glob("[a-z]*.py"):
        defined |= set(re.findall(r"^(?:def|class) ([A-Za-z]\w*)", file.read_text(), re.MULTILINE))
    checks = {name for name in defined if name.startswith("require_")}
    assert defined - checks - set(limbeck.losses.__all__) == inside


def test_the_version_is_that_of_the_package_and_of_the_citation():
    assert limbeck.__version__ == version("limbeck") == PROJECT["version"]
    assert f"version: {PROJECT['version']}\n" in (paths.ROOT / "CITATION.cff").read_text()


def test_the_compiled_sinkhorn_path_comes_with_the_package():
    assert "numba" in needed(PROJECT["dependencies"])


def test_the_losses_load_no_transformers_and_no_peft():
    code = "import sys, limbeck.losses; print({'transformers', 'peft', 'numba'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("file", [PROJECT["readme"]])
def test_links_of_the_long_description_are_absolute(file):
    links = re.findall(r"\]\(([^)]+)\)", (paths.ROOT / file).read_text())
    assert links
    assert all(link.startswith("https://") for link in links)


def needed(requirements):
    """The packages that some requirements install, with what these require."""
    names = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.name.lower() not in names and (not requirement.marker or requirement.marker.evaluate()):
            names.add(requirement.name.lower())
            waiting += [Requirement(text) for text in requires(requirement.name) or ()]
    return names


@pytest.mark.slow
def test_a_wheel_works_without_what_only_the_reproduction_needs(tmp_path):
    tree = tmp_path / "tree"  # a build leaves folders behind
    shutil.copytree(paths.ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "LICENSE", "MANIFEST.in", PROJECT["readme"]):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(paths.ROOT / name, tree / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(tree)]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    folder = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    assert {"limbeck/py.typed", "limbeck/exhibits/limbeck.mplstyle"} <= set(names)
    assert not [name for name in names if not name.startswith("limbeck")]
    extra = {Requirement(text).name for group in PROJECT["optional-dependencies"].values() for text in group}
    modules = {"ipykernel": "IPython", "pot": "ot", "pyyaml": "yaml", "scikit-learn": "sklearn"}
    absent = {modules.get(name, name.replace("-", "_")) for name in extra - needed(PROJECT["dependencies"])}
    code = ALONE.format(folder=str(folder), root=str(paths.ROOT), absent=absent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PROJECT["version"]
