"""One source of truth for versions: pyproject's ranges, the lock's pins and environment.yml agree."""

import re
import tomllib
from importlib.metadata import version

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from limbeck import paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
LOCK = {
    canonicalize_name(name): pin
    for name, pin in (line.split("==") for line in (paths.ROOT / "requirements.lock").read_text().split())
}


def required():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def test_every_range_admits_the_pinned_version():
    for requirement in required():
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), requirement


def test_torch_is_pinned_without_a_local_suffix_and_no_gpu_library_is():
    assert LOCK["torch"] == "2.13.0"
    assert not [name for name in LOCK if name.startswith(("nvidia", "triton", "cuda"))]


def test_environment_yml_installs_the_lock_on_the_python_of_pyproject():
    conda, pip = yaml.safe_load((paths.ROOT / "environment.yml").read_text())["dependencies"][::2]
    assert conda == "python=3.11"
    assert pip["pip"] == ["-r requirements.lock", "--no-deps -e ."]
    assert PROJECT["requires-python"] == ">=3.11"


def test_what_runs_here_is_what_is_pinned():
    for requirement in required():
        assert version(requirement.name).split("+")[0] == LOCK[canonicalize_name(requirement.name)]


def test_ci_calls_the_test_command_of_the_readme_and_then_the_smoke_chain():
    calls = re.findall(r"^make \w+$", (paths.ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert calls == ["make test", "make smoke"]
    assert "make test" in (paths.ROOT / "README.md").read_text()
