"""The process in which reward functions of a user's file are called; rewards.py starts it.

Requests and answers are JSON objects, a line each, through pipes whose numbers are the arguments. What a function
prints goes to standard error. Nothing here is imported before the network is closed.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.common.user_code import guard


def main() -> None:
    """Answers until the pipe of requests is closed."""
    asked, answered = int(sys.argv[1]), int(sys.argv[2])
    guard.close_network()
    os.dup2(2, 1)
    functions: dict[str, Callable[..., Any]] = {}
    with open(asked, encoding="utf-8") as requests, open(answered, "w", encoding="utf-8") as told:
        for line in requests:
            request = json.loads(line)
            try:
                answer = _answer(request, functions)
            except BaseException as error:
                answer = {"error": _said(error, request.get("path", ""))}
            json.dump(answer, told)
            told.write("\n")
            told.flush()


def _answer(request: Mapping[str, Any], functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    path, name = request["path"], request["function"]
    key = f"{path}:{name}"
    if key not in functions:
        functions[key] = _load(path, name)
    if "prompts" not in request:
        return {}
    function, columns = functions[key], request["columns"]
    made = function(request["prompts"], request["completions"], **_read(function, columns))
    if hasattr(made, "tolist"):
        made = made.tolist()
    if not isinstance(made, list | tuple):
        raise TypeError(f"returned a {type(made).__name__}: expected a list of numbers, one a completion")
    return {"rewards": [_number(each, n) for n, each in enumerate(made)]}


def _load(path: str, name: str) -> Callable[..., Any]:
    """The function of a file, whose own folder it may import from; without a name the only one, or ``reward``."""
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with contextlib.redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
    own = {
        each: value
        for each, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not each.startswith("_")
    }
    name = name or ("reward" if "reward" in own else next(iter(own)) if len(own) == 1 else "")
    if name not in own:
        raise LookupError(f"functions {', '.join(own) or 'none'}: expected FILE.py:FUNCTION to name one of them")
    return own[name]


def _read(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that the function takes: all where it has **keywords."""
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return dict(columns)
    named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    return {name: values for name, values in columns.items() if name in named}


def _number(value: Any, index: int) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"completion {index + 1}: {value!r}: expected a number")
    return float(value)


def _said(error: BaseException, path: str) -> str:
    """What was raised, and the last line of the user's file that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}".rstrip(": ")[:500]
