"""Four users, each from an empty folder: tests/walks/*.py."""

import importlib
import sys
from pathlib import Path

import pytest

PLACE = Path(__file__).parent / "walks"


def test_every_walk_is_walked() -> None:
    scripts = {path.stem for path in PLACE.glob("*.py")} - {"walk"}
    assert scripts == {"mac_owner", "questions", "researcher", "student"}


@pytest.mark.parametrize("name", ["mac_owner", "questions", "researcher", "student"])
def test_a_walk_arrives(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [str(PLACE), *sys.path])
    walk = importlib.import_module("walk")
    code = walk.main(importlib.import_module(name).walk)
    assert code == 0, capsys.readouterr().err
