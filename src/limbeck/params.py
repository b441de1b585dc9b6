"""Hyperparameters: params.yaml for what crosses the papers, params/<paper>.yaml for the rest.

There, each experiment has one section per profile, which holds only what differs: it is laid over the groups of the
file's `shared` that its `from` names, and these over the experiment's base section, which starts from groups in its
turn. What comes of it loads into the frozen dataclass that the experiment declares; nothing has a default in code, so a
number is written in one place. Unknown, missing and ill-typed keys are errors before anything runs.
"""

import dataclasses
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from limbeck import paths

PROFILES = ("smoke", "default", "full", "paper")
BASES = ("default", "full", "bench")  # the first of them that an experiment has lies under its other sections
_SHARED, _FROM = "shared", "from"
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
    """The section as the dataclass `into`; a field whose type is a dataclass takes those keys that are its fields."""
    values = section(paper, experiment, profile)
    return _build(into, values, f"params/{paper}.yaml, {experiment}, {profile}")


def section(paper: str, experiment: str, profile: str) -> dict[str, Any]:
    """The section with all that it is laid over: a key's value is the last one among its `layers`."""
    sections = _sections(paper)
    values = {}
    for key, name in layers(paper, experiment, profile):
        values |= {field: value for field, value in sections[key][name].items() if key == _SHARED or field != _FROM}
    return values


def layers(paper: str, experiment: str, profile: str) -> list[tuple[str, str]]:
    """Where the section's values stand in params/<paper>.yaml, each a key and the key below it; the last one counts."""
    sections = _sections(paper)
    shared = sections.pop(_SHARED, {})
    one_of("experiment", experiment, sections)
    profiles = sections[experiment]
    one_of(f"profile of {experiment}", profile, profiles)
    base = next((name for name in BASES if name in profiles), profile)
    places = []
    for name in dict.fromkeys((base, profile)):
        where, groups = f"params/{paper}.yaml, {experiment}, {name}", profiles[name].get(_FROM, "")
        if not isinstance(groups, str):
            raise ValueError(f"{where}: {_FROM} must be names with spaces between them, got {groups!r}")
        for group in groups.split():
            one_of(f"{where}: {_FROM}", group, shared)
            places.append((_SHARED, group))
        places.append((experiment, name))
    return places


def experiments(paper: str) -> dict[str, list[str]]:
    """The experiments of params/<paper>.yaml, each with its profiles, in the file's order."""
    sections = _sections(paper)
    return {name: list(profiles) for name, profiles in sections.items() if name != _SHARED}


def flat(values: Any) -> dict[str, Any]:
    """The mapping that `load` made a dataclass of: the fields of its parts stand beside its own."""
    mapping = {}
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        mapping |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return mapping


def _sections(paper: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The content of params/<paper>.yaml: a section for each profile of each experiment."""
    file = paths.PARAMS / f"{paper}.yaml"
    content = _read(file)
    for name, group in content.items():
        if not isinstance(group, dict) or not all(isinstance(section, dict) for section in group.values()):
            raise ValueError(
                f"{file}: expected sections of {name} by name, each of keys with values, got {group!r:.200}"
            )
    return content


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"expected a parameter file at {file}, found none")
    content = paths.read_yaml(file)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{file}: expected keys with values, got {content!r:.200}")
    return content


def _build(into: type[T], values: dict[str, Any], where: str) -> T:
    """The dataclass from a mapping; lists become tuples, integers serve where floats are asked for."""
    try:
        keys = _keys(into, into.__name__)
        if unknown := sorted(set(values) - set(keys)):
            raise ValueError(f"unknown key {', '.join(unknown)}; expected {', '.join(sorted(keys))}")
        if missing := sorted(set(keys) - set(values)):
            raise ValueError(f"missing key {', '.join(missing)}")
        return _assemble(into, values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _keys(into: type, part: str) -> dict[str, str]:
    """Every key that a dataclass and its parts take, with the part that takes it."""
    keys: dict[str, str] = {}
    for name, kind in typing.get_type_hints(into).items():
        taken = _keys(kind, f"{part}.{name}") if dataclasses.is_dataclass(kind) else {name: part}
        if twice := sorted(keys.keys() & taken.keys()):
            claims = " and ".join((keys[twice[0]], taken[twice[0]]))
            raise ValueError(f"key {twice[0]} is claimed by {claims}, expected one of them")
        keys |= taken
    return keys


def _assemble(into: type[T], values: dict[str, Any]) -> T:
    fields = {}
    for name, kind in typing.get_type_hints(into).items():
        part = dataclasses.is_dataclass(kind)
        fields[name] = _assemble(kind, values) if part else _convert(name, values[name], kind)
    return into(**fields)


def _convert(name: str, value: object, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(name, item, typing.get_args(kind)[0]) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if typing.get_origin(kind) is tuple or type(value) is not kind:
        raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
    return value
