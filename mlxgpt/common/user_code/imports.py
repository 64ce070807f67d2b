"""A user's own file, imported by its path: its folder first on sys.path, or as part of the package that it belongs to.

A file that works when it is imported (a course's script, which trains below its class) is run only as far as the class,
and of what follows only definitions.
"""

import ast
import importlib
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.user_code.absent import Absent

_PYTHON_CELLS = ("%%time", "%%capture")
_KEPT = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef, ast.Import, ast.ImportFrom)


class TheirError(Exception):
    """What the user's code raised: the message is one line, with the last place of theirs."""


def told(error: BaseException, path: Path) -> str:
    """``model.py, line 12, in forward: RuntimeError: ...``: the last frame in the folder of ``path``."""
    folder, frames = str(path.parent.resolve()), traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if os.path.abspath(frame.filename).startswith(folder + os.sep)]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= 300 else f"{text[:297]}..."
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    if not theirs:
        return text
    last = theirs[-1]
    name = os.path.relpath(os.path.abspath(last.filename), folder)
    return f"{name}, line {last.lineno}, in {last.name}: {text}"


def source_of(path: Path) -> str:
    """The Python of a file; of a notebook that of its cells.

    Raises:
        UserError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".ipynb":
            return text
        cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not UTF-8, or no notebook: {error}") from None
    texts = [cell if isinstance(cell, str) else "".join(cell) for cell in cells]
    texts = [text for text in texts if not text.startswith("%%") or text.startswith(_PYTHON_CELLS)]
    lines = "\n".join(texts).splitlines()
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines) + "\n"


def framework_of(path: Path, name: str = "") -> str:
    """``torch`` or ``mlx``: which the file imports, or the files beside it that it imports; where both, as the class.

    Raises:
        UserError: neither; the message names what it imports in their place.
    """
    roots = _imports(path, set())
    found = [each for each in ("torch", "mlx") if each in roots]
    if found:
        return next((each for each in found if len(found) > 1 and each == _base_of(path, name)), found[0])
    others = sorted(roots & {"jax", "flax", "tensorflow", "keras", "tinygrad", "numpy"})
    raise UserError(
        f"{path}: imports neither torch nor mlx{f' but {others[0]}' if others else ''}:"
        " make a sample yourself and give it by --like (docs/adopt.md)"
    )


def _base_of(path: Path, name: str) -> str:
    """The library of a class's base, as in ``class GPT(nn.Module)``; '' where the file does not say."""
    body = ast.parse(source_of(path)).body
    origins: dict[str, str] = {}
    for node in body:
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            module = getattr(node, "module", None) or alias.name
            origins[(alias.asname or alias.name).partition(".")[0]] = module.partition(".")[0]
    bases = {node.name: node.bases[0] for node in body if isinstance(node, ast.ClassDef) and node.bases}
    seen: set[str] = set()
    while name in bases and name not in seen:
        seen.add(name)
        base = bases[name]
        while isinstance(base, ast.Attribute):
            base = base.value
        name = base.id if isinstance(base, ast.Name) else ""
    return origins.get(name, "")


def _imports(path: Path, seen: set[Path]) -> set[str]:
    """The roots of what a file imports, and what the files beside it import."""
    seen.add(path)
    try:
        tree = ast.parse(source_of(path))
    except (UserError, SyntaxError, ValueError):
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    found = {name.partition(".")[0] for name in names}
    for name in names:
        parts = Path(*name.split("."))
        beside = [top / parts.with_suffix(".py") for top in path.parents[:5]]
        beside += [top / parts / "__init__.py" for top in path.parents[:5]]
        for other in beside:
            if other.is_file() and other not in seen:
                found |= _imports(other, seen)
    return found


def load(path: Path, name: str) -> tuple[types.ModuleType, list[str]]:
    """The module of a file, of which ``name`` is wanted; and what is to be said of how it was run.

    Raises:
        UserError: the file cannot be read or parsed.
        TheirError: what it raised.
    """
    try:
        tree = ast.parse(source_of(path), str(path))
    except SyntaxError as error:
        raise TheirError(told(error, path)) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    package, top = _package(path, tree)
    sys.path[:0] = [str(path.parent), str(top)]
    sys.argv = [str(path)]
    os.chdir(path.parent)
    tree, said = _without_work(tree, name.partition(".")[0], path.name)
    qualified = f"{package}.{path.stem}" if package else path.stem
    if qualified in sys.modules and not package:
        qualified = f"module_{qualified}"  # such as a tokenize.py of theirs
    absent = Absent()
    while True:
        module = types.ModuleType(qualified)
        module.__file__ = str(path)
        try:
            if package:
                _import_package(package, path.parent)
                module.__package__ = package
            sys.modules[qualified] = module
            exec(compile(tree, str(path), "exec"), module.__dict__)
            break
        except ModuleNotFoundError as error:
            if not _found_above(path, error) and not absent.miss(error):
                raise TheirError(f"{told(error, path)}; install {error.name} for this Python") from None
        except (Exception, SystemExit) as error:
            works = isinstance(error, SystemExit | OSError)
            cure = "; the file does work when it is imported: put that under if __name__ == '__main__'"
            raise TheirError(f"{told(error, path)}{cure if works else ''}") from None
    if absent.missed:
        said.append(f"not installed here, and stood in for by nothing: {', '.join(absent.missed)}")
    return module, said


def _found_above(path: Path, error: ModuleNotFoundError) -> bool:
    """Whether a folder above the file has what it imports by its full name; that folder is put on sys.path."""
    root = (error.name or "").partition(".")[0]
    for folder in path.parents[1:6]:
        there = root and ((folder / root).is_dir() or (folder / f"{root}.py").is_file())
        if there and str(folder) not in sys.path:
            sys.path.append(str(folder))
            return True
    return False


def _package(path: Path, tree: ast.Module) -> tuple[str, Path]:
    """The dotted name of the package that the file is in, '' for none, and the folder above it."""
    level = max((node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), default=0)
    parts: list[str] = []
    folder = path.parent
    while (len(parts) < level or (folder / "__init__.py").is_file()) and folder.name:
        parts.insert(0, folder.name)
        folder = folder.parent
    names = [re.sub(r"\W|^(?=\d)", "_", part) for part in parts]  # TinyGPT-v1.2
    return (".".join(names) if level else ""), folder


def _import_package(package: str, folder: Path) -> None:
    """Imports the package that the file is in; one whose folder no import could name is put there by hand."""
    names = package.split(".")
    folders = [folder, *folder.parents][: len(names)][::-1]
    if [each.name for each in folders] == names:
        importlib.import_module(package)
        return
    for n, each in enumerate(folders):
        made = types.ModuleType(".".join(names[: n + 1]))
        made.__path__ = [str(each)]
        sys.modules[made.__name__] = made


def _without_work(tree: ast.Module, name: str, file: str) -> tuple[ast.Module, list[str]]:
    """The file without what works below the class, or its import: if anything does, only definitions stay there."""
    at = next((n for n, node in enumerate(tree.body) if name in _names(node)), None)
    if at is None:
        return tree, []
    below = tree.body[at + 1 :]
    if not any(_works(node) for node in below):
        return tree, []
    kept = [
        node if isinstance(node, _KEPT) else _tried(node)
        for node in below
        if isinstance(node, _KEPT) or _is_plain(node)
    ]
    said = f"{file} works when it is imported: run up to {name}, and of what follows only definitions"
    return ast.Module([*tree.body[: at + 1], *kept], tree.type_ignores), [said]


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines or imports."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    return [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []


def _works(node: ast.stmt) -> bool:
    """Whether a statement is a loop, or a call for what it does."""
    return isinstance(node, ast.For | ast.While | ast.With) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )


def _is_plain(node: ast.stmt) -> bool:
    """``n_head = 4``, ``MODELS = {"gpt": GPT}``: an assignment that calls nothing."""
    return isinstance(node, ast.Assign | ast.AnnAssign) and not any(isinstance(e, ast.Call) for e in ast.walk(node))


def _tried(node: ast.stmt) -> ast.stmt:
    """The statement, of which it does not matter whether what it needs was left out."""
    handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
    return ast.fix_missing_locations(ast.copy_location(ast.Try([node], [handler], [], []), node))


def find(module: types.ModuleType, name: str, is_model: Callable[[Any], bool]) -> Any:
    """The class, function or model that ``name``, maybe dotted, is in a module.

    Raises:
        UserError: there is no such; the message lists what there is.
    """
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [
                key
                for key, value in vars(module).items()
                if isinstance(value, type) and value.__module__ == module.__name__ and is_model(value)
            ]
            listed = f": has {', '.join(own)}" if own else ": has no class of a model"
            raise UserError(f"{module.__file__}: no {name}{nearest(name, own)}{listed}")
        found = getattr(found, part)
    return found
