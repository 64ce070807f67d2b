"""Tasks of one's own: a .jsonl whose keys say what kind of question its rows are."""

import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError, nearest
from mlxgpt.common.rows.files import read_values
from mlxgpt.common.rows.values import shown, string_at, unicode, value_at
from mlxgpt.common.tasks import code
from mlxgpt.common.tasks.task import Question, Task

# What makes a row one of a kind, and what it may have besides; the first kind that fits.
_KEYS = {
    "choice": (("choices", "answer"), ("text", "question")),
    "code": (("prompt", "tests"), ()),
    "pair": (("more", "less"), ()),
    "answer": (("prompt", "answer"), ()),
    "cloze": (("text", "answer"), ()),
    "text": (("text",), ()),
}
_FORMS = "{text|question, choices, answer}, {text, answer}, {prompt, answer}, {prompt, tests}, {more, less} or {text}"


def read(path: Path) -> Task:
    """The task in a .jsonl, named after the file.

    Raises:
        UserError: no such file, no rows, rows of several kinds or of none, or a value that its kind cannot have.
    """
    if not path.is_file():
        raise UserError(f"--task {path}: no such file")
    questions, kind, unused = [], "", {}
    for where, row in read_values(path):
        found = _kind(row, where)
        if kind and found != kind:
            raise UserError(f"{where}: keys of kind {found}: expected {kind}, as in the rows before: one kind a file")
        kind = found
        questions.append(_READ[kind](row, where))
        needed, optional = _KEYS[kind]
        unused |= dict.fromkeys(key for key in row if key not in (*needed, *optional, "group"))
    if not questions:
        raise UserError(f"{path}: empty: expected a question a line: {_FORMS}")
    notes = (f"keys that are not read: {', '.join(unused)}",) if unused else ()
    ready = kind == "cloze" or all(_ready(each) for each in questions)
    task = Task(path.stem, kind, questions, before_target="" if ready else " ", notes=notes)
    if kind == "code":
        return replace(task, before_target="", stop=code.STOP)
    if kind == "answer":
        right = [answer for each in questions for answer in (each.target, *each.choices)]
        stop = ("\n\n",) if any("\n" in answer.strip() for answer in right) else ("\n",)
        # a token is a byte at least, and what is longer than every right answer is wrong
        sample = replace(task.sample, max_tokens=min(256, max(len(answer.encode()) for answer in right) + 8))
        return replace(task, stop=stop, alike=str.strip, sample=sample)
    return task


def _ready(question: Question) -> bool:
    """Whether no space is missing between a question and its choices."""
    return not question.text or question.text[-1].isspace() or all(each[0].isspace() for each in question.choices)


def _kind(row: dict[str, Any], where: str) -> str:
    known = {key for needed, optional in _KEYS.values() for key in (*needed, *optional)}
    meant = next((f"; {key}{near}" for key in row if key not in known and (near := nearest(key, known))), "")
    if "choices" in row and "answer" not in row:
        raise UserError(f"{where}: no answer{meant}: expected the index, the text or the letter of a choice")
    for kind, (needed, optional) in _KEYS.items():
        if all(key in row for key in needed) and (not optional or any(key in row for key in optional)):
            return kind
    raise UserError(f"{where}: keys {', '.join(map(repr, list(row)[:8]))}{meant}: expected {_FORMS}")


def _choice(row: dict[str, Any], where: str) -> Question:
    if "text" in row and "question" in row:
        raise UserError(f"{where}: text and question: expected one")
    if "question" in row:
        text = f"Question: {string_at(row, 'question', where)}\nAnswer:"
    else:
        text = string_at(row, "text", where, empty=True)
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: choices is {shown(choices)}: expected a list of at least two texts")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise UserError(f"{where}: choice {number} is {shown(choice)}: expected text")
        unicode(choice, f"{where}: choice {number}")
    distinct(choices, where)
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not answers:
        raise UserError(f"{where}: answer is []: expected the index, the text or the letter of a choice")
    gold = tuple(dict.fromkeys(right(answer, choices, where) for answer in answers))
    return Question(where, text, tuple(choices), gold=gold, group=_group(row, where))


def distinct(choices: list[str], where: str) -> None:
    """Raises UserError for a choice that is there twice."""
    for number, choice in enumerate(choices):
        if choice in choices[:number]:
            first = choices.index(choice)
            raise UserError(f"{where}: choices {first} and {number} are both {choice[:40]!r}: expected different ones")


def right(answer: Any, choices: list[str], where: str) -> int:
    """The index of the choice that ``answer`` names by index, text or letter.

    Raises:
        UserError: it names none, or two: the text of one is the letter of another.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise UserError(f"{where}: answer {answer}: expected 0 to {len(choices) - 1}, the index of a choice")
        return answer
    if not isinstance(answer, str):
        raise UserError(f"{where}: answer is {shown(answer)}: expected the index, the text or the letter of a choice")
    letter = string.ascii_uppercase.find(answer) if len(answer) == 1 else -1
    named = [index for index, choice in enumerate(choices) if choice == answer or index == letter]
    if not named:
        raise UserError(f"{where}: answer {answer[:40]!r}: expected the index, the text or the letter of a choice")
    if len(named) > 1:
        text, letter = (named if choices[named[0]] == answer else named[::-1])[:2]
        raise UserError(f"{where}: answer {answer!r}: the text of choice {text} and the letter of choice {letter}")
    return named[0]


def _cloze(row: dict[str, Any], where: str) -> Question:
    text, answer = string_at(row, "text", where, empty=True), string_at(row, "answer", where)
    space = "" if not text or text[-1].isspace() or answer[0].isspace() else " "
    return Question(where, text, target=space + answer, group=_group(row, where))


def _text(row: dict[str, Any], where: str) -> Question:
    return Question(where, string_at(row, "text", where), group=_group(row, where))


def _pair(row: dict[str, Any], where: str) -> Question:
    more, less = string_at(row, "more", where), string_at(row, "less", where)
    if more == less:
        raise UserError(f"{where}: more and less are both {more[:40]!r}: expected different sentences")
    return Question(where, choices=(more, less), group=_group(row, where))


def _answer(row: dict[str, Any], where: str) -> Question:
    prompt = string_at(row, "prompt", where)
    value = value_at(row, "answer", where)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{where}: answer is []: expected text, or a list of right answers")
    answers = [string_at({"answer": each}, "answer", where) for each in values]
    if any("\n\n" in answer.strip() for answer in answers):
        raise UserError(f"{where}: answer has an empty line, which ends what a model writes: expected none")
    return Question(where, prompt, tuple(answers[1:]), target=answers[0], group=_group(row, where))


def _code(row: dict[str, Any], where: str) -> Question:
    prompt, tests = string_at(row, "prompt", where), string_at(row, "tests", where)
    return Question(where, prompt, program=prompt, tests=tests, group=_group(row, where))


def _group(row: dict[str, Any], where: str) -> str:
    return string_at(row, "group", where) if "group" in row else ""


_READ: dict[str, Callable[[dict[str, Any], str], Question]] = {
    "choice": _choice, "cloze": _cloze, "text": _text, "pair": _pair, "answer": _answer, "code": _code,
}  # fmt: skip
