"""The corpus that every Python carries: the language reference of pydoc_data and the standard library's docstrings.

Sources are parsed by `ast`, never imported; tests, idlelib and installed packages are left out. About 2 MB of English.
"""

import ast
import functools
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mlxgpt.common.errors import UserError

_HOLDS_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)  # expressions hold no docstrings
_LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}


def files() -> list[Path]:
    """The source files that the corpus is made from, sorted, the reference's topics first.

    Raises:
        UserError: this Python carries neither sources nor topics.
    """
    root = Path(sysconfig.get_path("stdlib"))
    topics = root / "pydoc_data" / "topics.py"
    found = [topics] if topics.is_file() else []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
        found += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]
    if not found:
        raise UserError(
            f"pydocs: {root} holds no Python sources: expected the standard library; give data.source a path"
        )
    return found


@functools.cache
def documents() -> tuple[tuple[str, str], ...]:
    """(name, text) of every document, sorted by name, each text once; parsed once a process, some seconds.

    A docstring's document starts with the dotted name, and a function's arguments.
    """
    root = Path(sysconfig.get_path("stdlib"))
    made: dict[str, str] = {}
    seen: set[str] = set()
    for path in files():
        if path.parent.name == "pydoc_data":
            entries = _topics(path)
        else:
            entries = _docstrings(
                path, ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            )
        for name, header, body in entries:
            if body.strip() and body not in seen and name not in made and _is_text(body):
                seen.add(body)
                made[name] = f"{header}{body.rstrip()}\n"
    return tuple(sorted(made.items()))


def _is_text(text: str) -> bool:
    """Whether a docstring is plain text: escapes may have put NULs or lone surrogates into it."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None  # a template or a file of another version: no docstrings to be had


def _topics(path: Path) -> Iterator[tuple[str, str, str]]:
    """The dict of literals in pydoc_data/topics.py."""
    tree = _parse(path)
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield f"topic {key.value}", "", str(value.value).lstrip("\n")


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """(name, header, docstring) of the module and of every class and function in it, in source order."""
    tree = _parse(path)
    waiting: list[tuple[ast.AST, str]] = [(tree, module)] if tree else []
    while waiting:
        node, name = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = ast.get_docstring(node)
            if body:
                called = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                yield name, f"{name}({ast.unparse(node.args)})\n\n" if called else f"{name}\n\n", body
        inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, _HOLDS_STATEMENTS)]
        for child in reversed(inner):
            own = getattr(child, "name", None) if isinstance(child, ast.stmt) else None
            waiting.append((child, f"{name}.{own}" if own else name))
