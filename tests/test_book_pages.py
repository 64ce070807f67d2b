"""Every page of docs/ with something to run prints what it says; ``python -m book run --write`` renews them."""

from pathlib import Path

import pytest

from book.page import DOCS, ROOT, chapters, fences, runnable
from book.running import run_page
from book.source import shown

PAGES = [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in runnable()]
CHAPTERS = [pytest.param(path, id=path.stem) for path in chapters()]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_prints_what_it_says(path: Path, tmp_path: Path) -> None:
    assert not run_page(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [page for page in PAGES if " run slow" in Path(str(page.values[0])).read_text()])
def test_a_page_prints_what_it_says_also_where_that_takes_long(path: Path, tmp_path: Path) -> None:
    assert not run_page(path, tmp_path, slow=True)


def test_every_page_shows_lines_that_exist() -> None:
    """A change of the code that takes a shown line away fails here, and not first where the site is built."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("**/*.md"))}
    found = [
        fence.body for path, text in pages.items() for fence in fences(text, path.name) if fence.language == "source"
    ]
    assert len(found) > 20 and all(shown(body) for body in found)


def lacks(text: str) -> list[str]:
    """What a chapter needs and does not have."""
    found = fences(text, "chapter")
    roles = {fence.role for fence in found}
    questions = [line.split('"')[1].split(".")[0] for line in text.splitlines() if line.startswith('??? question "')]
    needed = {
        "title": text.startswith("# "),
        "mathematics": "\n$$\n" in text,
        "source": any(fence.language == "source" for fence in found),
        "run": {"run", "output"} <= roles,
        "exercise": {"starter", "check", "answer"} <= roles,
        "questions": questions == list("12345"),
    }
    return [what for what, there in needed.items() if not there]


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_has_all_its_parts(path: Path) -> None:
    assert lacks(path.read_text(encoding="utf-8")) == []


PARTS = {
    "title": "# A title\n",
    "mathematics": "$$\nx\n$$\n",
    "source": "```source\nmodel.attend\n```\n",
    "run": "```python run\nprint(1)\n```\n\n```text output\n1\n```\n",
    "exercise": "".join(f"```python {role}\npass\n```\n" for role in ("starter", "check", "answer")),
    "questions": "".join(f'??? question "{n}. Why?"\n\n    So.\n\n' for n in range(1, 6)),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_a_chapter_lacks_is_named(part: str) -> None:
    assert lacks("\n".join(PARTS.values())) == []
    assert lacks("\n".join(text for name, text in PARTS.items() if name != part)) == [part]
