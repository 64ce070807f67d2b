"""MMLU (Hendrycks et al. 2021): exam questions of 57 subjects, each a task of its own."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.files import read_lines
from mlxgpt.common.rows.values import shown, string_at
from mlxgpt.common.tasks.published import place
from mlxgpt.common.tasks.task import Question, Task

_LETTERS = ("A", "B", "C", "D")
AREAS = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
}
SUBJECTS = {subject: area for area, subjects in AREAS.items() for subject in subjects.split()}
NAMES = ("mmlu", *(f"mmlu_{name}" for name in (*AREAS, *SUBJECTS)))


def read(name: str, data: Path, shots: int) -> Task:
    """The test split of all subjects, of an area's or of one; examples are the first of the subject's dev split."""
    part = name.removeprefix("mmlu").removeprefix("_")
    wanted = [subject for subject, area in SUBJECTS.items() if part in ("", area, subject)]
    questions = _split(name, data, "test", wanted)
    missing = [subject for subject in wanted if not any(_subject(each) == subject for each in questions)]
    few = ", ".join(missing[:4]) + ", ..." * (len(missing) > 4)
    notes = (f"{len(missing)} of {len(wanted)} subjects are not here: {few}",) if missing else ()
    return Task(
        name,
        "choice",
        questions,
        _split(name, data, "dev", wanted) if shots else [],
        shots,
        first=True,
        leave_out=False,
        apart=True,
        metrics=("acc",),
        notes=notes,
    )


def _subject(question: Question) -> str:
    return question.group.rpartition("/")[2]


def _split(name: str, data: Path, split: str, wanted: list[str]) -> list[Question]:
    """The questions of ``wanted`` subjects in their order, from the published tables or the hub's files.

    Raises:
        UserError: no file of any subject.
    """
    if not data.is_dir():
        raise UserError(f"--data {data}: expected a folder, with a file for each subject of --task {name}")
    home, found = place.home(name, data), []
    whole = [file for kind in place.hub(split, "all")[:3] for file in sorted(home.glob(f"**/{kind}"))]
    for subject in wanted if not whole else []:
        tables = sorted(home.glob(f"**/{subject}_{split}.csv"))
        parts = [file for kind in place.hub(split, subject)[:3] for file in sorted(home.glob(f"**/{kind}"))]
        found += [_from_table(row, subject) for file in tables[:1] for row in _rows(file)]
        found += [_question(row, subject) for row in (place.read(parts) if not tables else ())]
    for row in place.read(whole):
        subject = string_at(row[1], "subject", row[0])
        found += [_question(row, subject)] if subject in wanted else []
    if not found:
        table = f"{wanted[0]}_{split}.csv"
        raise UserError(f"--task {name}: {home}: no {table}: expected it, or {wanted[0]}/{split}-*.parquet")
    return sorted(found, key=lambda each: wanted.index(_subject(each)))


def _rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table without a header."""
    text = "\n".join(read_lines(file))
    for number, fields in enumerate(csv.reader(io.StringIO(text, newline="")), 1):
        if fields:
            yield f"{file} row {number}", fields


def _from_table(row: tuple[str, list[str]], subject: str) -> Question:
    where, fields = row
    if len(fields) != 6 or fields[5].strip() not in _LETTERS:
        found = f"{len(fields)} columns, the last {shown(fields[-1])}"
        raise UserError(f"{where}: {found}: expected a question, four choices and the letter of one")
    return _asked(where, fields[0], fields[1:5], _LETTERS.index(fields[5].strip()), subject)


def _question(row: place.Row, subject: str) -> Question:
    where, values = row
    choices = list(place.strings_at(values, "choices", where))
    if len(choices) != 4:
        raise UserError(f"{where}: {len(choices)} choices: expected four")
    gold = place.index_at(values, "answer", where, 4)
    return _asked(where, string_at(values, "question", where), choices, gold, subject)


def _asked(where: str, question: str, choices: list[str], gold: int, subject: str) -> Question:
    lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
    return Question(
        where,
        "\n".join([question.strip(), *lines, "Answer:"]),
        _LETTERS,
        gold=(gold,),
        group=f"{SUBJECTS[subject]}/{subject}",
        before=f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n",
    )
