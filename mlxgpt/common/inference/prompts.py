"""What a model is given: texts as they are, texts as questions in a chat template, or token ids."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig, SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.base_and_adapters import expect_task
from mlxgpt.common.model import ids as token_ids
from mlxgpt.common.recipes import build, parse_table
from mlxgpt.common.sft.template import Template
from mlxgpt.common.tokenizers.protocol import expect_own


def read_text(name: str, where: str) -> str:
    """The text of a file; ``-`` is standard input. ``where``: the flag that names it.

    Raises:
        UserError: a file that is missing or not UTF-8.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"{where} {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} {name}: not UTF-8 at byte {error.start}") from None


def ids_of(text: str, where: str) -> list[int]:
    """The token ids in a text such as ``1,2,3``.

    Raises:
        UserError: anything but whole numbers between commas or spaces.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and word.isascii() for word in words):
        raise UserError(f"{where} {text!r}: expected token ids, such as 1,2,3")
    return [int(word) for word in words]


def bias_of(text: str, where: str) -> dict[int, float]:
    """What is added to logits, by token id, in a text such as ``{"42": -100}``.

    Raises:
        UserError: no JSON object whose keys are whole numbers; ``sampling.biases`` looks at ids and values.
    """
    example = '{"42": -100}'
    found = parse_table(text, where, example)
    wrong = [key for key in found if not (key.isascii() and key.isdecimal() and len(key) < 20 and key == str(int(key)))]
    if wrong:
        raise UserError(f"{where}: {wrong[0]!r} is no token id; expected a JSON object such as {example}")
    return {int(key): value for key, value in found.items()}


def asked(template: Template, texts: Sequence[str], system: str = "") -> list[list[int]]:
    """Each text as a user's message, up to where the answer begins: the ids of transformers' apply_chat_template.

    The template writes what a text begins with, or leaves it out; nothing is put before it. Control tokens in the texts
    are text, as in chat. ``system``: the system prompt; '' for none.

    Raises:
        UserError: the template refuses a message, or a character that the tokenizer does not have.
    """
    first = [{"role": "system", "content": system}] if system else []
    made = []
    for number, text in enumerate(texts, 1):
        try:
            messages = [*first, {"role": "user", "content": text}]
            made.append(template.encode(messages, generation=True, typed=True))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return made


def check_model(model: Any, tokenizer: Any) -> None:
    """Refuses what generates no text.

    Raises:
        UserError: no model of load or new, a classifier, or a tokenizer of another library.
    """
    if not isinstance(config := getattr(model, "config", None), ModelConfig):
        raise UserError(f"model is a {type(model).__name__}: expected what load or new returns")
    expect_task(config, "generate")
    expect_own(tokenizer)


def rows_of(prompts: Any) -> tuple[list[str | list[int]], bool]:
    """Prompts of any form as texts and lists of ids, and whether it was one alone: a text, or one row of ids.

    Raises:
        UserError: what is neither text nor whole numbers.
    """
    if isinstance(prompts, str):
        return [prompts], True
    many = isinstance(prompts, (list, tuple)) and all(isinstance(each, str) or np.ndim(each) for each in prompts)
    if many or np.ndim(prompts) > 1:
        return [each if isinstance(each, str) else _row(each, n) for n, each in enumerate(prompts, 1)], False
    return [_row(prompts, 1)], True


def _row(given: Any, number: int) -> list[int]:
    """The ids of one prompt."""
    found = token_ids.as_numpy(given, f"prompt {number}")
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise UserError(
            f"prompt {number}: {found.dtype} of shape {found.shape}: expected a text, or token ids as whole numbers"
        )
    return [int(token) for token in found]


def sampling_of(sample: SampleConfig | None, changed: Mapping[str, Any]) -> SampleConfig:
    """``sample``, or the defaults, with what is ``changed``.

    Raises:
        UserError: an unknown name or a wrong value.
    """
    if not isinstance(sample, SampleConfig | None):
        raise UserError(f"sample is a {type(sample).__name__}: expected a SampleConfig; keywords are its fields")
    if "prompt" in changed:
        raise UserError("generate: prompt is given by itself, not as a setting")
    return build({"sample": dataclasses.asdict(sample or SampleConfig()) | dict(changed)}, "generate").sample
