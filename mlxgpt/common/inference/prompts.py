"""What a model is given: texts as they are, texts as questions in a chat template, or token ids."""

import sys
from collections.abc import Sequence
from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.sft.template import Template


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
