"""A tokenizer in a file that is not Hugging Face's, or of a name: tables, ranks, minbpe's, llama2.c's, tiktoken's."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.foreign import find, llama2c, minbpe, plain, ranks, tables
from mlxgpt.common.tokenizers.hf import JsonTokenizer, made_of_bytes
from mlxgpt.common.tokenizers.protocol import TIKTOKEN, Tokenizer

_PICKLES = (".pkl", ".pickle", ".pt", ".pth")
_LONGEST = 1 << 28  # bytes of a .json or .txt


def by_name(name: str) -> Tokenizer:
    """One of ``protocol.NAMES``.

    Raises:
        UserError: it cannot be had.
    """
    return made_of_bytes() if name == "bytes" else ranks.named(name)


def read(path: Path, rows: int | None = None) -> Tokenizer | None:
    """The tokenizer in a file, for a model whose vocabulary has ``rows``; None for a file that is Hugging Face's.

    Raises:
        UserError: damaged, or no tokenizer in it.
    """
    if path.suffix == ".bin":
        return JsonTokenizer(llama2c.read_tokenizer(path), path)
    if path.suffix == ".tiktoken":
        return ranks.read(path)
    if path.suffix in _PICKLES:
        return of_values(plain.read(path), path, rows)
    if path.suffix == ".txt" and path.name != "merges.txt":
        return tables.tokenizer(_lines(path), rows)
    if path.suffix == ".model":
        with path.open("rb") as file:
            return minbpe.read(path) if file.read(len(minbpe.FIRST)) == minbpe.FIRST else None
    if path.suffix == ".json":
        values = _json(path)
        return (
            None
            if isinstance(values, dict) and isinstance(values.get("model"), dict)
            else of_values(values, path, rows)
        )
    return None


def of_values(values: Any, path: Path, rows: int | None) -> Tokenizer:
    """The tokenizer of the plain values of a file.

    Raises:
        UserError: none is among them.
    """
    if isinstance(values, plain.Named):
        return _of_encoding(values.state, path)
    split = values.get("split") if isinstance(values, Mapping) else None
    found = find.table(values, str(path), rows)
    found = found or tables.of_value(values, str(path), split if isinstance(split, str) else None)
    if found is None:
        raise UserError(
            f"{path}: no table of tokens in it: expected stoi (text to id), itos (id to text), or a list of the texts"
        )
    return tables.tokenizer(found, rows)


def _of_encoding(state: Any, path: Path) -> Tokenizer:
    """A pickled tiktoken.Encoding, as nanochat's tokenizer.pkl is: plain values, or a name, under its class's name."""
    if isinstance(state, str) and state in TIKTOKEN:
        return ranks.named(state)
    state = state if isinstance(state, dict) else {}
    merged, pattern, special = (state.get(name) for name in ("mergeable_ranks", "pat_str", "special_tokens"))
    if (
        isinstance(pattern, str)
        and isinstance(merged, dict)
        and isinstance(special, dict)
        and all(isinstance(token, bytes) for token in merged)
        and all(isinstance(text, str) for text in special)
    ):
        return ranks.of_ranks(merged, pattern, special, str(path))
    raise UserError(f"{path}: a {plain.ENCODING} without mergeable_ranks, pat_str or special_tokens")


def _json(path: Path) -> Any:
    if path.stat().st_size > _LONGEST:
        raise UserError(f"{path}: {path.stat().st_size} bytes, expected at most {_LONGEST}")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=functools.partial(_each_once, path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _each_once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a .json file; of a key that is there twice json would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{path}: {tables.shown(twice)} is there twice: expected each entry once")
    return found


def _lines(path: Path) -> tables.Table:
    """A vocab.txt: in each line the text of an id."""
    if path.stat().st_size > _LONGEST:
        raise UserError(f"{path}: {path.stat().st_size} bytes, expected at most {_LONGEST}")
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    texts = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    if "[UNK]" in texts and any(text.startswith("##") for text in texts):
        raise UserError(
            f"{path}: BERT's WordPiece ([UNK], ##...), which is not read: expected a tokenizer.json (transformers' "
            "AutoTokenizer ... save_pretrained writes one)"
        )
    found = tables.of_value(texts, str(path))
    if found is None:
        raise UserError(f"{path}: nothing in it: expected the text of an id in each line")
    return found
