"""docs/extending.md: each change as it is written there, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from book.page import DOCS, ROOT, Fence, fences

PAGE = DOCS / "extending.md"
COPIED = ("mlxgpt", "torch_ref", "convert", "recipes", "tests", "pyproject.toml")


def sections() -> dict[str, list[Fence]]:
    """The fences below each heading of the second level that has any."""
    made: dict[str, list[Fence]] = {}
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        if found := [fence for fence in fences(text, title) if fence.role]:
            made[title] = found
    return made


SECTIONS = sections()


def apply(change: list[Fence], place: Path, *flags: str) -> None:
    """Adds the files and changes the lines in a copy of the repository."""
    for fence in change:
        if fence.role == "file":
            (place / fence.options[0]).write_text(fence.body + "\n")
        elif fence.role == "patch":
            command = ["git", "apply", *flags, "-"]
            done = subprocess.run(command, input=fence.body + "\n", cwd=place, capture_output=True, text=True)
            assert not done.returncode, done.stderr


def test_there_are_three_changes_with_a_test_each() -> None:
    assert list(SECTIONS) == ["An activation", "A family", "A format"]
    assert all([fence.role for fence in found].count("test") == 1 for found in SECTIONS.values())


@pytest.mark.parametrize("title", SECTIONS)
def test_the_lines_of_a_change_still_apply(title: str, tmp_path: Path) -> None:
    for fence in SECTIONS[title]:
        for name in re.findall(r"^--- a/(\S+)$", fence.body, re.MULTILINE):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        if fence.role == "file":
            assert not (ROOT / fence.options[0]).exists()
            (tmp_path / fence.options[0]).parent.mkdir(parents=True, exist_ok=True)
    apply(SECTIONS[title], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_the_test_of_a_change_fails_before_it_and_passes_after_it(title: str, tmp_path: Path) -> None:
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (test,) = (fence for fence in SECTIONS[title] if fence.role == "test")
    (tmp_path / test.options[0]).write_text(test.body + "\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", test.options[0]]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    before = run()
    assert before.returncode == 1, before.stdout + before.stderr
    apply(SECTIONS[title], tmp_path)
    after = run()
    assert after.returncode == 0, after.stdout + after.stderr
