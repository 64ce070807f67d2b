"""A page of docs/ as a list of its fences, also those inside admonitions and those hidden in HTML comments.

What a fence is for stands after its language:

    ```python run          runs; what it prints stands below in ```text output
    ```python run slow     runs in the slow suite and in --write only
    ```python starter      what a reader begins an exercise with; the check below must fail with it
    ```python check        passes with the answer
    ```python answer       one right answer
    ```python test PATH    a test to add to the repository, which fails until what follows it is there too
    ```python file PATH    a file to add
    ```diff patch          lines to change; tests/test_extending.py does what these three say
    ```sh run              commands; exit code 0, or ```sh run exit 2
    ```source              a symbol, shown in both frameworks; see source.py
    <!-- python run        the same as ```python run, seen by nobody; closed by -->
    <!-- run with: FLAGS   appended to the mlxgpt commands of the next fence, closed by -->
    <!-- in tests: A = B   B stands for A in all commands of the page, closed by -->
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

OPEN = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)")
HIDDEN = re.compile(r"<!-- python run")
STAND_IN = re.compile(r"^<!-- in tests: (?P<name>\S+) = (?P<stand_in>\S+) -->$", re.MULTILINE)
RUN_WITH = re.compile(r"<!-- run with: (?P<flags>.*?) -->")
ROLES = {
    "python": {"run", "starter", "check", "answer", "test", "file"},
    "diff": {"patch"},
    "sh": {"run"},
    "text": {"output"},
}


NAMED = {"test", "file"}  # roles that a path follows


class BookError(Exception):
    """A page says something that does not hold; the message names the page and the line."""


@dataclass(frozen=True)
class Fence:
    """Lines ``first`` to ``last`` of a page, counted from 0, of which the outer two are the marks."""

    language: str
    role: str  # run, starter, check, answer, output ...; empty for a fence that is only shown
    options: tuple[str, ...]  # the words after the role
    indent: int
    first: int
    last: int
    body: str  # without the indentation
    flags: str = ""  # of <!-- run with -->


def fences(text: str, name: str) -> list[Fence]:
    """All fences of a page in order.

    Raises:
        BookError: a fence without an end, or an unknown word after its language.
    """
    lines, found, n, flags = text.splitlines(), [], 0, ""
    while n < len(lines):
        if match := RUN_WITH.fullmatch(lines[n].strip()):
            flags = match["flags"]
        hidden = HIDDEN.fullmatch(lines[n])
        match = OPEN.fullmatch(lines[n])
        if not (match or hidden):
            n += 1
            continue
        indent, close = (match["indent"], match["indent"] + match["ticks"]) if match else ("", "-->")
        last = next((k for k in range(n + 1, len(lines)) if lines[k].rstrip() == close), 0)
        if not last:
            raise BookError(f"{name}:{n + 1}: this fence has no end")
        words = match["info"].split() if match else ["python", "run"]
        language, role = [*words, "", ""][:2]
        if language in ROLES and role and role not in ROLES[language]:
            raise BookError(f"{name}:{n + 1}: {role!r} after {language}: expected one of {sorted(ROLES[language])}")
        role = role if language in ROLES else ""
        if role in NAMED and len(words) != 3:
            raise BookError(f"{name}:{n + 1}: expected a path after {language} {role}")
        body = "\n".join(line[len(indent) :] for line in lines[n + 1 : last])
        options = ("hidden",) if hidden else tuple(words[2:])
        found.append(Fence(language, role, options, len(indent), n, last, textwrap.dedent(body), flags))
        n, flags = last + 1, ""
    return found


def output_of(fence: Fence, following: Fence | None, lines: list[str]) -> Fence | None:
    """The output that stands below a fence, if one does, with nothing but blank lines between."""
    if following is None or following.role != "output" or "".join(lines[fence.last + 1 : following.first]).strip():
        return None
    return following


def chapters() -> list[Path]:
    """The chapters of the course in order."""
    return sorted((DOCS / "course").glob("[0-9][0-9]-*.md"))


def runnable() -> list[Path]:
    """Every page with something to run."""
    marks = re.compile(r"^ *(```(python|sh) (run|starter|check|answer)|<!-- python run)", re.MULTILINE)
    pages = [ROOT / "README.md", *DOCS.glob("**/*.md")]
    return sorted(path for path in pages if marks.search(path.read_text(encoding="utf-8")))
