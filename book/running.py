"""Runs a page from top to bottom, as a reader would, and compares what it prints with what stands there.

All the Python of a page shares one namespace; all its commands one folder, empty at first.
"""

import contextlib
import io
import linecache
import os
import shlex
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from book.compare import same
from book.page import ROOT, STAND_IN, BookError, Fence, fences, output_of


def run_page(path: Path, folder: Path, slow: bool = False, write: bool = False) -> list[str]:
    """Runs the page in ``folder`` and returns what is wrong with it, a text a fence; stops at the first error.

    Args:
        path: the page.
        folder: where its commands work; the page finds it empty.
        slow: also what is marked slow.
        write: puts what was printed into the page where it differs.
    """
    text, name = path.read_text(encoding="utf-8"), place_of(path)
    lines, found = text.splitlines(), fences(text, name)
    stand_ins = {match["name"]: match["stand_in"] for match in STAND_IN.finditer(text)}
    wrong: list[str] = []
    changes: list[tuple[int, int, list[str]]] = []
    module = types.ModuleType("__page__")
    check: Fence | None = None
    with in_folder(folder), registered(module):
        for fence, following in zip_longest(found, found[1:]):
            if "slow" in fence.options and not slow:
                continue
            try:
                if fence.role == "check":
                    check = fence
                    must_fail(fence, name, module)
                    continue
                if fence.language == "sh" and fence.role == "run":
                    printed = run_commands(fence, name, stand_ins)
                elif fence.role in ("run", "starter", "answer"):
                    printed = run_python(fence, name, module)
                else:
                    continue
                if fence.role == "answer":
                    if check is None:
                        raise BookError(f"{name}:{fence.first + 1}: an answer without a ```python check above it")
                    printed += run_python(check, name, module)
                    check = None
            except BookError as error:
                wrong.append(str(error))
                break
            except Exception as error:
                wrong.append(f"{name}:{line_of(error, name) or fence.first + 2}: {type(error).__name__}: {error}")
                break
            printed = printed.replace(f"{Path.cwd()}/", "")  # the folder has another name each time
            output = output_of(fence, following, lines)
            if output is None and (fence.language == "sh" or not printed.strip()):
                continue
            if not same(output.body if output else "", printed):
                wrong.append(
                    f"{name}:{fence.first + 1}: the page has\n{output and output.body}\nand it prints\n{printed}"
                )
                changes.append(renewed(fence, output, printed))
        if check is not None and not wrong:
            wrong.append(f"{name}:{check.first + 1}: a check without a ```python answer below it")
    if write and changes:
        for first, last, new in reversed(changes):
            lines[first:last] = new
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return wrong


def place_of(path: Path) -> str:
    """How errors name a page."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def renewed(fence: Fence, output: Fence | None, printed: str) -> tuple[int, int, list[str]]:
    """The lines of a page to replace, and those to put there."""
    indent = " " * fence.indent
    body = ["```text output", *(line.rstrip() for line in printed.strip("\n").splitlines()), "```"]
    new = [indent + line if line else "" for line in body]
    return (output.first, output.last + 1, new) if output else (fence.last + 1, fence.last + 1, ["", *new])


def run_python(fence: Fence, name: str, module: types.ModuleType) -> str:
    """Runs it in the page's namespace and returns what it printed."""
    code = "\n" * (fence.first + 1) + fence.body + "\n"
    where = f"<{name}:{fence.first + 1}>"
    linecache.cache[where] = (len(code), None, code.splitlines(True), where)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, where, "exec", dont_inherit=True), module.__dict__)
    return out.getvalue()


def must_fail(fence: Fence, name: str, module: types.ModuleType) -> None:
    """A check that passes before the reader has written anything checks nothing."""
    try:
        run_python(fence, name, module)
    except Exception:
        return
    raise BookError(f"{name}:{fence.first + 1}: this check passes without an answer")


def run_commands(fence: Fence, name: str, stand_ins: dict[str, str]) -> str:
    """Runs each command, with what stands in for its words, and returns what it printed, errors too.

    Raises:
        BookError: a command's exit code is not the fence's.
    """
    expected = int(fence.options[fence.options.index("exit") + 1]) if "exit" in fence.options else 0
    printed = ""
    for line in fence.body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        words = [stand_ins.get(word, word) for word in words]
        code, text = run_command(line, words, shlex.split(fence.flags))
        printed += text
        if code != expected:
            raise BookError(f"{name}:{fence.first + 1}: {line.strip()}: exit code {code}, expected {expected}\n{text}")
    return printed


def run_command(line: str, words: list[str], flags: list[str]) -> tuple[int, str]:
    """Our own commands in this process, which saves a second each; the others in a shell."""
    if words[:3] == ["python", "-m", "torch_ref"]:
        words, backend = ["mlxgpt", *words[3:]], "torch"
    else:
        backend = None
    if words[0] == "mlxgpt" and not {"|", ">", ">>", "<", "&&", "||", ";"} & set(words):
        from mlxgpt import cli

        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = cli.main([*words[1:], *flags], backend=backend)
        return code, out.getvalue()
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = shlex.join([*words, *flags]) if flags and words[0] == "mlxgpt" else line
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


def line_of(error: Exception, name: str) -> int | None:
    """The last line of the page that the error passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(f"<{name}:")]
    return frames[-1].lineno if frames else None


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """The current directory, with an empty cache of its own."""
    before, path, cache = Path.cwd(), list(sys.path), os.environ.get("MLXGPT_CACHE")
    os.chdir(folder)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        with tempfile.TemporaryDirectory() as empty:
            os.environ["MLXGPT_CACHE"] = empty
            yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        if cache is None:
            os.environ.pop("MLXGPT_CACHE", None)
        else:
            os.environ["MLXGPT_CACHE"] = cache


@contextlib.contextmanager
def registered(module: types.ModuleType) -> Iterator[None]:
    """A page's namespace as a module, which dataclasses and pickles look for."""
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]
