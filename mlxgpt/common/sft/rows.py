"""Reads fine-tuning data in the common formats as rows: a text, a prompt and its answer, messages, or a label.

A folder is mlx-lm's: train.jsonl, and valid.jsonl and test.jsonl where they exist. One file is split by a hash of each
row, so a row stays in its split when others are added or removed. The first row's keys select the format, in mlx-lm's
order (prompt and completion, messages, text), then Alpaca's and ShareGPT's; rows without those keys are errors. Every
message names file and row; rows of .csv, .tsv, .json and .parquet count from 1 without a header.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxgpt.common.config import TuneConfig
from mlxgpt.common.data.corpus import decoded, open_parquet, parse_json
from mlxgpt.common.errors import UserError, nearest

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
ROLES = ("system", "developer", "user", "assistant", "tool")
SPLITS = ("train", "valid", "test")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Row:
    """One row: ``text``, ``text`` with the ``answer`` that follows it, ``messages``, or ``text`` and ``label``."""

    where: str  # file and row
    text: str = ""
    answer: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    label: str | None = None

    @property
    def hash(self) -> int:
        """64 bits of a hash of the content."""
        content = json.dumps([self.text, self.answer, self.messages, self.tools, self.label], sort_keys=True)
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")

    @property
    def words(self) -> str:
        """All text of the row, for comparing rows."""
        turns = [str(message.get("content", "")) for message in self.messages]
        return "\n".join([self.text, self.answer or "", *turns])


@dataclass
class Rows:
    """The rows of each split, and the sha256 of each file by its name."""

    format: str
    splits: dict[str, list[Row]]
    digest: dict[str, str]
    notes: list[str]


def open_rows(tune: TuneConfig) -> Rows:
    """All rows of ``tune.source``.

    Raises:
        UserError: no file, a damaged file, or a row in another format; names file and row.
    """
    if not tune.source:
        raise UserError("tune.source is empty: expected a folder with train.jsonl, or one of " + " ".join(SUFFIXES))
    path = Path(tune.source).expanduser()
    files = _files(path)
    digest = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values()}
    raw = {split: list(read_values(file)) for split, file in files.items()}
    if not raw["train"]:
        raise UserError(f"{files['train']}: no rows: expected at least one")
    kind = tune.format
    if tune.task == "classify":
        kind = "label"
    elif kind == "auto":
        kind = _detect(raw["train"][0], tune)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for split, rows in raw.items():
        splits[split] = [_FORMATS[kind](value, where, tune) for where, value in rows]
    notes = []
    if not splits["valid"]:
        splits["train"], splits["valid"] = split_rows(splits["train"], tune.val_fraction)
        if not splits["valid"]:
            notes.append(f"{path}: only one example: it is trained on, and none is left for validation")
    return Rows(kind, splits, digest, notes)


def split_rows(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(train, valid): a row is in the validation split if its hash is below ``fraction`` of the hash range.

    If that selects none or all, the rows with the smallest hash are; rows with equal hashes stay together.
    """
    hashes = [row.hash for row in rows]
    smallest, largest = min(hashes), max(hashes)
    if smallest == largest:
        return rows, []
    limit = int(fraction * (1 << 64))
    if smallest >= limit or largest < limit:
        limit = smallest + 1
    train = [row for row, found in zip(rows, hashes, strict=True) if found >= limit]
    return train, [row for row, found in zip(rows, hashes, strict=True) if found < limit]


def _files(path: Path) -> dict[str, Path]:
    """Split -> file."""
    if path.is_dir():
        for name in ("train.jsonl", "train.json", "train.csv", "train.tsv", "train.parquet"):
            if (path / name).is_file():
                suffix = Path(name).suffix
                others = {split: path / f"{split}{suffix}" for split in SPLITS}
                return {split: file for split, file in others.items() if file.is_file()}
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise UserError(f"{path}: found {found}: expected train.jsonl, and optionally valid.jsonl and test.jsonl")
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder: expected data to fine-tune on")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: unknown format {path.suffix or 'without a suffix'}: expected {' '.join(SUFFIXES)}")
    return {"train": path}


def read_values(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and row, its keys and values) of one file."""
    suffix = path.suffix.lower()
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}.get(suffix, _read_table)
    for number, value in read(path):
        where = f"{path} row {number}"
        if not isinstance(value, dict):
            raise UserError(f"{where}: {_shown(value)}: expected an object with keys")
        if not value:
            raise UserError(f"{where}: empty: expected keys and values")
        yield where, value


def _text(path: Path) -> str:
    text, _ = decoded(path.read_bytes(), 0, str(path), final=True)
    return text.removeprefix("\ufeff")


def _read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_text(path).rstrip().split("\n") if path.stat().st_size else [], 1):
        if not line.strip():
            raise UserError(f"{path} row {number}: an empty line: expected a JSON object")
        yield number, parse_json(line, f"{path} row {number}")


def _read_json(path: Path) -> Iterator[tuple[int, object]]:
    value = parse_json(_text(path), str(path))
    if not isinstance(value, list):
        raise UserError(f"{path}: {_shown(value)}: expected a list of objects")
    yield from enumerate(value, 1)


def _read_table(path: Path) -> Iterator[tuple[int, object]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(_text(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
    number, names = 0, None
    try:
        for fields in reader:
            if not fields:
                continue
            if names is None:
                names = fields
                if len(set(names)) < len(names):
                    raise UserError(f"{path}: duplicate column names: {', '.join(names[:8])}")
                continue
            number += 1
            if len(fields) != len(names):
                raise UserError(f"{path} row {number}: {len(fields)} columns: expected {len(names)} as in the header")
            yield number, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} row {number + 1}: not {path.suffix[1:]}: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    with open_parquet(path) as file:
        yield from enumerate((row for batch in file.iter_batches(1024) for row in batch.to_pylist()), 1)


def _detect(first: tuple[str, dict[str, Any]], tune: TuneConfig) -> str:
    """The format, by the first row's keys."""
    where, row = first
    for kind, keys in _keys(tune).items():
        if all(key in row for key in keys):
            return kind
    known = "; ".join(" and ".join(keys) for keys in _keys(tune).values())
    raise UserError(f"{where}: keys {', '.join(map(repr, list(row)[:8]))}: expected {known}")


def _keys(tune: TuneConfig) -> dict[str, tuple[str, ...]]:
    return {
        "completion": (tune.prompt_key, tune.completion_key),
        "chat": (tune.messages_key,),
        "text": (tune.text_key,),
        "alpaca": ("instruction", "output"),
        "sharegpt": ("conversations",),
    }


def _value(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        found = ", ".join(map(repr, list(row)[:8]))
        raise UserError(f"{where}: no key {key!r}{nearest(key, row)}: found {found}")
    return row[key]


def _string(row: dict[str, Any], key: str, where: str, empty: bool = False) -> str:
    """The text at ``key``, which holds more than white space unless ``empty``."""
    value = _value(row, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {_shown(value)}: expected a string")
    if not empty and not value.strip():
        raise UserError(f"{where}: {key} is empty: expected text")
    return _unicode(value, f"{where}: {key}")


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise UserError(f"{where}: {found!r} at character {error.start}: half of a surrogate pair") from None
    return text


def _shown(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _text_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    return Row(where, text=_string(row, tune.text_key, where))


def _completion_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    prompt = _string(row, tune.prompt_key, where, empty=True)
    return Row(where, text=prompt, answer=_string(row, tune.completion_key, where), tools=_tools(row, where))


def _alpaca_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    asked = _string(row, "instruction", where)
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise UserError(f"{where}: input is {_shown(given)}: expected a string")
    if given.strip():
        asked = f"{asked}\n\n{_unicode(given, f'{where}: input')}"
    answer = _string(row, "output", where)
    return Row(where, messages=({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))


def _chat_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    messages = _list(row, tune.messages_key, where)
    return Row(where, messages=_messages(messages, where), tools=_tools(row, where))


def _sharegpt_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    messages = []
    for number, turn in enumerate(_list(row, "conversations", where), 1):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            raise UserError(f"{where}: turn {number} is {_shown(turn)}: expected an object with from and value")
        if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT:
            known = ", ".join(_SHAREGPT)
            raise UserError(f"{where}: turn {number}: unknown role {turn['from']!r}: expected one of {known}")
        messages.append({"role": _SHAREGPT[turn["from"]], "content": turn["value"]})
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Row(where, messages=_messages(messages, where), tools=_tools(row, where))


def text_to_classify(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    """A row with or without a label."""
    if tune.label_key in row:
        return _label_row(row, where, tune)
    return Row(where, text=_string(row, tune.text_key, where))


def _label_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    label = _value(row, tune.label_key, where)
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
        raise UserError(f"{where}: {tune.label_key} is {_shown(label)}: expected a label, as text or a whole number")
    text = _string(row, tune.text_key, where)
    return Row(where, text=text, label=_unicode(str(label).strip(), f"{where}: {tune.label_key}"))


_FORMATS: dict[str, Callable[[dict[str, Any], str, TuneConfig], Row]] = {
    "text": _text_row,
    "completion": _completion_row,
    "chat": _chat_row,
    "alpaca": _alpaca_row,
    "sharegpt": _sharegpt_row,
    "label": _label_row,
}


def _list(row: dict[str, Any], key: str, where: str) -> list[Any]:
    value = _value(row, key, where)
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a table
        value = parse_json(value, f"{where}: {key}")
    if not isinstance(value, list):
        raise UserError(f"{where}: {key} is {_shown(value)}: expected a list of messages")
    if not value:
        raise UserError(f"{where}: {key} is empty: expected messages")
    return value


def _messages(messages: list[Any], where: str) -> tuple[dict[str, Any], ...]:
    """Messages as templates read them: keys whose value is null are dropped, as transformers drops them."""
    made = []
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{place} is {_shown(message)}: expected an object with role and content")
        message = {key: value for key, value in message.items() if value is not None}
        if "role" not in message:
            raise UserError(f"{place}: no key 'role': found {', '.join(map(repr, message)) or 'nothing'}")
        if message["role"] not in ROLES:
            raise UserError(f"{place}: unknown role {message['role']!r}: expected one of {', '.join(ROLES)}")
        if message["role"] != "assistant" or "tool_calls" not in message:
            _string(message, "content", place, empty=message["role"] != "assistant")
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise UserError(f"{place}: tool_calls is {_shown(calls)}: expected a list of objects")
        _unicode(json.dumps(message, ensure_ascii=False), place)
        made.append(message)
    if not any(message["role"] == "assistant" for message in made):
        raise UserError(f"{where}: no assistant turn: expected at least one to train on")
    return tuple(made)


def _tools(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools") or []
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: tools is {_shown(tools)}: expected a list of objects")
    return tuple(tools)


def as_messages(row: Row) -> Row:
    """A prompt and its answer as a user's and an assistant's turn, as mlx-lm renders them; others as they are."""
    if row.answer is None:
        return row
    turns = ({"role": "user", "content": row.text}, {"role": "assistant", "content": row.answer})
    return replace(row, text="", answer=None, messages=turns)
