"""Reads fine-tuning data in the common formats as rows: a text, a prompt and its answer, messages, or a label.

One file is split by a hash of each row, so a row stays in its split when others are added or removed. The first row's
keys select the format, in mlx-lm's order (prompt and completion, messages, text), then Alpaca's and ShareGPT's; rows
without those keys are errors.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.files import SPLITS, SUFFIXES, find_files, read_values
from mlxgpt.common.rows.messages import SHAREGPT, read_messages, read_tools
from mlxgpt.common.rows.row import Row, split_rows
from mlxgpt.common.rows.values import list_at, shown, string_at, unicode, value_at


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
    files = find_files(path)
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


def _text_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    return Row(where, text=string_at(row, tune.text_key, where))


def _completion_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    prompt = string_at(row, tune.prompt_key, where, empty=True)
    return Row(where, text=prompt, answer=string_at(row, tune.completion_key, where), tools=read_tools(row, where))


def _alpaca_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    asked = string_at(row, "instruction", where)
    given = row.get("input") or ""
    if not isinstance(given, str):
        raise UserError(f"{where}: input is {shown(given)}: expected a string")
    if given.strip():
        asked = f"{asked}\n\n{unicode(given, f'{where}: input')}"
    answer = string_at(row, "output", where)
    return Row(where, messages=({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))


def _chat_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    messages = list_at(row, tune.messages_key, where)
    return Row(where, messages=read_messages(messages, where), tools=read_tools(row, where))


def _sharegpt_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    messages = []
    for number, turn in enumerate(list_at(row, "conversations", where), 1):
        if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
            raise UserError(f"{where}: turn {number} is {shown(turn)}: expected an object with from and value")
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT:
            known = ", ".join(SHAREGPT)
            raise UserError(f"{where}: turn {number}: unknown role {turn['from']!r}: expected one of {known}")
        messages.append({"role": SHAREGPT[turn["from"]], "content": turn["value"]})
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Row(where, messages=read_messages(messages, where), tools=read_tools(row, where))


def text_to_classify(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    """A row with or without a label."""
    if tune.label_key in row:
        return _label_row(row, where, tune)
    return Row(where, text=string_at(row, tune.text_key, where))


def _label_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    label = value_at(row, tune.label_key, where)
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
        raise UserError(f"{where}: {tune.label_key} is {shown(label)}: expected a label, as text or a whole number")
    text = string_at(row, tune.text_key, where)
    return Row(where, text=text, label=unicode(str(label).strip(), f"{where}: {tune.label_key}"))


_FORMATS: dict[str, Callable[[dict[str, Any], str, TuneConfig], Row]] = {
    "text": _text_row,
    "completion": _completion_row,
    "chat": _chat_row,
    "alpaca": _alpaca_row,
    "sharegpt": _sharegpt_row,
    "label": _label_row,
}
