"""The command line: parses arguments, runs a verb, and is the only place that prints errors and exits.

Nothing heavy is imported before a verb runs, so that --help answers at once. Exit codes: 0 done, 1 a check failed or a
run broke, 2 wrong usage or input, 130 interrupted, 143 terminated.
"""

import argparse
import importlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from mlxgpt import __version__
from mlxgpt.common.errors import RunError, UserError, nearest
from mlxgpt.verbs import CALLED, VERBS


class Parser(argparse.ArgumentParser):
    """Its errors are UserErrors: one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        word = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        if word != message.partition(" ")[0] and "--data" in self._option_string_actions and os.path.exists(word):
            model = any(os.path.isfile(os.path.join(word, name)) for name in ("recipe.toml", "config.json"))
            flag = "--model" if model and "--model" in self._option_string_actions else "--data"
            message += f": expected {flag} {shlex.quote(word)}"
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None, backend: str | None = None) -> int:
    """Runs one command and returns its exit code; ``backend`` is what the verbs use where --backend is not given."""
    prog = "python -m torch_ref" if backend == "torch" else "mlxgpt"
    terminated = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _guarded(list(sys.argv[1:] if argv is None else argv), prog, backend)
    except KeyboardInterrupt:
        # also one that came while an error was looked at, such as that of a compiler which it had stopped
        return _fail(prog, "interrupted", 130)
    finally:
        signal.signal(signal.SIGTERM, terminated)


def _guarded(argv: list[str], prog: str, backend: str | None) -> int:
    try:
        code = _run(list(argv), prog, backend)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(prog, str(error), 2)
    except RunError as error:
        return _fail(prog, str(error), 1)
    except BrokenPipeError:
        # the reader, such as head, left; what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(prog, *_explained(error, argv))


def _explained(error: Exception, argv: list[str]) -> tuple[str, int]:
    """The line and the exit code of an error that the verb did not name; raises it again if nobody knows it."""
    from mlxgpt.common import failures

    if known := failures.meaning(error):
        verb = next((name for name in VERBS if name.split() == argv[: len(name.split())]), "")
        advice = failures.ADVICE.get(verb, "") if known.memory else ""
        return ": ".join(filter(None, (verb, known.line))) + (f"; {advice}" if advice else ""), 1
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
    raise error


def _run(argv: list[str], prog: str, backend: str | None) -> int:
    if "_ARGCOMPLETE" in os.environ:  # a shell asks, on TAB
        importlib.import_module("mlxgpt.commands.completion").complete()
    if argv[:1] in (["--version"], ["version"]):
        print(f"mlxgpt {__version__}")
        return 0
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    path: list[str] = []
    while " ".join(path) not in VERBS:
        word = argv.pop(0) if argv else "--help"
        if word in ("-h", "--help"):
            print(_overview(prog, path))
            return 0
        if word not in _words(path):
            known, asked = _words(path), " ".join([*path, word])
            raise UserError(f"unknown verb {asked!r}{_verb_meant(word, known)}: expected one of {', '.join(known)}")
        path.append(word)
    while argv and " ".join([*path, argv[0]]) in VERBS:
        path.append(argv.pop(0))
    verb = VERBS[" ".join(path)]
    parser = Parser(
        prog=" ".join([prog, *path]),
        description=verb.help[0].upper() + verb.help[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {prog} {example}" for example in verb.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.declare(parser)
    _check_flags(parser, argv, " ".join(path))
    args = parser.parse_args(argv)
    if hasattr(args, "backend"):
        from mlxgpt.common import tf32
        from mlxgpt.common.backend import resolve

        tf32.take(args)  # a framework is told before it is imported
        # a device that is not here is refused before any work
        args.backend = args.backend or backend
        if not verb.resolves:
            args.backend = resolve(args.backend, getattr(args, "device", None))
    module, _, function = verb.function.partition(":")
    return getattr(importlib.import_module(module), function)(args) or 0


def _fail(prog: str, message: str, code: int) -> int:
    print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _words(path: list[str]) -> list[str]:
    """The words that may follow ``path``, the first words of a verb."""
    names = [name.split() for name in VERBS]
    return list(dict.fromkeys(name[len(path)] for name in names if name[: len(path)] == path))


def _verb_meant(word: str, known: list[str]) -> str:
    """The verb that was meant: one that is spelled alike, or called so elsewhere; or what to do with a path."""
    plain = word.rpartition("mlx_lm.")[2].removesuffix(".py").lower()
    for name, others in CALLED.items():
        if plain in others.split() and name.split()[0] in known:
            return f" (did you mean {name!r}?)"
    if plain in known:
        return f" (did you mean {plain!r}?)"
    if os.path.exists(word) and "train" in known:
        return f" (did you mean 'train --data {shlex.quote(word)}'?)"
    return nearest(word, known)


def _overview(prog: str, path: list[str]) -> str:
    verbs = {name: verb for name, verb in VERBS.items() if name.split()[: len(path)] == path}
    first = [] if path else [
        "first:",
        f"  {prog} train --data books/        a model of your own texts: a folder or files",
        f"  {prog} train                      the same on Python's documentation: nothing to download",
        f"  {prog} generate -m runs/books -p 'Once'",
        "",
    ]  # fmt: skip
    return "\n".join([
        f"usage: {' '.join([prog, *path])} VERB ...",
        "",
        "Train small GPTs in MLX or PyTorch: one recipe, seed and data give one loss curve in both.",
        "",
        *first,
        "verbs:",
        *(f"  {name:<18} {verb.help}" for name, verb in verbs.items()),
        "",
        f"{' '.join([prog, *path])} VERB --help shows a verb's arguments and examples.",
    ])  # fmt: skip


def _check_flags(parser: argparse.ArgumentParser, argv: list[str], verb: str = "") -> None:
    """Raises UserError for an unknown flag, with the one that was meant, which argparse does not name."""
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    words = argv[: argv.index("--")] if "--" in argv else argv
    for word, following in zip(words, [*words, "-"][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and " " not in flag and flag not in known:
            from mlxgpt.common.keys import flag_meant

            value = value if equals or following.startswith("-") else following
            raise UserError(f"unknown flag {flag}{flag_meant(flag, value, verb, known)} (see {parser.prog} --help)")
    model = parser._option_string_actions.get("--model")
    given = any(word.startswith(("-m", "--model")) for word in words)
    if model and model.required and not given and words and os.path.isdir(words[0]):
        raise UserError(f"{words[0]}: expected --model {shlex.quote(words[0])} (see {parser.prog} --help)")
