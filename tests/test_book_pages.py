"""Every page of docs/ with something to run prints what it says; ``python -m book run --write`` renews them."""

from pathlib import Path

import pytest

from book.page import ROOT, chapters, fences, runnable
from book.running import run_page

PAGES = [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in runnable()]
CHAPTERS = [pytest.param(path, id=path.stem) for path in chapters()]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_prints_what_it_says(path: Path, tmp_path: Path) -> None:
    assert not run_page(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [page for page in PAGES if " run slow" in Path(str(page.values[0])).read_text()])
def test_a_page_prints_what_it_says_also_where_that_takes_long(path: Path, tmp_path: Path) -> None:
    assert not run_page(path, tmp_path, slow=True)


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_has_all_its_parts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = fences(text, path.name)
    roles = [fence.role for fence in found]
    assert text.startswith("# ")
    assert "\n$$\n" in text, "no mathematics"
    assert any(fence.language == "source" for fence in found), "no source"
    assert "output" in roles, "no run with its output"
    assert {"starter", "check", "answer"} <= set(roles), "no exercise"
    questions = [line for line in text.splitlines() if line.startswith('??? question "')]
    assert [line.split('"')[1].split(".")[0] for line in questions] == list("12345"), "five numbered questions"
