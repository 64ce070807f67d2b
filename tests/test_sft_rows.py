"""Reading rows: formats, splits, and what is refused, by file and row."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.duplicates import near_duplicates
from mlxgpt.common.rows.formats import open_rows
from mlxgpt.common.rows.row import Row, as_messages, split_rows

ALPACA = [
    {"instruction": f"Double {n}.", "input": "" if n % 2 else f"n = {n}", "output": str(2 * n)} for n in range(40)
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def opened(path: Path, **tune: Any) -> dict[str, list[Row]]:
    return open_rows(TuneConfig(source=str(path), **tune)).splits


def first(path: Path, **tune: Any) -> Row:
    """The first row of a file of one row."""
    return opened(path, **tune)["train"][0]


def refused(path: Path, **tune: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_rows(TuneConfig(source=str(path), **tune))
    return str(caught.value)


def test_an_mlx_lm_folder_has_its_own_splits(tmp_path: Path) -> None:
    for name, count in (("train", 5), ("valid", 2), ("test", 3)):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(count)])
    rows = open_rows(TuneConfig(source=str(tmp_path)))
    assert {name: len(held) for name, held in rows.splits.items()} == {"train": 5, "valid": 2, "test": 3}
    assert rows.format == "text" and rows.splits["valid"][1].text == "valid 1"
    assert rows.splits["test"][2].where == f"{tmp_path / 'test.jsonl'} row 3"
    assert set(rows.digest) == {"train.jsonl", "valid.jsonl", "test.jsonl"}
    (tmp_path / "valid.jsonl").unlink()
    assert sum(map(len, opened(tmp_path, val_fraction=0.5).values())) == 8 and opened(tmp_path)["valid"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_one_file_of_any_kind(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        jsonl(path, ALPACA)
    elif suffix == ".json":
        path.write_text(json.dumps(ALPACA))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ALPACA), path)
    else:
        comma = "," if suffix == ".csv" else "\t"
        lines = [list(ALPACA[0]), *(list(row.values()) for row in ALPACA)]
        path.write_text("\ufeff" + "\n".join(comma.join(f'"{cell}"' for cell in line) for line in lines))
    splits = opened(path, val_fraction=0.2)
    assert len(splits["train"]) + len(splits["valid"]) == 40 and splits["valid"]
    by_row = {row.where: row.messages for rows in splits.values() for row in rows}
    assert by_row[f"{path} row 3"] == (
        {"role": "user", "content": "Double 2.\n\nn = 2"},
        {"role": "assistant", "content": "4"},
    )
    assert by_row[f"{path} row 2"][0]["content"] == "Double 1."


def test_cells_of_a_table_may_hold_line_ends_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    messages = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\nc"}])
    path.write_text('prompt,completion\n"a\nb","c"\n')
    assert (first(path).text, first(path).answer) == ("a\nb", "c")
    path.write_text('messages\n"' + messages.replace('"', '""') + '"\n')
    assert first(path).messages[1]["content"] == "b\nc"


def test_keys_decide_in_mlx_lms_order(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"text": "t", "messages": chat, "prompt": "p", "completion": "c"}
    path = tmp_path / "rows.jsonl"
    assert first(jsonl(path, [row])) == Row(f"{path} row 1", text="p", answer="c")
    assert first(path, format="text").text == "t"
    assert first(path, completion_key="none").messages == tuple(chat)
    assert first(path, prompt_key="text", completion_key="prompt").answer == "p"
    del row["completion"], row["messages"]
    assert first(jsonl(path, [row])).text == "t"
    assert first(path, text_key="prompt").text == "p"
    assert as_messages(Row("f row 1", text="p", answer="c")).messages == (
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "c"},
    )


def test_sharegpt_and_tools(tmp_path: Path) -> None:
    talk = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = jsonl(tmp_path / "rows.jsonl", [{"conversations": talk}])
    assert [tuple(message.values()) for message in first(path).messages] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
    ]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    row = {"messages": [{"role": "user", "content": "q"}, call], "tools": [{"function": {"name": "f"}}]}
    found = first(jsonl(path, [row]))
    assert "content" not in found.messages[1] and found.tools[0]["function"]["name"] == "f"


def test_labels(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}])
    assert first(path, task="classify").label == "1"
    assert "label is bool 'True'" in refused(jsonl(path, [{"text": "a", "label": True}]), task="classify")
    assert "no key 'label'" in refused(jsonl(path, [{"text": "a"}]), task="classify")


def test_rows_stay_on_their_side_when_others_come_or_go(tmp_path: Path) -> None:
    before = opened(jsonl(tmp_path / "a.jsonl", ALPACA))
    more = [*ALPACA[7:], {"instruction": "new", "output": "row"}, *ALPACA[:3]]
    after = opened(jsonl(tmp_path / "a.jsonl", more))
    for split, other in (("train", "valid"), ("valid", "train")):
        assert {row.hash for row in before[split]}.isdisjoint({row.hash for row in after[other]})


def test_equal_rows_are_not_parted_and_two_rows_are(tmp_path: Path) -> None:
    rows = [Row(f"f row {n}", text=f"text {n % 7}") for n in range(70)]
    train, valid = split_rows(rows, 0.3)
    assert valid and {row.text for row in train}.isdisjoint({row.text for row in valid})
    train, valid = split_rows(rows[:2], 0.001)
    assert (len(train), len(valid)) == (1, 1)


def test_one_row_trains_and_says_so(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "one.jsonl", ALPACA[:1])
    rows = open_rows(TuneConfig(source=str(path)))
    assert (len(rows.splits["train"]), rows.splits["valid"]) == (1, [])
    assert rows.notes == [f"{path}: only one example: it is trained on, and none is left for validation"]


GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "no key 'messages': found 'prompt'"),
        ({"mesages": []}, "no key 'messages' (did you mean 'mesages'?): found 'mesages'"),
        ("{nothing", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 200_000, "not JSON that can be read: nested too deeply"),
        ("", "an empty line: expected a JSON object"),
        ({}, "empty: expected keys and values"),
        ([1], "list '[1]': expected an object with keys"),
        ({"messages": []}, "messages is empty: expected messages"),
        ({"messages": "hello"}, "messages is str 'hello': expected a list of messages"),
        ({"messages": ["hello"]}, "message 1 is str 'hello': expected an object with role and content"),
        ({"messages": [{"content": "q"}]}, "message 1: no key 'role': found 'content'"),
        (
            {"messages": [{"role": "bot", "content": "q"}]},
            "message 1: unknown role 'bot': expected one of system, developer, user, assistant, tool",
        ),
        ({"messages": [{"role": "user"}]}, "message 1: no key 'content': found 'role'"),
        (
            {"messages": [{"role": "user", "content": ["q"]}]},
            'message 1: content part 1 is str \'q\': expected {"type": "text", "text": ...}',
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
            "message 2: content is empty: expected text",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "no assistant turn: expected at least one to train on",
        ),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        (
            {"messages": [{"role": "assistant", "tool_calls": "f()"}]},
            "message 1: tool_calls is str 'f()': expected a list of objects",
        ),
        (GOOD | {"tools": "{}"}, "tools is dict '{}': expected a list of objects"),
    ],
)
def test_a_bad_row_17_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*[GOOD] * 16, row, GOOD])
    found = refused(path)
    assert found.startswith(f"{path} row 17: ") and message in found and "\n" not in found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\n"a,b\n', "row 1: not csv: unexpected end of data"),
        ("a.csv", "text,label\na,b\na\n", "row 2: 1 columns: expected 2 as in the header"),
        ("a.csv", "text,text\na,b\n", "duplicate column names: text, text"),
        ("a.csv", "text\n", "no rows: expected at least one"),
        ("a.jsonl", "", "no rows: expected at least one"),
        ("a.json", '{"a": 1}', "dict \"{'a': 1}\": expected a list of objects"),
        ("a.json", '[{"a": 1}]', "row 1: keys 'a': expected prompt and completion; messages; text; "),
        ("a.jsonl", "\xff", "not UTF-8: byte 0 is 0xff"),
        ("a.parquet", "PAR1", "not a parquet file that can be read"),
        ("a.xlsx", "", "unknown format .xlsx: expected .jsonl .json .csv .tsv .parquet"),
        ("a.jsonl", '{"instruction": "a", "output": 4}', "row 1: output is int '4': expected a string"),
        ("a.jsonl", '{"instruction": "a", "output": "", "input": 3}', "row 1: input is int '3': expected a string"),
        (
            "a.jsonl",
            '{"conversations": [{"from": "alien", "value": "q"}]}',
            "row 1: conversations: message 1: unknown role 'alien': expected one of system",
        ),
        (
            "a.jsonl",
            '{"conversations": [{"from": "gpt"}]}',
            "row 1: conversations: message 1: no key 'value': found 'from'",
        ),
    ],
)
def test_bad_files_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    found = refused(path)
    assert found.startswith(str(path)) and message in found and "\n" not in found


def test_no_file_and_no_train_file(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "none")
    jsonl(tmp_path / "rows.jsonl", [GOOD])
    assert "found rows.jsonl: expected train.jsonl" in refused(tmp_path)


def test_near_duplicates_are_found_exactly() -> None:
    words = [f"w{n}" for n in range(60)]
    train = [Row("t row 1", text=" ".join(words)), Row("t row 2", text="The cat, sat."), Row("t row 3", text="other")]
    changed = [*words[:30], "changed", *words[31:]]  # 55 of 61 shingles of three are shared
    valid = [
        Row("v row 1", text="the CAT sat"),
        Row("v row 2", text=" ".join(changed)),
        Row("v row 3", text=" ".join(words[:30])),
        Row("v row 4", text="none like it"),
    ]
    pairs = near_duplicates(train, valid)
    assert [(pair.valid, pair.train) for pair in pairs] == [("v row 1", "t row 2"), ("v row 2", "t row 1")]
    assert pairs[0].similarity == 1 and pairs[1].similarity == pytest.approx(55 / 61)
