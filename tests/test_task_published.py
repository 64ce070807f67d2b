"""Published tasks, read as they were published and as the hub has them, asked in lm-evaluation-harness's words."""

import hashlib
import json
from pathlib import Path

import pytest
from task_rows import datasets, write_csv, write_hub, write_jsonl, write_published
from task_scorer import Said

from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks import named, requests

# sha256 of what lm-evaluation-harness 0.4.13 asks with 0, 1 and 3 examples: tests/lm_eval_requests.py
ASKED = {
    "hellaswag": ("1117bc9f082f0a77", "7eb3aebf067d87d4", "64dbb6cefe531d08"),
    "arc_easy": ("f093a6d85f43a78c", "f71acf7210bb75ac", "ae1a496ba38ff0e3"),
    "arc_challenge": ("48afec05ab37247f", "6087f68676aee64f", "a43cf0c943a7d3ed"),
    "piqa": ("eb6410451760063e", "aef493b159bbb164", "f99f1fbf8c23a700"),
    "winogrande": ("d06b0ae2fd38e3c7", "6033f54d0f3720c9", "dfe5f0d9c6e8c29c"),
    "lambada_openai": ("19b253940704e1c0", "a0487d2990acf021", "fc44ad1cc62aec79"),
    "lambada_standard": ("795d241f751fbac7", "2e979f02e45dd756", "b7a705287255daa2"),
    "mmlu_virology": ("10542c1808c25867", "7c2109e1b78e9d72", "f02381164e750d5f"),
    "mmlu_us_foreign_policy": ("d31614aae924d220", "cdb5319a52df328f", "a9f8a4abe1496046"),
    "gsm8k": ("92b999d44585adbf", "e1286bb0fe36d603", "00ed85b4f46a0dd0"),
    "crows_pairs_english": ("9ead71f31fd789f5",),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    write_published(folder / "published")
    write_hub(folder / "hub")
    return {form: folder / form for form in ("published", "hub")}


def asked(name: str, data: Path, shots: int | None = None, limit: int | None = None) -> list[list[str]]:
    """What a model is asked, text for text."""
    scorer = Said()
    requests.ask(named.read(name, str(data), shots), scorer, limit)
    return scorer.asked


@pytest.mark.parametrize("form", ["published", "hub"])
@pytest.mark.parametrize("name", ASKED)
def test_the_questions_are_those_of_lm_evaluation_harness(name: str, form: str, places: dict[str, Path]) -> None:
    data = places[form] / "mmlu" if name.startswith("mmlu_") else places[form]
    for shots, digest in zip((0, 1, 3), ASKED[name], strict=False):
        found = asked(name, data, shots)
        assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == digest, found[0]


def test_some_of_them_to_read(places: dict[str, Path]) -> None:
    first = {name: asked(name, places["published"], 1)[0] for name in ("hellaswag", "winogrande", "lambada_openai")}
    assert first["hellaswag"] == [
        "Bread Horse: bread horse paper early river bread The cold quiet early salt gate cold seven salt gate.\n\n"
        "Green Window: green window round paper stone green. A man",
        " green window round river bread horse.",
    ]
    assert first["winogrande"] == [
        "The bread horse paper because Ann was window round.\n\nThe green window round because the lamp",
        " was salt gate.",
    ]
    # two spaces before the example's answer, which begins with one of its own, as lm-evaluation-harness has it
    assert " '' said  salt  gate\u00e9\n\n" in first["lambada_openai"][0]


def test_a_limit_takes_the_first_questions_with_the_same_examples(places: dict[str, Path]) -> None:
    whole = asked("piqa", places["hub"], 3)
    assert asked("piqa", places["hub"], 3, limit=2) == whole[:4]
    subjects = asked("mmlu", places["published"] / "mmlu", 2, limit=2)
    assert len(subjects) == 2 * 2 * 4  # two of each subject, each with four choices


def test_mmlu_is_scored_by_subject_and_area(places: dict[str, Path]) -> None:
    task = named.read("mmlu", str(places["hub"]), 2)
    outcome = requests.ask(task, Said())
    sizes = {"other": 4, "other/virology": 4, "social_sciences": 3, "social_sciences/us_foreign_policy": 3}
    assert outcome.sizes == sizes and list(outcome.groups) == list(sizes) and outcome.questions == 7
    assert outcome.notes == (
        "55 of 57 subjects are not here: abstract_algebra, anatomy, astronomy, college_biology, ...",
    )
    area = requests.ask(named.read("mmlu_other", str(places["hub"]), 2), Said())
    assert area.metrics == outcome.groups["other"]
    whole = Said()
    write_jsonl(places["hub"] / "whole/all/test.jsonl", [
        {**row, "subject": name.removeprefix("mmlu_")}
        for name in ("mmlu_us_foreign_policy", "mmlu_virology") for row in datasets()[name][1]["test"]
    ])  # fmt: skip
    requests.ask(named.read("mmlu", str(places["hub"] / "whole"), 0), whole)
    assert whole.asked == asked("mmlu", places["published"], 0)


def test_gsm8k_has_five_examples_and_compares_two_ways(places: dict[str, Path]) -> None:
    task = named.read("gsm8k", str(places["published"]))
    assert task.shots == 5 and task.stop == ("Question:", "</s>", "<|im_end|>")
    outcome = requests.ask(task, Said(answer="It is 21,000.\n#### 21,000"))
    assert outcome.metrics["exact_match,strict-match"].value == pytest.approx(1 / 5)
    assert outcome.metrics["exact_match,flexible-extract"].value == pytest.approx(1 / 5)
    outcome = requests.ask(task, Said(answer="so 3 and then $22,000"))
    assert outcome.metrics["exact_match,strict-match"].value == 0
    assert outcome.metrics["exact_match,flexible-extract"].value == pytest.approx(1 / 5)


def test_a_file_is_the_questions_and_equal_choices_are_said(tmp_path: Path) -> None:
    rows = [{"goal": "To go", "sol1": "walk", "sol2": "walk", "label": 0}]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    task = named.read("piqa", str(tmp_path / "mine.jsonl"))
    assert len(task.questions) == 1 and task.notes == ("1 of 1 questions have equal choices, as published",)
    write_jsonl(tmp_path / "train.jsonl", [*rows, *rows, {**rows[0], "goal": "other"}])
    assert (
        asked("piqa", tmp_path / "mine.jsonl", 1)[0][0] == "Question: other\nAnswer: walk\n\nQuestion: To go\nAnswer:"
    )


BROKEN = [
    ("hellaswag", "hellaswag_val.jsonl", {"label": 4}, "row 1: label is int '4': expected 0 to 3"),
    ("hellaswag", "hellaswag_val.jsonl", {"label": ""}, "row 1: label is str '': expected 0 to 3"),
    ("hellaswag", "hellaswag_val.jsonl", {"endings": ["a", " "]}, "row 1: endings: number 1 is str ' '"),
    ("arc_easy", "ARC-Easy-Test.jsonl", {"answerKey": "E"}, "row 1: answerKey is str 'E': expected one of"),
    ("piqa", "valid.jsonl", {"label": -1}, "row 1: label is int '-1': expected 0 to 1"),
    ("winogrande", "dev.jsonl", {"sentence": "No gap."}, "row 1: sentence has no _ with text behind it"),
    ("winogrande", "dev.jsonl", {"answer": "0"}, "row 1: answer is str '0': expected 1 to 2"),
    ("lambada_openai", "lambada_test.jsonl", {"text": "word"}, "row 1: text has no last word"),
    ("gsm8k", "test.jsonl", {"answer": None}, "row 1: answer is null: expected a string"),
    ("crows_pairs_english", "test.jsonl", {"sent_less": ""}, "row 1: sent_less is empty"),
]


@pytest.mark.parametrize("name, file, wrong, message", BROKEN)
def test_a_row_that_is_no_question_is_refused(name: str, file: str, wrong: dict, message: str, tmp_path: Path) -> None:
    splits = datasets()[name][1]
    row = {**splits.get("test", splits.get("validation", []))[0], **wrong}
    write_jsonl(tmp_path / file, [row])
    with pytest.raises(UserError) as caught:
        named.read(name, str(tmp_path), 0)
    assert f"{file} {message}" in str(caught.value)


def test_files_that_are_not_where_they_should_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    write_jsonl(tmp_path / "two/a/validation.jsonl", datasets()["piqa"][1]["validation"])
    write_jsonl(tmp_path / "two/b/c/validation.jsonl", datasets()["piqa"][1]["validation"])
    write_jsonl(tmp_path / "labels/valid.jsonl", [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2)
    (tmp_path / "labels/valid-labels.lst").write_text("0\n")
    write_csv(tmp_path / "mmlu/virology_test.csv", [["Question?", "a", "b", "c", "d", ""]])
    for name, place, shots, message in [
        ("piqa", None, 0, "--task piqa: expected --data PATH"),
        ("piqa", "nowhere", 0, "nowhere: no such file or folder: expected the files of --task piqa"),
        ("piqa", "two", 0, "2 files may be meant (a/validation.jsonl, b/c/validation.jsonl): expected --data FILE"),
        ("piqa", "two/a", 2, "a: no train-*.parquet: expected it, or train.parquet, train.jsonl"),
        ("piqa", "empty.jsonl", 0, "empty.jsonl: empty: expected the rows of piqa"),
        ("piqa", "labels", 0, "valid-labels.lst: 1 labels: expected 2, one for each row"),
        ("hellaswag", "labels", 0, "labels: no hellaswag_val.jsonl: expected it, or validation-*.parquet"),
        ("mmlu", "two", 0, "no abstract_algebra_test.csv: expected it, or abstract_algebra/test-*.parquet"),
        ("mmlu", "mmlu", 0, "virology_test.csv row 1: 6 columns, the last str ''"),
        ("mmlu", "empty.jsonl", 0, "expected a folder, with a file for each subject"),
        ("crows_pairs_english", "two", 1, "no crows_pairs_anonymized.csv"),
        ("helaswag", ".", 0, "--task helaswag: no such file or task (did you mean 'hellaswag'?)"),
    ]:
        with pytest.raises(UserError) as caught:
            named.read(name, None if place is None else str(tmp_path / place), shots)
        assert message in str(caught.value)


def test_the_verb_refuses_before_it_loads_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "valid.jsonl", datasets()["piqa"][1]["validation"])
    write_jsonl(tmp_path / "train.jsonl", datasets()["piqa"][1]["train"][:3])
    for more, message in [
        (["--task", "piqa"], "--task piqa: expected --data PATH"),
        (["--task", "piqa", "--data", str(tmp_path), "--shots", "3"], "piqa: 3 examples before each question: found 3"),
    ]:
        assert cli.main(["eval", "-m", "/nowhere", *more]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and message in line
