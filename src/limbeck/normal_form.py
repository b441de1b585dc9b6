"""A definition's syntax with all that does not matter taken out, as text and references.

Out go names of locals (numbered instead), docstrings, comments, layout, aliases of imports and the definition's name; a
reference to a definition of the package stays one, so that what it is called and where it lies drop out too.
Annotations of functions and variables drop out, but what they name is a reference all the same.

A parameter may be reached by its name (`f(rate=1)`, `f(**options)`), so it stays in the text as a `Parameter`: its name
counts only where some reached code could spell it. Methods of a class with a base outside the package may be called by
anybody, so the names of their parameters always count.
"""

import ast
import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from limbeck import definitions
from limbeck.definitions import Definition, External, Functions, Package, Scope, Target

_OPAQUE = {"eval", "exec", "globals", "locals", "__import__", "importlib.import_module", "sys.modules"}
_PLAIN_BASES = {"object", "typing.Protocol", "typing.NamedTuple", "typing.Generic", "enum.Enum", "abc.ABC"}
_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass(frozen=True)
class Parameter:
    """The name of a parameter, which counts only if some code can spell it."""

    name: str


@dataclass(frozen=True)
class Named:
    """A definition or module that only an annotation names: that it is there counts, not where."""

    target: Definition | Package


Part = str | Parameter | Named | Definition | Package


@dataclass(frozen=True)
class NormalForm:
    """Text with references in it, and every word by which the code could reach a parameter."""

    parts: tuple[Part, ...]
    words: frozenset[str]


def of_definition(definition: Definition) -> NormalForm:
    """The normal form of a top-level name: of every statement that binds it."""
    statements = definitions.read(definition.module).statements[definition.name]
    return _written(definition.module, definition.name, tuple(statements))


def of_effects(module: str) -> list[NormalForm]:
    """The normal forms of the statements that do something when a module is loaded."""
    return [_written(module, "", (statement,)) for statement in definitions.read(module).effects]


def of_text(module: str, source: str) -> NormalForm:
    """The normal form of statements that stand in no file, as in a notebook's cells: their names are all local."""
    body = ast.FunctionDef("text", ast.arguments([], [], None, [], [], None, []), ast.parse(source).body, [])
    return _written(module, "", (body,))


@functools.lru_cache(maxsize=8192)
def _written(module: str, name: str, statements: tuple[ast.stmt, ...]) -> NormalForm:
    writer = _Writer(module, name)
    for statement in statements:
        writer.top(statement)
    return NormalForm(tuple(writer.parts), frozenset(writer.words))


class _Writer:
    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self.parts: list[Part] = []
        self.words: set[str] = set()
        self.scopes: list[Scope] = []

    def top(self, statement: ast.stmt) -> None:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.function(statement, exact=False)
            case ast.ClassDef():
                self.class_(statement)
            case ast.Assign(targets=targets, value=value) if self.name:
                alone = len(targets) == 1 and isinstance(targets[0], ast.Name)
                self.parts += [] if alone else [" ".join(map(self._place, targets))]
                self.node(value)
            case ast.AugAssign(target=ast.Name(), op=op, value=value):
                self.parts.append(f"{type(op).__name__}=")
                self.node(value)
            case _:
                self.node(statement)

    def _place(self, target: ast.expr) -> str:
        if isinstance(target, ast.Tuple | ast.List):
            return f"({','.join(map(self._place, target.elts))})"
        if isinstance(target, ast.Starred):
            return f"*{self._place(target.value)}"
        return "*" if isinstance(target, ast.Name) and target.id == self.name else "_"

    def node(self, node: ast.AST) -> None:
        match node:
            case ast.Name() | ast.Attribute():
                self.attribute(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.parts.append(self.binding(node.name))
                self.function(node, exact=bool(self.scopes) and self.scopes[-1].has_outsiders)
            case ast.Lambda():
                self.callable(node, [node.body], exact=False)
            case ast.ClassDef():
                self.parts.append(self.binding(node.name))
                self.class_(node)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                self.comprehension(node)
            case ast.AnnAssign():
                self.annotated(node)
            case ast.Import() | ast.ImportFrom():
                if not self.scopes:
                    raise ValueError(f"{self.module}: expected imports at the top or in a function, got one in a block")
                definitions.bind(self.scopes[-1].imports, definitions.imported(node), self.module)
            case ast.Constant():
                self.words |= {node.value} if isinstance(node.value, str) and node.value.isidentifier() else set()
                self.parts.append(f"{type(node.value).__name__}:{node.value!r}")
            case ast.Pass() | ast.Nonlocal():
                pass  # of the latter every name says by itself where it is bound
            case ast.Global():
                raise ValueError(f"{self.module}: received a global statement, expected none: it hides what is bound")
            case _:
                self.fields(node)

    def fields(self, node: ast.AST) -> None:
        self.parts.append(f"({type(node).__name__}")
        self.words |= {node.arg} if isinstance(node, ast.keyword) and node.arg else set()
        for name, value in ast.iter_fields(node):
            if name in ("ctx", "kind", "type_comment") or value is None:
                continue
            binds = isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping)
            self.parts.append(f" {name}=")
            if isinstance(value, ast.AST):
                self.node(value)
            elif isinstance(value, list):
                self.body(value)
            else:
                self.parts.append(self.binding(value) if binds and name in ("name", "rest") else repr(value))
        self.parts.append(")")

    def body(self, values: Sequence) -> None:
        self.parts.append("[")
        for value in values:
            if not isinstance(value, ast.AST):
                self.parts.append(f"{value!r},")
            elif not (isinstance(value, ast.stmt) and definitions.is_text(value)):
                before = len(self.parts)
                self.node(value)
                self.parts += [","] if len(self.parts) > before else []
        self.parts.append("]")

    def lookup(self, name: str) -> Target | str:
        for depth in range(len(self.scopes) - 1, -1, -1):
            scope = self.scopes[depth]
            if scope.is_class and depth < len(self.scopes) - 1:
                continue  # a method does not see the names of its class
            if name in scope.imports:
                return definitions.follow(*scope.imports[name])
            if name in scope.bound:
                number = scope.numbers.setdefault(name, len(scope.numbers))
                return f"class.{name}" if scope.is_class else f"{depth}.{number}"
        return definitions.resolve(self.module, name)

    def binding(self, name: str) -> str:
        target = self.lookup(name)
        return target if isinstance(target, str) else f"global.{name}"

    def attribute(self, node: ast.Name | ast.Attribute) -> None:
        chain: list[str] = []
        base: ast.expr = node
        while isinstance(base, ast.Attribute):
            chain.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name):
            target = self.lookup(base.id)
            if isinstance(base.ctx, ast.Load) and isinstance(target, str) and target.startswith("class."):
                self.outside(base.id, list(chain))
            self.reference(target, chain)
        else:
            self.node(base)
            self.parts.append("".join(f".{name}" for name in chain))

    def reference(self, target: Target | str, chain: list[str]) -> None:
        while isinstance(target, Package) and chain:
            target = definitions.resolve(target.module, chain.pop(0))
        if isinstance(target, External):
            dotted = ".".join([target.name, *chain])
            if dotted in _OPAQUE:
                raise ValueError(f"{self.module}, {self.name}: what {dotted} reaches cannot be read from the text")
            self.parts.append(f"<{dotted}>")
            return
        self.parts += [f"<{target}>" if isinstance(target, str) else target, "".join(f".{name}" for name in chain)]

    def outside(self, name: str, chain: list[str]) -> None:
        """What a name stands for until a class's body binds it, if for anything: `part: part.Part`."""
        scopes, self.scopes = self.scopes, self.scopes[:-1]
        with contextlib.suppress(ValueError):
            self.reference(self.lookup(name), chain)
        self.scopes = scopes

    def function(self, node: Functions, *, exact: bool) -> None:
        self.parts.append(type(node).__name__)
        self.body(node.decorator_list)
        self.callable(node, node.body, exact=exact)

    def callable(self, node: Functions | ast.Lambda, body: Sequence[ast.AST], *, exact: bool) -> None:
        """Defaults in the scope around, then parameters and body in a scope of their own."""
        arguments, parts = node.args, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)
        self.body([default for default in (*arguments.defaults, *arguments.kw_defaults) if default is not None])
        annotated = [argument for part in parts for argument in part]
        annotated += [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
        for annotation in (*(argument.annotation for argument in annotated), getattr(node, "returns", None)):
            self.annotation(annotation)
        bound = {argument.arg for argument in annotated} | set(definitions.bound_names(body))
        self.scopes.append(Scope(bound))
        for kind, part in zip(("/", "", "*"), parts, strict=True):
            for argument in part:
                self.parts.append(f"{kind}{self.lookup(argument.arg)}")
                self.parts.append(argument.arg if exact else Parameter(argument.arg) if kind != "/" else "")
        for kind, argument in (("*", arguments.vararg), ("**", arguments.kwarg)):
            self.parts.append(f"{kind}{self.lookup(argument.arg)}" if argument else "")
        self.parts.append(str([default is not None for default in arguments.kw_defaults]))
        self.body(body)
        self.scopes.pop()

    def comprehension(self, node: _COMPREHENSIONS) -> None:
        """The first iterable in the scope around, the rest in a scope of its own."""
        self.parts.append(f"({type(node).__name__}")
        targets = [name for part in node.generators for name in ast.walk(part.target)]
        scope = Scope({name.id for name in targets if isinstance(name, ast.Name)})
        for part in node.generators:
            self.node(part.iter)
            if scope not in self.scopes:
                self.scopes.append(scope)
            self.node(part.target)
            self.body(part.ifs)
            self.parts.append(str(part.is_async))
        for element in ("key", "value", "elt"):
            if hasattr(node, element):
                self.node(getattr(node, element))
        self.scopes.pop()
        self.parts.append(")")

    def class_(self, node: ast.ClassDef) -> None:
        self.parts.append("class")
        self.body(node.decorator_list)
        self.body([*node.bases, *node.keywords])
        outsiders = any(map(self._is_outsider, node.bases))
        self.scopes.append(Scope(set(definitions.bound_names(node.body)), is_class=True, has_outsiders=outsiders))
        self.body(node.body)
        self.scopes.pop()

    def _is_outsider(self, base: ast.expr) -> bool:
        """Whether a base class is, or comes from, one of another package that may call methods in its own way."""
        base = base.value if isinstance(base, ast.Subscript) else base
        writer = _Writer(self.module, self.name)
        writer.node(base)
        target = next((part for part in writer.parts if isinstance(part, Definition)), None)
        if target is None:
            return "".join(map(str, writer.parts)).strip("<>") not in _PLAIN_BASES
        statements = definitions.read(target.module).statements[target.name]
        inner = _Writer(target.module, target.name)
        return any(inner._is_outsider(b) for s in statements if isinstance(s, ast.ClassDef) for b in s.bases)

    def annotated(self, node: ast.AnnAssign) -> None:
        """A field's annotation counts; elsewhere it drops out, and what it names is reached."""
        assigned = ast.Assign([node.target], node.value)
        if self.scopes and self.scopes[-1].is_class:
            self.words |= {node.target.id} if isinstance(node.target, ast.Name) else set()
            self.parts.append("Field ")
            self.node(_unquoted(node.annotation))
            self.fields(assigned)
        else:
            self.annotation(node.annotation)
            if node.value is not None:
                self.node(assigned) if self.scopes else self.top(assigned)

    def annotation(self, node: ast.expr | None) -> None:
        writer = _Writer(self.module, self.name)
        writer.scopes = self.scopes
        if node is not None:
            writer.node(_unquoted(node))
        self.parts += [Named(part) for part in writer.parts if isinstance(part, Definition | Package)]


def _unquoted(annotation: ast.expr) -> ast.expr:
    """An annotation that is written as a text, read."""
    text = getattr(annotation, "value", None) if isinstance(annotation, ast.Constant) else None
    return ast.parse(text, mode="eval").body if isinstance(text, str) else annotation
