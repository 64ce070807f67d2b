"""The verb ``completion``, and what a shell is told on TAB: verbs, flags, choices, recipes, keys of --set, files.

argcomplete, because the program itself answers: verbs, recipes and keys are never those of another version, and one
function serves bash, zsh and fish. A static script (shtab) would have to be printed anew after each update.
"""

import argparse
from argparse import Namespace
from typing import Any

import argcomplete
from argcomplete.completers import DirectoriesCompleter, FilesCompleter
from argcomplete.shell_integration import shellcode

from mlxgpt.cli import VERBS
from mlxgpt.common import keys, recipes


def completion_command(args: Namespace) -> int:
    """Prints the script that a shell reads, such as ``eval "$(mlxgpt completion bash)"``."""
    print(shellcode(["mlxgpt"], shell=args.shell))
    return 0


def complete(**options: Any) -> None:
    """Answers the shell that asks by the environment, and ends the process; ``options`` are argcomplete's."""
    argcomplete.autocomplete(_whole(), **options)


def _whole() -> argparse.ArgumentParser:
    """One parser of all verbs, with what completes their arguments."""
    parser = argparse.ArgumentParser(prog="mlxgpt")
    places: dict[str, Any] = {"": parser.add_subparsers()}
    for name, verb in VERBS.items():
        group, _, last = name.rpartition(" ")
        if group in VERBS:
            continue  # runs check: a word that may follow runs
        if group not in places:
            places[group] = places[""].add_parser(group).add_subparsers()
        own = places[group].add_parser(last, help=verb.help)
        verb.declare(own)
        for action in own._actions:
            if completer := _COMPLETERS.get(action.dest):
                action.completer = completer  # type: ignore[attr-defined]
    return parser


def _recipes(prefix: str, **_: Any) -> list[str]:
    return [*recipes.names(), *FilesCompleter(("toml",))(prefix)]


def _settings(parsed_args: Namespace, **_: Any) -> list[str]:
    tuning = hasattr(parsed_args, "method") and not hasattr(parsed_args, "chip")
    return [f"{key.name}=" for key in keys.every(keys.FINETUNING if tuning else keys.PRETRAINING)]


def _runs(prefix: str, **_: Any) -> list[str]:
    return ["check", *DirectoriesCompleter()(prefix)]


_COMPLETERS = {"recipe": _recipes, "set": _settings, "folder": _runs}
