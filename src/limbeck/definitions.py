"""The package read as text: what each module defines, and what a name in it stands for. Nothing is imported.

A module is its imports, its definitions (a function, a class, or a variable with every statement that binds it) and its
effects: top-level statements that define nothing, and definitions that a decorator of the package may enter in a table.
"""

import ast
import builtins
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from limbeck import paths

PACKAGE = "limbeck"
_KNOWN = {*dir(builtins), "__file__", "__name__", "__class__", "__doc__"}
_BLOCKS = ast.If | ast.Try | ast.TryStar | ast.For | ast.While | ast.With | ast.Match
Functions = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A top-level name of a module of the package."""

    module: str
    name: str


@dataclass(frozen=True)
class External:
    """A dotted name outside the package, or a name of Python itself."""

    name: str


@dataclass(frozen=True)
class Package:
    """A module of the package, used as a value."""

    module: str


Target = Definition | External | Package


@dataclass
class Module:
    """The top level of one source file."""

    name: str
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # bound name: module, its attribute
    statements: dict[str, list[ast.stmt]] = field(default_factory=dict)  # defined name: what binds it, in order
    effects: list[ast.stmt] = field(default_factory=list)


@dataclass(eq=False)
class Scope:
    """One function, lambda or comprehension (`numbers` of its locals, in order of appearance), or a class's body."""

    bound: set[str]
    is_class: bool = False
    has_outsiders: bool = False
    numbers: dict[str, int] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)


def module_file(module: str) -> Path | None:
    """The source file of a module of the package, or None if the name is not a module (but, say, a function)."""
    stem = paths.ROOT / "src" / Path(*module.split("."))
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


def is_of_package(module: str) -> bool:
    """Whether a dotted name lies in the package."""
    return module.split(".", maxsplit=1)[0] == PACKAGE


def read(module: str) -> Module:
    """A module's top level, read once for each version of its file. Raises ValueError if there is no such module."""
    file = module_file(module)
    if file is None:
        raise ValueError(f"expected a module of the package, got {module}")
    return _parsed(module, file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _parsed(module: str, file: Path, _modified: int) -> Module:
    content = Module(module)
    for statement in _flat(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            bind(content.imports, imported(statement), module)
            continue
        names = bound_names([statement])
        for name in names:
            content.statements.setdefault(name, []).append(statement)
        if not names or isinstance(statement, _BLOCKS) or not _is_plain(statement):
            content.effects.append(statement)
    if twice := sorted(set(content.imports) & set(content.statements)):
        raise ValueError(f"{module} both imports and defines {', '.join(twice)}; expected one meaning for a name")
    content.effects += [node for nodes in content.statements.values() for node in nodes if _is_entered(content, node)]
    return content


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that count: no docstrings, no block for scripts; a block for type checkers like any other."""
    for statement in body:
        test = ast.unparse(statement.test) if isinstance(statement, ast.If) else ""
        if test in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _flat([*statement.body, *statement.orelse])
        elif test != "__name__ == '__main__'" and not is_text(statement):
            yield statement


def is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring or another bare constant."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_plain(statement: ast.stmt) -> bool:
    """Whether a binding does no more: `TABLE["x"] = y = 1` writes into a table too."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return not any(isinstance(node, ast.Subscript | ast.Attribute) for part in targets for node in ast.walk(part))


def _is_entered(content: Module, statement: ast.stmt) -> bool:
    """Whether a decorator of the package sees the definition when the module is loaded."""
    if not isinstance(statement, ast.ClassDef | Functions):
        return False
    names = {name.id for part in statement.decorator_list for name in ast.walk(part) if isinstance(name, ast.Name)}
    return any(name in content.statements or is_of_package(content.imports.get(name, ("",))[0]) for name in names)


def imported(statement: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str | None]]:
    """The names that an import binds, each with the module and the attribute that it stands for.

    Raises ValueError for a relative import or one of all names, whose meaning does not stand there.
    """
    if isinstance(statement, ast.ImportFrom):
        if statement.level or any(alias.name == "*" for alias in statement.names):
            raise ValueError(f"expected an absolute import of names, got `{ast.unparse(statement)}`")
        return {alias.asname or alias.name: (statement.module, alias.name) for alias in statement.names}
    return {
        alias.asname or alias.name.split(".")[0]: (alias.name if alias.asname else alias.name.split(".")[0], None)
        for alias in statement.names
    }


def bind(imports: dict[str, tuple[str, str | None]], names: dict[str, tuple[str, str | None]], where: str) -> None:
    """Add imported names. Raises ValueError for one that stands for something else already."""
    for name, target in names.items():
        if imports.setdefault(name, target) != target:
            raise ValueError(f"{where} imports {name} twice, as {imports[name]} and as {target}; expected one meaning")


def bound_names(body: Sequence[ast.AST]) -> list[str]:
    """The names that some statements bind in their own scope, in order; imports, which bind modules, left out."""
    names: dict[str, None] = {}
    outer: set[str] = set()
    waiting: list[tuple[ast.AST, bool]] = [(statement, True) for statement in reversed(body)]
    while waiting:
        node, in_scope = waiting.pop()
        inner = in_scope and not isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
        if isinstance(node, ast.ClassDef | Functions):
            names |= {node.name: None} if in_scope else {}
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and in_scope:
            names[node.id] = None
        elif isinstance(node, ast.NamedExpr):
            names[node.target.id] = None  # also out of a comprehension
        elif isinstance(node, ast.Global | ast.Nonlocal):
            outer |= set(node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names[node.name] = None
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names[node.rest] = None
        waiting.extend((child, inner) for child in reversed(list(ast.iter_child_nodes(node))))
    return [name for name in names if name not in outer]


def resolve(module: str, name: str) -> Target:
    """What a name at the top of a module stands for, through any number of imports.

    Raises ValueError for a name that the module lacks: static reading would not see what it depends on.
    """
    content = read(module)
    if name in content.statements:
        return Definition(module, name)
    if name in content.imports:
        return follow(*content.imports[name])
    if module_file(f"{module}.{name}"):
        return Package(f"{module}.{name}")
    if name in _KNOWN:
        return External(name)
    raise ValueError(f"{module} has no {name}, and what it stands for is not known")


def follow(module: str, attribute: str | None) -> Target:
    """What an imported name stands for: a module, or an attribute of one."""
    if not is_of_package(module):
        return External(module if attribute is None else f"{module}.{attribute}")
    return Package(module) if attribute is None else resolve(module, attribute)
