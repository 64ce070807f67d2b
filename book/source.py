"""The source of a symbol, read when the site is built, so that a page cannot show what the code no longer is.

```source
attention.attend                      a function of mlxgpt/attention.py and torch_ref/attention.py, in two tabs
```
```source
model.Block.__call__                  a method: torch_ref's is forward
from: y = self.attn                   the first line shown: the first that contains this text
to: after = x + y                     the last one
```
```source
attention.attend
from mlx: scores = q @                where the frameworks differ in that line
from torch: scores = q @ k
```
```source
common.model.params.init_params       what both share, once
```
```source
examples/gpt.py Block                 any file; two of them, a | between, in two tabs
```
"""

import ast
import textwrap
from typing import NamedTuple

from book.page import ROOT, BookError

FRAMEWORKS = {"mlxgpt": "MLX", "torch_ref": "PyTorch"}


class Shown(NamedTuple):
    label: str  # of the tab
    path: str  # relative to the repository
    code: str


def shown(body: str) -> list[Shown]:
    """What a source fence shows: one piece of code, or one a framework.

    Raises:
        BookError: no such file, symbol or line.
    """
    name, *rest = body.strip().splitlines()
    cuts = {}
    for line in rest:
        key, colon, text = line.partition(":")
        if not colon or key.strip() not in {f"{end}{tab}" for end in ("from", "to") for tab in ("", " mlx", " torch")}:
            raise BookError(f"source {name}: {line!r}: expected from:, to:, from mlx:, to mlx:, from torch:, to torch:")
        cuts[key.strip()] = text.strip()
    made = []
    for label, path, symbol in places(name.strip()):
        code = symbol_source(path, symbol)
        tab = " torch" if label == "PyTorch" else " mlx"
        first, last = (cuts.get(end + tab, cuts.get(end)) for end in ("from", "to"))
        made.append(Shown(label, path, excerpt(code, first, last, f"{path} {symbol}")))
    return made


def places(name: str) -> list[tuple[str, str, str]]:
    """(label, path, symbol) of a name as a page has it."""
    if "/" in name:
        files, _, symbol = name.partition(" ") if "|" not in name else (name, "", "")
        pair = [part.split() for part in files.split("|")]
        labels = ["MLX", "PyTorch"] if len(pair) == 2 else [""]
        return [
            (label, path, symbol or (tail[0] if tail else ""))
            for label, (path, *tail) in zip(labels, pair, strict=True)
        ]
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path, symbol = "/".join(parts[:count]) + ".py", ".".join(parts[count:])
        found = [folder for folder in FRAMEWORKS if (ROOT / folder / path).is_file()]
        if found:
            labels = [FRAMEWORKS[folder] if "torch_ref" in found else "" for folder in found]
            return [(label, f"{folder}/{path}", symbol) for label, folder in zip(labels, found, strict=True)]
    raise BookError(f"source {name}: no file mlxgpt/{'/'.join(parts[:-1]) or name}.py")


def symbol_source(path: str, symbol: str) -> str:
    """The lines of a class, function, method or constant, with its decorators, without its indentation."""
    try:
        text = (ROOT / path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BookError(f"source {path}: no such file") from None
    if not symbol:
        return text.rstrip()
    node: ast.AST = ast.parse(text)
    for part in symbol.split("."):
        wanted = {"forward", "__call__"} if part in ("forward", "__call__") else {part}
        match = next((child for child in ast.walk(node) if child is not node and names(child) & wanted), None)
        if match is None:
            raise BookError(f"source: {path} has no {symbol}")
        node = match
    assert isinstance(node, ast.stmt) and node.end_lineno is not None
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))


def names(node: ast.AST) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {each.id for each in node.targets if isinstance(each, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def excerpt(code: str, first: str | None, last: str | None, what: str) -> str:
    """The lines from the first that contains ``first`` to the next that contains ``last``."""
    lines, start, end = code.splitlines(), 0, None
    if first is not None:
        start = next((n for n, line in enumerate(lines) if first in line), -1)
        if start < 0:
            raise BookError(f"source: {what} has no line with {first!r}")
    if last is not None:
        end = next((n for n, line in enumerate(lines[start:], start) if last in line), None)
        if end is None:
            raise BookError(f"source: {what} has no line with {last!r} after line {start + 1} of it")
    return textwrap.dedent("\n".join(lines[start : None if end is None else end + 1]))
