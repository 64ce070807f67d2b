"""Reads fine-tuning data in the common formats as rows: a text, a prompt and its answer, messages, or a label.

One file is split by a hash of each row, so a row stays in its split when others are added or removed. The first row's
keys select the format, in mlx-lm's order (prompt and completion, messages, text), then Alpaca's and ShareGPT's; rows
without those keys are errors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.columns import cure
from mlxgpt.common.rows.files import SPLITS, SUFFIXES, digests, find_files, read_values
from mlxgpt.common.rows.messages import read_kwargs, read_messages, read_tools
from mlxgpt.common.rows.row import Row, split_rows
from mlxgpt.common.rows.values import shown, string_at, unicode, value_at

_ANSWERS = ("output", "response")  # Alpaca's key of the answer, and Dolly's
Value = tuple[str, dict[str, Any]]
"""File and row, and what the row holds."""


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
    raw, digest = read_splits(tune)
    kind = "label" if tune.task == "classify" else tune.format
    if kind == "auto":
        kind = _detect(raw["train"][0], tune)
    else:
        _check_keys(kind, raw["train"][0], tune)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for split, rows in raw.items():
        splits[split] = [_FORMATS[kind](value, where, tune) for where, value in rows]
    if kind == "completion" and any(row.messages for rows in splits.values() for row in rows):
        kind = "chat"  # its prompts and completions are messages
    return Rows(kind, splits, digest, hold_out(splits, tune))


def read_splits(tune: TuneConfig) -> tuple[dict[str, list[Value]], dict[str, str]]:
    """Split -> the values of its rows as they are, and the digests of the files.

    Raises:
        UserError: no file, a damaged one, or no row to train on.
    """
    if not tune.source:
        raise UserError("tune.source is empty: expected a folder with train.jsonl, or one of " + " ".join(SUFFIXES))
    files = find_files(Path(tune.source).expanduser())
    digest = digests(files.values())
    raw = {split: list(read_values(file, tune.drop_nulls)) for split, file in files.items()}
    if not raw["train"]:
        raise UserError(f"{files['train']}: no rows: expected at least one")
    return raw, digest


def hold_out(splits: dict[str, list[Any]], tune: TuneConfig) -> list[str]:
    """Takes validation rows from the training rows where the source has none; a line where none could be taken."""
    if splits["valid"]:
        return []
    splits["train"], splits["valid"] = split_rows(splits["train"], tune.val_fraction)
    if splits["valid"]:
        return []
    count, path = len(splits["train"]), Path(tune.source).expanduser()
    what = "only one example: it is" if count == 1 else f"all {count:,} examples are equal: they are"
    return [f"{path}: {what} trained on, and none is left for validation"]


def read_row(row: dict[str, Any], where: str, tune: TuneConfig) -> tuple[str, Row]:
    """(format, the row), by its own keys.

    Raises:
        UserError: it is of none of the formats.
    """
    kind = _detect((where, row), tune) if tune.format == "auto" else tune.format
    made = _FORMATS[kind](row, where, tune)
    return "chat" if made.messages else kind, made


def _detect(first: tuple[str, dict[str, Any]], tune: TuneConfig) -> str:
    """The format, by the first row's keys."""
    where, row = first
    for kind, ways in _keys(tune).items():
        if any(all(key in row for key in keys) for keys in ways):
            return kind
    if "chosen" in row:
        raise UserError(_preference(row, where, tune))
    known = "; ".join(" and ".join(ways[0]) for ways in _keys(tune).values())
    raise UserError(f"{where}: keys {', '.join(map(repr, list(row)[:8]))}: expected {known}{cure(row, tune.task)}")


def _check_keys(kind: str, first: tuple[str, dict[str, Any]], tune: TuneConfig) -> None:
    """Refuses a first row without the keys of its format, where settings are known that read it."""
    where, row = first
    ways = _keys(tune).get(kind, ((tune.text_key, tune.label_key),))
    reads = cure(row, tune.task)
    if reads and not any(all(key in row for key in keys) for keys in ways):
        known = " and ".join(ways[0])
        raise UserError(f"{where}: keys {', '.join(map(repr, list(row)[:8]))}: expected {known}{reads}")


def _keys(tune: TuneConfig) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Format -> the sets of keys by which it is known."""
    return {
        "completion": ((tune.prompt_key, tune.completion_key),),
        "chat": ((tune.messages_key,),),
        "text": ((tune.text_key,),),
        "alpaca": tuple(("instruction", answer) for answer in _ANSWERS),
        "sharegpt": (("conversations",),),
    }


def _preference(row: dict[str, Any], where: str, tune: TuneConfig) -> str:
    """Why a row of preference data is refused, and how to train on its chosen answer."""
    talk = isinstance(row["chosen"], list)
    if tune.prompt_key in row and talk == isinstance(row[tune.prompt_key], list):
        cure = "tune.completion_key=chosen"
    else:
        cure = "tune.messages_key=chosen" if talk else "tune.text_key=chosen"
    return (
        f"{where}: preference data (chosen, rejected): finetune trains on answers: --set {cure} trains on the chosen; "
        "--task prefer trains on both"
    )


def _text_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    return Row(where, text=string_at(row, tune.text_key, where))


def completion_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    """Two texts, or trl's two lists of messages."""
    asked, answered = tune.prompt_key, tune.completion_key
    if isinstance(row.get("label"), bool) and "label" not in (asked, answered):
        raise UserError(
            f"{where}: preference data (label is {row['label']}): finetune trains on every completion: expected rows "
            "with the good ones alone, without the key label; --task prefer --set prefer.loss=kto trains on both"
        )
    lists = [isinstance(value_at(row, key, where), list) for key in (asked, answered)]
    if all(lists):
        return prompt_and_completion(row, where, tune)
    if any(lists):
        text, role = (answered, "assistant") if lists[0] else (asked, "user")
        expected = f'[{{"role": "{role}", "content": ...}}]'
        other = asked if lists[0] else answered
        raise UserError(f"{where}: {text} is {shown(row[text])}, and {other} a list of messages: expected {expected}")
    prompt = string_at(row, asked, where, empty=True)
    answer = string_at(row, answered, where)
    return Row(where, text=prompt, answer=answer, tools=read_tools(row, where), kwargs=read_kwargs(row, where))


def prompt_and_completion(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    """A conversation of which only the completion is trained on."""
    prompt, asked = read_messages(row, tune.prompt_key, where)
    answer, train = read_messages(row, tune.completion_key, where)
    if prompt[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: {tune.prompt_key} ends with the assistant's message: expected it at the start of "
            f"{tune.completion_key}"
        )
    _check_weights(asked, prompt, where, tune)
    return _talk(row, where, tune, (*prompt, *answer), (*(False for _ in prompt), *train), answer)


def alpaca_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    """Alpaca's columns; ``response`` and ``context`` are Dolly's, ``system`` and ``history`` LLaMA-Factory's."""
    asked = string_at(row, "instruction", where)
    key = "input" if row.get("input") or not row.get("context") else "context"
    given = row.get(key) or ""
    if not isinstance(given, str):
        raise UserError(f"{where}: {key} is {shown(given)}: expected a string")
    if given.strip():
        asked = f"{asked}\n\n{unicode(given, f'{where}: {key}')}"
    answer = string_at(row, next((name for name in _ANSWERS if row.get(name) is not None), _ANSWERS[0]), where)
    turns = [*_history(row, where), ("user", asked), ("assistant", answer)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return Row(where, messages=tuple(_with_system(row, messages)))


def _history(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Earlier turns: a list of pairs of question and answer."""
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(text, str) for pair in history for text in pair):
        raise UserError(f"{where}: history is {shown(history)}: expected a list of pairs of question and answer")
    roles = ("user", "assistant")
    return [
        (role, unicode(text, f"{where}: history")) for pair in history for role, text in zip(roles, pair, strict=True)
    ]


def _with_system(row: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` after the row's system prompt, where they do not begin with one."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _chat_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    messages, train = read_messages(row, tune.messages_key, where)
    return _talk(row, where, tune, messages, train, messages)


def _sharegpt_row(row: dict[str, Any], where: str, tune: TuneConfig) -> Row:
    held, train = read_messages(row, "conversations", where)
    messages = _with_system(row, list(held))
    added = len(messages) - len(held)
    return _talk(row, where, tune, tuple(messages), (*[False] * added, *train), held)


def _talk(
    row: dict[str, Any],
    where: str,
    tune: TuneConfig,
    messages: tuple[dict[str, Any], ...],
    train: tuple[bool, ...],
    answers: tuple[dict[str, Any], ...],
) -> Row:
    """A conversation; ``answers`` are the messages that may be trained on."""
    if not any(message["role"] == "assistant" for message in answers):
        raise UserError(f"{where}: no assistant turn: expected at least one to train on")
    if not any(train):
        raise UserError(f"{where}: every assistant turn has weight 0 or train false: expected one to train on")
    _check_weights(train[len(train) - len(answers) :], answers, where, tune)
    usual = all(asked == (message["role"] == "assistant") for asked, message in zip(train, messages, strict=True))
    return Row(
        where,
        messages=messages,
        tools=read_tools(row, where),
        train=() if usual else train,
        kwargs=read_kwargs(row, where),
    )


def _check_weights(train: tuple[bool, ...], messages: tuple[dict[str, Any], ...], where: str, tune: TuneConfig) -> None:
    """Refuses weights where everything is trained on."""
    for number, (asked, message) in enumerate(zip(train, messages, strict=True), 1):
        if tune.train_on_prompt and message["role"] == "assistant" and not asked:
            raise UserError(
                f"{where}: message {number}: weight 0 or train false, and tune.train_on_prompt trains on every token: "
                "expected one of them"
            )


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
    "completion": completion_row,
    "chat": _chat_row,
    "alpaca": alpaca_row,
    "sharegpt": _sharegpt_row,
    "label": _label_row,
}
