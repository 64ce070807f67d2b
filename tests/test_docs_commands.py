"""Every command that the pages show has a verb, flags, recipes and keys that exist; those marked ``run`` also run."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from book.page import DOCS, ROOT
from mlxgpt import cli
from mlxgpt.common import recipes
from mlxgpt.common.errors import UserError
from mlxgpt.verbs import VERBS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("**/*.md"))]
STARTS = re.compile(r"(?:\.venv/bin/)?mlxgpt(?= )|python -m torch_ref(?= )")
KEYS = {f"{section}.{field.name}" for section, kind in recipes.SECTIONS.items() for field in dataclasses.fields(kind)}
LAYOUTS = ("qkv", "gate_fc", "rope")  # what `adopt --set` takes beside the fields of [model]
OPEN = ("tune.chat_template_kwargs.",)  # keys with names of the user's below them


def shown(page: str) -> Iterator[str]:
    """The commands of a page: lines of code blocks, and code in a line, without what is said behind them."""
    text = re.sub(r"\\\n\s*", " ", page)
    blocks = re.findall(r"^( *)```([^\n]*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for _, info, block in blocks for line in block.splitlines() if "exit" not in info]
    lines += [line.strip() for line in re.findall(r"^    +(.*)$", text, re.MULTILINE)]
    for line in lines:
        if STARTS.match(line):
            yield re.split(r" {3,}| #", line)[0]
    prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`", prose) if STARTS.match(span))


def words_of(command: str) -> list[str]:
    """The words behind the program, also those in brackets, up to a pipe."""
    words = shlex.split(re.sub(r"\[([^]=]*)\]", r"\1", STARTS.sub("", command, count=1)))
    for stop in ("|", ">", "<", "&&", ";"):
        words = words[: words.index(stop)] if stop in words else words
    return [word for word in words if word != "..."]


def problem(command: str) -> str:
    """What of a command does not exist; empty if all does."""
    words = words_of(command)
    count = next((n for n in (2, 1) if " ".join(words[:n]) in VERBS and len(words) >= n), 0)
    if not count:
        known = {name.split()[0] for name in VERBS} | {"VERB", "--help", "--version", "help"}
        return "" if not words or words[0] in known else f"no verb {words[0]!r}"
    verb, rest = VERBS[" ".join(words[:count])], words[count:]
    parser = cli.Parser(prog="mlxgpt", allow_abbrev=False)
    verb.declare(parser)
    try:
        cli._check_flags(parser, rest)
    except UserError as error:
        return str(error)
    for flag, value in pairwise(rest):
        key = value.partition("=")[0]
        if verb is VERBS["adopt"] and (f"model.{key}" in KEYS or key in LAYOUTS):
            continue
        if flag == "--set" and not key.isupper() and key not in KEYS and not key.startswith(OPEN):
            return f"no key {key}"
    recipe = next(iter(rest), "")
    if verb is VERBS["train"] and re.fullmatch(r"[a-z][\w-]*", recipe) and recipe not in recipes.names():
        return f"no recipe {recipe!r}"
    return ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_on_a_page_exists(path: Path) -> None:
    wrong = {command: said for command in shown(path.read_text(encoding="utf-8")) if (said := problem(command))}
    assert not wrong


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("mlxgpt trian pydocs", "no verb 'trian'"),
        ("mlxgpt train pydocs --step 5", "unknown flag --step"),
        ("mlxgpt train pydoc", "no recipe 'pydoc'"),
        ("mlxgpt finetune --model X --set tune.blocksize=3", "no key tune.blocksize"),
        ("python -m torch_ref generate -m X --promt y | head", "unknown flag --promt"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str, message: str) -> None:
    (found,) = shown(f"Text.\n\n```\n{command}   what it does\n```\n")
    assert problem(found).startswith(message)
    (found,) = shown(f"Type `{command}`.")
    assert problem(found).startswith(message)
