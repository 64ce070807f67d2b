"""Answers against references, what is best by them, and the questions that every Python carries."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from mlxgpt.common.data import pydocs
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows import pydocs_qa
from mlxgpt.common.scores import text_metrics
from mlxgpt.common.train import loop

NAMES = ("exact", "bleu", "chrf", "rouge_l")
REFERENCES = ["the cat sat on the mat today", "join two paths with a slash between"]


def test_answers_that_are_the_references_are_perfect() -> None:
    found = text_metrics.score(NAMES, [f" {text}\n" for text in REFERENCES], REFERENCES)
    assert found == {"exact": 1.0, "bleu": pytest.approx(100), "chrf": pytest.approx(100), "rouge_l": 1.0}


def test_each_metric_falls_with_what_it_measures() -> None:
    swapped = ["on the mat sat the cat today", REFERENCES[1]]
    found = text_metrics.score(NAMES, swapped, REFERENCES)
    assert found["exact"] == 0.5
    assert found["rouge_l"] == pytest.approx((4 / 7 + 1) / 2)  # "on the mat today" or as long is common
    assert 20 < found["bleu"] < 100 and 60 < found["chrf"] < 100
    nothing = text_metrics.score(NAMES, ["", ""], REFERENCES)
    assert all(value == 0 for value in nothing.values())


def test_a_metric_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text_metrics.check_packages(NAMES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else object())
    text_metrics.check_packages(["exact", "rouge_l"])
    with pytest.raises(UserError, match="chrf needs sacrebleu: pip install"):
        text_metrics.check_packages(["chrf"])


@pytest.mark.parametrize(
    ("name", "found", "best", "better"),
    [
        ("loss", 1.0, None, True),
        ("loss", 1.0, 2.0, True),
        ("loss", 2.0, 2.0, False),
        ("loss", math.nan, None, False),
        ("chrf", 2.0, 1.0, True),
        ("chrf", 1.0, 2.0, False),
        ("chrf", math.inf, 1.0, False),
    ],
)
def test_less_loss_and_more_of_a_metric_is_better(name: str, found: float, best: float | None, better: bool) -> None:
    assert loop.is_better(name, {name: found}, None if best is None else {name: best}) == better


def test_questions_about_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = (
        ("a._hidden", "a._hidden(x)\n\nReturn all that is hidden.\n"),
        ("a.long", "a.long(x)\n\n" + "many words " * 40),
        ("a.short", "a.short(x)\n\nSee b.\n"),
        ("posixpath.join", "posixpath.join(a, *p)\n\nJoin two or more\npathname components.\n\nMore of it.\n"),
        ("queue.Queue", "queue.Queue\n\nCreate a queue object with a given maximum size.\n"),
        ("topic if", "The if statement is used for conditional execution.\n"),
    )
    monkeypatch.setattr(pydocs, "documents", lambda: documents)
    expected = [
        {"prompt": "What does os.path.join do?\n", "completion": "Join two or more pathname components."},
        {"prompt": "What is queue.Queue?\n", "completion": "Create a queue object with a given maximum size."},
    ]
    assert list(pydocs_qa.rows()) == expected
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path))
    place = pydocs_qa.file()
    assert [json.loads(line) for line in place.read_text().splitlines()] == expected
    assert pydocs_qa.file() == place
