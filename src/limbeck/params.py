"""Hyperparameters: params.yaml for what crosses the papers, params/<paper>.yaml for the rest.

There, each experiment has a section a profile. A section loads into the frozen dataclass that its experiment declares;
nothing has a default in code, so a number is written in one place. Unknown, missing and ill-typed keys are errors
before anything runs.
"""

import dataclasses
import typing
from collections.abc import Collection
from typing import Any

import yaml

from limbeck import paths

PROFILES = ("smoke", "default", "full", "paper")
T = typing.TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """params.yaml: what every experiment shares."""

    profile: str
    threads: int
    workers: int
    device: str
    precision: str
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the choices that no type can."""
        if self.profile == "full":
            raise ValueError("profile full has a pipeline of its own: run `make full`, and leave params.yaml as it was")
        one_of("profile", self.profile, PROFILES)
        one_of("precision", self.precision, ("auto", "float32", "bfloat16"))
        positive(threads=self.threads, workers=self.workers)


def one_of(name: str, value: object, choices: Collection) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def positive(**values: float | int) -> None:
    """Raise ValueError naming the first value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value!r}")


def settings() -> Settings:
    """The content of params.yaml."""
    return _build(Settings, _read(paths.ROOT / "params.yaml"), "params.yaml")


def load(paper: str, experiment: str, profile: str, into: type[T]) -> T:
    """Section `experiment`, `profile` of params/<paper>.yaml as the dataclass `into`."""
    sections = _read(paths.PARAMS / f"{paper}.yaml")
    one_of("experiment", experiment, sections)
    one_of(f"profile of {experiment}", profile, sections[experiment])
    return _build(into, sections[experiment][profile], f"params/{paper}.yaml, {experiment}, {profile}")


def _read(path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"expected a parameter file at {path}, found none")
    return yaml.safe_load(path.read_text())


def _build(into: type[T], values: dict[str, Any], where: str) -> T:
    """The dataclass from a mapping; lists become tuples, integers serve where floats are asked for."""
    types = typing.get_type_hints(into)
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; expected {', '.join(sorted(types))}")
    if missing := sorted(set(types) - set(values)):
        raise ValueError(f"{where}: missing key {', '.join(missing)}")
    try:
        return into(**{name: _convert(name, value, types[name]) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _convert(name: str, value: object, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(name, item, typing.get_args(kind)[0]) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if typing.get_origin(kind) is tuple or type(value) is not kind:
        raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
    return value
