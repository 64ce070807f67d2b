"""Greedy answers of one model in two frameworks: the same, or apart where the likeliest tokens are a tie.

A near tie is decided by rounding, so two sound programs may answer it differently, and all that follows. Every call is
a public command in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxgpt.common.doctor.compare import GATES
from mlxgpt.common.errors import RunError
from mlxgpt.common.folders import base_and_adapters, model_folder
from mlxgpt.common.inference import generation
from mlxgpt.common.tokenizers import load


@dataclass(frozen=True)
class Answer:
    """What follows a prompt: its text, and the tokens drawn, with ``None`` last where a token ended it."""

    text: str
    tokens: tuple[int | None, ...]


@dataclass(frozen=True)
class Tie:
    """Where two answers part: the place of the first other token, and by how much it is no tie.

    ``margin``: the larger, of the two frameworks, of the likeliest token's lead over the two tokens that were drawn,
    relative to the largest logit; ``gate`` is twice that of logits, since each framework's may be off by it.
    """

    at: int
    margin: float
    gate: float

    @property
    def agrees(self) -> bool:
        """False for NaN too."""
        return self.margin <= self.gate


def gate(accelerated: bool) -> float:
    """Of margins, where an accelerator takes part or not."""
    logits = GATES["logits"]
    return 2 * (logits.accelerator if accelerated else logits.cpu)


def prompt_ids(run: Path, texts: Sequence[str]) -> tuple[list[list[int]], set[int]]:
    """The ids that a run's tokenizer makes of texts, and those that end an answer."""
    place, found = base_and_adapters.find_base(run)
    tokenizer = load.load_last([place, *(each for each, _ in found)])
    rows = generation.start_rows(model_folder.read_config(place), tokenizer, texts, ())
    return [row.prompt for row in rows], {each for row in rows for each in row.ends if each is not None}


def ask(package: str, run: Path, prompts: Sequence[Sequence[int]], count: int) -> list[Answer]:
    """The greedy answer, of at most ``count`` tokens, to each prompt.

    Raises:
        RunError: the command failed.
    """
    words = [word for ids in prompts for word in ("--prompt-ids", ",".join(map(str, ids)))]
    command = ["generate", "--model", str(run), *words, "--max-tokens", str(count), "--temperature", "0", "--json"]
    said = json.loads(_run(package, command))
    made = []
    for result in said["results"] if len(prompts) > 1 else [said]:
        ended = (None,) if result["finish_reason"] == "eos" else ()
        made.append(Answer(result["text"], (*result["token_ids"], *ended)))
    return made


def part(a: Answer, b: Answer) -> int | None:
    """The place of the first token that differs; None where none does."""
    if a.tokens == b.tokens:
        return None
    pairs = enumerate(zip(a.tokens, b.tokens, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(a.tokens), len(b.tokens)))


def tie(
    packages: Sequence[str], run: Path, prompt: Sequence[int], a: Answer, b: Answer, ends: set[int], limit: float
) -> Tie | None:
    """How close a call it was where two answers part; None where they do not.

    Raises:
        RunError: a command failed.
    """
    at = part(a, b)
    if at is None:
        return None
    drawn = [each.tokens[at] if at < len(each.tokens) else None for each in (a, b)]
    known = [*prompt, *(token for token in a.tokens[:at] if token is not None)]
    margins = [lead(_logits(package, run, known), drawn, ends) for package in packages]
    return Tie(at, max(margins), limit)


def lead(logits: np.ndarray, drawn: Sequence[int | None], ends: set[int]) -> float:
    """By how much the likeliest token leads the least likely of ``drawn``, of the largest logit; None: of ``ends``."""
    values = [max((float(logits[end]) for end in ends), default=np.nan) if one is None else float(logits[one])
              for one in drawn]  # fmt: skip
    return (float(logits.max()) - min(values)) / (float(np.abs(logits).max()) or 1.0)


def _logits(package: str, run: Path, ids: Sequence[int]) -> np.ndarray:
    """Logits (V,) of what follows the ids."""
    with tempfile.TemporaryDirectory() as work:
        np.save(Path(work, "ids.npy"), np.array([*ids, ids[-1]], np.int32))
        _run(
            package, ["probe", str(run), "--tokens", f"{work}/ids.npy", "--out", work, "--scale", "1", "--no-gradients"]
        )
        with np.load(Path(work, "0.npz")) as found:
            return found["logits.x1"][-1]


def _run(package: str, words: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", package, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{package} {words[0]} ended with exit code {done.returncode}")
    return done.stdout
