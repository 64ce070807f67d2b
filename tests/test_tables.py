"""Text files: newlines alone end a line or a row (Python's csv is the judge), and the settings for other columns."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import templates
from models import tiny, weights

from mlxgpt import cli
from mlxgpt.common.config import TuneConfig
from mlxgpt.common.data.corpus import open_corpus, scan
from mlxgpt.common.data.split import split
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.recipes import apply_sets, build
from mlxgpt.common.rows.files import read_lines, read_values
from mlxgpt.common.rows.formats import open_rows
from mlxgpt.common.runs import samples
from mlxgpt.common.tokenizers.load import train_tokenizer

# what str.splitlines takes for the end of a line, and no reader of tables does; spaces and marks that must stay
INSIDE = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\xa0", "\ufeff"]


def rows_of(path: Path) -> list[list[str]]:
    return [list(row.values()) for _, row in read_values(path)]


def judged(path: Path) -> list[list[str]]:
    """The rows as Python's csv reads them."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig") as file:
        return [row for row in csv.reader(file, delimiter=delimiter) if row][1:]


@pytest.mark.parametrize("mark", INSIDE, ids=ascii)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_other_marks_stay_in_their_field(tmp_path: Path, mark: str, suffix: str) -> None:
    path, comma = tmp_path / f"a{suffix}", "," if suffix == ".csv" else "\t"
    fields = [["a", f"x{mark}y"], [f"p{mark}", f'"{mark}q"'], [f"{mark}s", "t"]]
    path.write_text("".join(comma.join(row) + "\n" for row in [["prompt", "completion"], *fields]), newline="")
    assert rows_of(path) == judged(path) == [["a", f"x{mark}y"], [f"p{mark}", f"{mark}q"], [f"{mark}s", "t"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\r\n1,2\r\n3,4\r\n", [["1", "2"], ["3", "4"]]),
        ("a,b\r1,2\r3,4\r", [["1", "2"], ["3", "4"]]),
        ("a,b\r\n1,2\n3,4\r5,6", [["1", "2"], ["3", "4"], ["5", "6"]]),
        ('a,b\n"x\ny","z\r\nw"\n"p\rq",r\n', [["x\ny", "z\r\nw"], ["p\rq", "r"]]),
        ('a,b\n"say ""hi""",2\na "b" c,3\n', [['say "hi"', "2"], ['a "b" c', "3"]]),
        ('\ufeff"a",b\n1,2\n', [["1", "2"]]),
        ("\n\na,b\n\n1,2\n\n\n3,4\n\n", [["1", "2"], ["3", "4"]]),
        ("a,b,\n1,2,\n", [["1", "2", ""]]),
        ("a,b,,\n1,2,,\n", [["1", "2", "", ""]]),
    ],
)
def test_a_table_is_what_csv_reads(tmp_path: Path, text: str, expected: list[list[str]]) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert rows_of(tmp_path / "a.csv") == judged(tmp_path / "a.csv") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\n1,2,\n3,4,,\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),  # pandas' index_col=False
        ("a,b,\n1,2\n", [{"a": "1", "b": "2", "Unnamed: 2": ""}]),
        (",a\n0,x\n", [{"Unnamed: 0": "0", "a": "x"}]),
        ("a,b\n   \n1,2\n", [{"a": "1", "b": "2"}]),
    ],
)
def test_ragged_ends_are_read_as_pandas_reads_them(tmp_path: Path, text: str, expected: list[dict[str, str]]) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert [row for _, row in read_values(tmp_path / "a.csv")] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1\n", "row 1: 1 columns: expected 2"),
        ("a,b\n1,2\n1,2,3\n", "row 2: 3 columns: expected 2"),
        ("a,b,a,b,c\n1,2,3,4,5\n", "duplicate column names: a, b, a, b$"),
        ('a,b\n1,2\n"x,2\n3,4\n', "row 2: not csv: unexpected end of data"),
        ("a,b\n1,\x002\n", "binary: NUL at byte 6: expected UTF-8 text"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=rf"a.csv:? ?.*{said}"):
        list(read_values(tmp_path / "a.csv"))


def test_lines_of_a_text_end_at_newlines_alone(tmp_path: Path) -> None:
    lines = [f"one{mark}two" for mark in INSIDE]
    (tmp_path / "a.txt").write_bytes(("\ufeff" + "\n".join([*lines, "x\r\ny\rz"]) + "\n").encode())
    assert read_lines(tmp_path / "a.txt") == [*lines, "x", "y", "z"]
    samples.append(tmp_path, 3, "".join(INSIDE))
    samples.append(tmp_path, 4, "next")
    assert [each.text for each in samples.read_samples(tmp_path)] == ["".join(INSIDE), "next"]
    row = {"prompt": "a\u2028b", "completion": "c\x85d\x0ce"}
    (tmp_path / "a.jsonl").write_text((json.dumps(row, ensure_ascii=False) + "\n") * 2)
    assert [found for _, found in read_values(tmp_path / "a.jsonl")] == [row] * 2


# columns by other names

PAIRS = [
    ("question", "answer"), ("input", "output"), ("query", "response"), ("problem", "solution"), ("q", "a"),
    ("Question", "Answer"), ("prompt", "response"), ("instruction", "answer"),
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def printed(path: Path, **tune: Any) -> list[str]:
    """The flags that the error prints, as a shell would read them."""
    with pytest.raises(UserError) as caught:
        open_rows(TuneConfig(source=str(path), **tune))
    found = re.search(r"; (--set .*) reads them$", str(caught.value))
    assert found, caught.value
    return shlex.split(found[1])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("asked", "answered"), PAIRS)
def test_the_setting_that_is_printed_reads_the_columns(tmp_path: Path, asked: str, answered: str, suffix: str) -> None:

    path = write(tmp_path / f"a{suffix}", [{"id": str(n), asked: f"q {n}", answered: f"a {n}"} for n in range(20)])
    for format in ("auto", "completion"):
        flags = printed(path, format=format)
        assert flags == ["--set", f"tune.prompt_key={asked}", "--set", f"tune.completion_key={answered}"]
        recipe = build(apply_sets({"tune": {"source": str(path)}}, flags[1::2]))
        assert recipe.tune
        rows = open_rows(recipe.tune)
        assert rows.format == "completion" and sum(map(len, rows.splits.values())) == 20
        assert {(row.text[0], (row.answer or "")[0]) for row in rows.splits["train"]} == {("q", "a")}


def test_other_keys_of_texts_talks_and_labels_are_told(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert printed(write(tmp_path / "a.jsonl", [{"dialogue": talk}])) == ["--set", "tune.messages_key=dialogue"]
    assert printed(write(tmp_path / "b.csv", [{"story": "x"}])) == ["--set", "tune.text_key=story"]
    path = write(tmp_path / "c.csv", [{"review": "x", "sentiment": "good"}])
    assert printed(path, task="classify") == ["--set", "tune.text_key=review", "--set", "tune.label_key=sentiment"]
    with pytest.raises(UserError, match=r"keys 'x', 'y': expected prompt and completion; messages.*conversations$"):
        open_rows(TuneConfig(source=str(write(tmp_path / "d.csv", [{"x": "1", "y": "2"}]))))


# equal rows


def test_equal_rows_are_counted(tmp_path: Path) -> None:
    for count, said in (
        (1, "only one example: it is trained on"),
        (2, "all 2 examples are equal: they are trained on"),
    ):
        rows = open_rows(TuneConfig(source=str(write(tmp_path / "a.jsonl", [{"text": "x"}] * count))))
        assert len(rows.splits["train"]) == count and not rows.splits["valid"]
        assert said in rows.notes[0]


def test_of_equal_documents_one_validates_and_the_others_train(tmp_path: Path) -> None:
    corpus = open_corpus(str(write(tmp_path / "a.jsonl", [{"text": "some words"}] * 3)))
    sides = [side for side, _ in split(corpus.read(), scan(corpus), 0.1)]
    assert sides == ["val", "train", "train"]


def test_eval_takes_the_printed_settings_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spelled = train_tokenizer("bpe", [templates.TEXT], 300)
    config = tiny(family="llama", vocab_size=spelled.n_vocab)
    model_folder.write_model(tmp_path / "m", config, weights(config), tokenizer=spelled)
    talks = [("What is it?", " It is a park"), ("Who goes?", " He goes")]
    plain = write(tmp_path / "a.jsonl", [{"prompt": q, "completion": a} for q, a in talks])
    words = ["eval", "-m", str(tmp_path / "m"), "--json", "--backend", "torch", "--device", "cpu", "-d"]
    assert cli.main([*words, str(plain)]) == 0
    expected = json.loads(capsys.readouterr().out)
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = write(tmp_path / f"b{suffix}", [{"question": q, "answer": a} for q, a in talks])
        assert cli.main([*words, str(path), *printed(path)]) == 0
        assert json.loads(capsys.readouterr().out) == expected
    assert cli.main([*words, str(path), "--set", "optim.lr=1"]) == 2
    assert cli.main([*words, str(path), "--set", "tune.task=classify"]) == 2
    assert "expected lm: mlxgpt classify scores classifiers" in capsys.readouterr().err
