"""A tokenizer that a user names with --tokenizer: what common.tokenizer loads, llama2.c's .bin, nanoGPT's meta.pkl."""

import io
import pickle
from pathlib import Path
from typing import Any

from convert.formats import llama2c_tokenizer
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.char import CharTokenizer
from mlxgpt.common.tokenizers.hf import JsonTokenizer
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

_LONGEST = 1 << 26  # bytes of a meta.pkl; one of all characters of Unicode has 20 MB


def load(path: Path) -> Tokenizer:
    """The tokenizer in a file or folder.

    Raises:
        UserError: nothing there, damaged, or a pickle that holds anything but plain values.
    """
    if path.suffix == ".bin" and path.is_file():
        return JsonTokenizer(llama2c_tokenizer.read_tokenizer(path), path)
    if path.suffix == ".pkl" and path.is_file():
        return _characters(path)
    return load_tokenizer(path)


class _Plain(pickle.Unpickler):
    """An unpickler that refuses every global: plain dicts, strings and numbers need none."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"holds {module_name}.{global_name}")


def _characters(path: Path) -> CharTokenizer:
    """The characters of a meta.pkl, by its itos."""
    if path.stat().st_size > _LONGEST:
        raise UserError(f"{path}: {path.stat().st_size} bytes, expected at most {_LONGEST} of a meta.pkl")
    try:
        content = _Plain(io.BytesIO(path.read_bytes())).load()
    except Exception as error:
        # a damaged pickle makes its reader raise anything
        raise UserError(f"{path}: not a meta.pkl of plain values: {' '.join(str(error).split())}") from None
    names = content.get("itos") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: expected itos, the character of each id, as nanoGPT's prepare.py saves it")
    characters = [names.get(i) for i in range(len(names))]
    for i, one in enumerate(characters):
        if not isinstance(one, str) or len(one) != 1:
            raise UserError(f"{path}: itos[{i}] = {one!r}: expected one character")
    if len(set(characters)) < len(characters):
        raise UserError(f"{path}: itos: a character has two ids")
    return CharTokenizer("".join(map(str, characters)))
