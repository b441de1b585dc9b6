"""What an experiment's records and an exhibit depend on of the code, as one hash each: `python -m limbeck.digests`.

A hash is content-addressed: of a definition's normal form, with each reference in it replaced by the hash of what it
refers to (definitions that refer to each other are hashed together). So moving, renaming and documenting change nothing
and neither does adding what nothing calls; changing an expression changes all that reach it. With the definitions count
the effects of their modules and of the packages these lie in, and files of the package that a text names.

An experiment's roots are its `run`, `cells` and `Params`, and the half of the ledger that runs a cell. They are found
by the experiment's name, as the ledger finds them; an exhibit's root is the code of its notebook's cells.

Not seen: which of two classes, or of two tables, that are written alike is meant; what a module does that is imported
for its effect alone; names of classes and functions read at run time; parameters reached by words that no text has.
"""

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat

from limbeck import definitions, normal_form, paths, records
from limbeck.definitions import Definition, Package
from limbeck.normal_form import Named, NormalForm, Parameter

FILE = paths.ROOT / "digests.json"
_EXECUTE = "limbeck.experiments.runs.execute"
_ROOTS = ("run", "cells", "Params")
_MAGIC = re.compile(r"^\s*[%!].*$", re.MULTILINE)


def of_experiment(paper: str, experiment: str) -> str:
    """The digest of the code that makes an experiment's records."""
    module = module_of(paper, experiment)
    return of_names(*(f"{module}.{name}" for name in _ROOTS), _EXECUTE)


def experiments(paper: str) -> dict[str, str]:
    """The literal table of a paper's experiments: the module of each."""
    (statement,) = definitions.read(f"limbeck.experiments.{paper}").statements["EXPERIMENTS"]
    table = ast.literal_eval(statement.value)
    return {experiment: f"limbeck.experiments.{paper}.{module}" for experiment, module in table.items()}


def module_of(paper: str, experiment: str) -> str:
    """The module that has an experiment's `run`, `cells` and `Params`. Raises ValueError if there is no such one."""
    if experiment not in (modules := experiments(paper)):
        raise ValueError(f"received experiment {experiment!r}, expected one of {paper}'s: {', '.join(modules)}")
    return modules[experiment]


def of_names(*names: str) -> str:
    """The digest of some definitions, by their dotted names. Raises ValueError for one that the package lacks."""
    return _digest([_named(name) for name in names], [])


def of_notebook(notebook: Path) -> str:
    """The digest of a notebook's code cells and of all that they reach; their text counts as it stands.

    Of a train notebook the text alone, since an experiment's own digest says what it reaches.
    """
    source = "\n".join(cells(notebook))
    if notebook.stem == "train":
        return hashlib.sha256(source.encode()).hexdigest()
    try:
        return _digest([], [source, normal_form.of_text("limbeck", _MAGIC.sub("", source))])
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{notebook}: expected cells of Python that name what there is, got others: {error}") from None


def read(notebook: Path) -> nbformat.NotebookNode:
    """A notebook of version 4. Raises ValueError, with the path, for another file."""
    try:
        content = nbformat.read(notebook, as_version=4)
        nbformat.validate(content)
    except Exception as error:  # whatever a missing key leads to
        raise ValueError(f"{notebook}: expected a notebook, got what is none: {error!r:.300}") from None
    return content


def cells(notebook: Path) -> list[str]:
    """The sources of the code cells that the runner runs: those tagged `try-it` it leaves out."""
    content = read(notebook)
    run = (cell for cell in content.cells if "try-it" not in cell.metadata.get("tags", []))
    return [cell.source for cell in run if cell.cell_type == "code"]


def words(paper: str, experiment: str) -> set[str]:
    """The words that an experiment's code says as text, such as the name of another whose checkpoints it reads."""
    module = module_of(paper, experiment)
    return _Closure([_named(f"{module}.{name}") for name in _ROOTS], []).words


def everything() -> dict[str, dict[str, str]]:
    """The digests of every experiment and of every notebook of a paper, by paper."""
    digests = {}
    for file in paths.visible(paths.PARAMS, "*.yaml"):
        paper, folder = file.stem, paths.NOTEBOOKS / file.stem
        hashes = {path.stem: of_notebook(path) for path in paths.visible(folder, "*.ipynb")}
        digests[paper] = hashes | {f"{name}-train": of_experiment(paper, name) for name in experiments(paper)}
    return digests


def _named(name: str) -> Definition:
    module, _, attribute = name.rpartition(".")
    target = definitions.resolve(module, attribute)
    if not isinstance(target, Definition):
        raise ValueError(f"expected a definition of the package, got {name}, which is {target}")
    return target


class _Closure:
    """What some definitions and texts reach: definitions, modules with their effects, and files."""

    def __init__(self, roots: Iterable[Definition], texts: Iterable[str | NormalForm]) -> None:
        self.forms: dict[Definition, NormalForm] = {}
        self.effects: dict[str, list[NormalForm]] = {}
        self.texts = list(texts)
        self.words: set[str] = set()
        waiting: list[Definition | Package] = list(roots)
        for text in self.texts:
            waiting += self._read(text) if isinstance(text, NormalForm) else []
        while waiting:
            target = waiting.pop()
            if isinstance(target, Package):
                waiting += self._load(target.module) + members(target)
            elif target not in self.forms:
                self.forms[target] = normal_form.of_definition(target)
                waiting += self._read(self.forms[target]) + self._load(target.module)

    def _read(self, form: NormalForm) -> list[Definition | Package]:
        self.words |= form.words
        return [target for target in map(_target, form.parts) if target]

    def _load(self, module: str) -> list[Definition | Package]:
        """A module and the packages it lies in do, when they are loaded, what is no definition."""
        parents = module.split(".")
        targets: list[Definition | Package] = []
        for name in (".".join(parents[:depth]) for depth in range(1, len(parents) + 1)):
            if name not in self.effects:
                self.effects[name] = normal_form.of_effects(name)
                targets += [target for form in self.effects[name] for target in self._read(form)]
        return targets


def members(package: Package) -> list[Definition]:
    """All that a module defines: where the module is handed on as a value, any of it may be reached."""
    content = definitions.read(package.module)
    handed_on = [definitions.follow(*source) for source in content.imports.values()]
    own = [Definition(package.module, name) for name in content.statements]
    return [*own, *(target for target in handed_on if isinstance(target, Definition))]


def _target(part: normal_form.Part) -> Definition | Package | None:
    part = part.target if isinstance(part, Named) else part
    return part if isinstance(part, Definition | Package) else None


def _digest(roots: list[Definition], texts: list[str | NormalForm]) -> str:
    closure = _Closure(roots, texts)
    hashes = _hashes(closure)
    by_module = ([_hash(form, hashes, closure.words) for form in forms] for forms in closure.effects.values())
    effects = sorted({own[0] if len(own) == 1 else _sha256(own) for own in by_module if own})  # in order within one
    written = [text if isinstance(text, str) else _hash(text, hashes, closure.words) for text in closure.texts]
    return _sha256([*(hashes[root] for root in roots), *written, *effects])


def _hashes(closure: _Closure) -> dict[Definition, str]:
    """The hash of every definition of a closure, those that it refers to first."""
    hashes: dict[Definition, str] = {}
    for group in _groups(closure.forms):
        if len(group) == 1 and group[0] not in _references(closure.forms[group[0]]):
            hashes[group[0]] = _hash(closure.forms[group[0]], hashes, closure.words)
            continue
        in_cycle = dict.fromkeys(group, "cycle")
        for _ in group:  # after as many rounds as there are members, whatever differs has another hash
            in_cycle = {member: _hash(closure.forms[member], hashes | in_cycle, closure.words) for member in group}
        hashes |= {member: _sha256([in_cycle[member], *sorted(in_cycle.values())]) for member in group}
    return hashes


def _references(form: NormalForm) -> list[Definition]:
    targets = filter(None, map(_target, form.parts))
    return [item for target in targets for item in (members(target) if isinstance(target, Package) else [target])]


def _groups(forms: dict[Definition, NormalForm]) -> Iterator[list[Definition]]:
    """The strongly connected components of the references, each after those that it refers to (Tarjan 1972)."""
    index: dict[Definition, int] = {}
    low: dict[Definition, int] = {}
    stack: list[Definition] = []
    for root, form in forms.items():
        walk = [(root, iter(_references(form)))] if root not in index else []
        while walk:
            node, references = walk[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                stack.append(node)
            for other in references:
                if other not in index:
                    walk.append((other, iter(_references(forms[other]))))
                    break
                if other in stack:
                    low[node] = min(low[node], index[other])
            else:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[node])
                if low[node] == index[node]:
                    cut = stack.index(node)
                    yield stack[cut:]
                    del stack[cut:]


def _hash(form: NormalForm, hashes: dict[Definition, str], words: set[str]) -> str:
    text, mentioned = [], set()
    for part in form.parts:
        if isinstance(part, Parameter):
            text.append(part.name if part.name in words else "")
        elif isinstance(part, Named):
            mentioned.add(_of_target(part.target, hashes))
        else:
            text.append(part if isinstance(part, str) else f"<{_of_target(part, hashes)}>")
    files = sorted(_file(word) for word in _quoted(form) if _file(word))
    return _sha256(["".join(text), *sorted(mentioned), *files])


def _of_target(target: Definition | Package, hashes: dict[Definition, str]) -> str:
    if isinstance(target, Definition):
        return hashes[target]
    return _sha256(sorted(f"{member.name} {hashes[member]}" for member in members(target)))


def _quoted(form: NormalForm) -> Iterator[str]:
    return (part[5:-1] for part in form.parts if isinstance(part, str) and part.startswith("str:'"))


@functools.cache
def _files(root: Path) -> dict[str, Path]:
    """Files of the package that are no code, by name, such as the style of figures."""
    package = root / "src" / definitions.PACKAGE
    return {path.name: path for path in paths.visible(package, "**/*.*") if path.suffix not in (".py", ".pyc")}


def _file(name: str) -> str:
    files = _files(paths.ROOT)
    return hashlib.sha256(files[name].read_bytes()).hexdigest() if name in files else ""


def _sha256(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


if __name__ == "__main__":
    records.replace_text(FILE, json.dumps(everything(), indent=1, sort_keys=True) + "\n")
