"""samples.jsonl: what the model wrote in training, one sample a line; resuming truncates it like metrics.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mlxgpt.common.errors import RunError
from mlxgpt.common.files import atomic_write

FILE = "samples.jsonl"


class Sample(NamedTuple):
    """One text and the step after which it was written."""

    step: int
    text: str
    parts: Mapping[str, str] = MappingProxyType({})
    """What the text consists of, by name, where it has parts: prompt, chosen, rejected, answer."""


def read_samples(run: Path) -> list[Sample]:
    """The samples of a run, in order; incomplete lines are skipped."""
    found = []
    try:
        lines = (run / FILE).read_text(encoding="utf-8", errors="replace").split("\n")  # U+2028 ends no line
    except OSError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int and isinstance(entry.get("text"), str):
            parts = {key: str(value) for key, value in entry.items() if key not in ("step", "text")}
            found.append(Sample(entry["step"], entry["text"], parts))
    return found


def _line(sample: Sample) -> str:
    entry = {"step": sample.step, "text": sample.text, **sample.parts}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def joined(parts: Mapping[str, str]) -> str:
    """One text of a sample's parts: the prompt with the model's answer, and below it what else there is."""
    others = [f"{name}: {text}" for name, text in parts.items() if name not in ("prompt", "answer")]
    return "\n".join([parts.get("prompt", "") + parts.get("answer", ""), *others])


def append(run: Path, step: int, text: str, parts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Adds a sample, with the parts that it has.

    Raises:
        RunError: the system refuses to write.
    """
    try:
        with open(run / FILE, "a", encoding="utf-8", errors="replace") as file:
            file.write(_line(Sample(step, text, parts)))
    except OSError as error:
        raise RunError(f"{run / FILE}: {error.strerror}") from None


def cut(run: Path, step: int) -> None:
    """Drops the samples written after ``step``: the resumed run writes them again."""
    if (run / FILE).exists():
        kept = [sample for sample in read_samples(run) if sample.step <= step]
        with atomic_write(run / FILE) as file:
            file.write("".join(map(_line, kept)).encode("utf-8", errors="replace"))
