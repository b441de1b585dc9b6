"""Which files a module's numbers can depend on: its imports within the package, followed to the end, read as text.

The pipeline lists them as dependencies, and the ledger hashes them, so a change makes stale exactly the experiments
that import the changed file. Nothing is imported to find out.
"""

import ast
import functools
import hashlib
from pathlib import Path

from limbeck import paths

PACKAGE = "limbeck"


def module_file(module: str) -> Path | None:
    """The source file of a module of this package, or None if the name is not a module (but, say, a function)."""
    stem = paths.ROOT / "src" / Path(*module.split("."))
    return next((f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.is_file()), None)


def imports(source: str) -> set[str]:
    """Every dotted name of this package that an import statement of the code could load."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == PACKAGE}


def files(*modules: str) -> list[Path]:
    """The modules' files and those of all they import within the package, sorted."""
    found: set[Path] = set()
    waiting = list(modules)
    while waiting:
        parts = waiting.pop().split(".")
        for depth in range(1, len(parts) + 1):
            path = module_file(".".join(parts[:depth]))
            if path and path not in found:
                found.add(path)
                waiting.extend(imports(path.read_text()))
    return sorted(found)


@functools.cache
def _digest(path: Path, _modified: int) -> str:
    """Hash of the code alone: comments, layout and docstrings can change without a retraining."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def digest(*modules: str) -> str:
    """One hash over the code of the modules' closure."""
    lines = (f"{p.relative_to(paths.ROOT)} {_digest(p, p.stat().st_mtime_ns)}" for p in files(*modules))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
