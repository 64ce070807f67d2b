"""What stands before a text and what ends it, for a model: the one place that says so.

``Tokenizer.encode`` adds nothing. A model reads a text as AutoTokenizer gives it: after ``before``, which is BOS for
Llama or Gemma, the separator of documents for models trained here, and nothing for GPT-2 or Qwen.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mlxgpt.common.tokenizers import separator
from mlxgpt.common.tokenizers.load import from_files
from mlxgpt.common.tokenizers.protocol import Tokenizer, read_json


def begins_with(tokenizer: Tokenizer | None) -> list[int]:
    """The ids before every text: those that AutoTokenizer puts there, [] for none."""
    return list(tokenizer.before) if tokenizer else []


def shared(tokenizer: Tokenizer | None, texts: Iterable[np.ndarray]) -> list[int]:
    """The same where every one of the encoded ``texts`` begins so; [] where one does not, as a template may have it."""
    before = begins_with(tokenizer)
    return before if all(ids[: len(before)].tolist() == before for ids in texts) else []


def described(tokenizer: Tokenizer | None, ids: list[int]) -> dict[str, object]:
    """The ids that texts begin with and their text, for --json."""
    return {"begins_with": ids, "begins_with_text": tokenizer.decode(ids) if tokenizer and ids else ""}


def shown(tokenizer: Tokenizer | None, ids: list[int]) -> str:
    """The same for a terminal."""
    numbers = ", ".join(map(str, ids))
    return (f"{tokenizer.decode(ids)} ({numbers})" if tokenizer else numbers) if ids else "nothing"


def begin(before: Tokenizer | Sequence[int], ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """``ids`` after what the tokenizer puts before a text (or the given tokens), (T,) int32.

    Nothing is put twice: a chat template, or the text itself, may begin with the same tokens.
    """
    before, ids = list(before) if isinstance(before, Sequence) else begins_with(before), np.asarray(ids, np.int32)
    if ids[: len(before)].tolist() == before:
        return ids
    return np.concatenate([np.asarray(before, np.int32), ids])


def start(tokenizer: Tokenizer, text: str) -> list[int]:
    """``text`` encoded and begun: a prompt.

    Raises:
        UserError: a character that the tokenizer does not have.
    """
    return begin(tokenizer, tokenizer.encode(text)).tolist()


def wrap(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, most: int | None = None) -> np.ndarray:
    """``ids`` with what AutoTokenizer puts before and after them; of more than ``most`` the text's end is cut off."""
    made, after = begin(tokenizer, ids), np.asarray(tokenizer.after, np.int32)
    if len(after) and made[-len(after) :].tolist() == tokenizer.after:
        made = made[: -len(after)]
    return np.concatenate([made[: None if most is None else max(0, most - len(after))], after])[:most]


def end(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """``ids`` with what AutoTokenizer puts after a text, and with the end-of-text token as the last, once."""
    closing = list(tokenizer.after)
    if tokenizer.eos_id is not None and closing[-1:] != [tokenizer.eos_id]:
        closing.append(tokenizer.eos_id)
    if not closing or ids[-len(closing) :].tolist() == closing:
        return ids
    return np.concatenate([ids, np.asarray(closing, np.int32)])


def opening(tokenizer: Tokenizer) -> list[int]:
    """What a document among documents begins with: nothing where the separator after the one before it does that."""
    return [] if tokenizer.before == [tokenizer.eos_id] else begins_with(tokenizer)


def with_separator(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of a model trained on documents with ``eos_id`` between them, so that a text begins with it.

    The files say so as transformers and mlx-lm read it; ids and digest stay. A tokenizer without a separator, or that
    begins texts with something, stays as it is.
    """
    if tokenizer.before or tokenizer.eos_id is None:
        return tokenizer
    named, where = tokenizer.named.get("eos_token", ""), Path(".")
    token = named if tokenizer.id_of(named) == tokenizer.eos_id else tokenizer.decode([tokenizer.eos_id])
    files = dict(tokenizer.files)
    # a second place that names bos_token could contradict
    config = read_json(files, "special_tokens_map.json", where) | read_json(files, "tokenizer_config.json", where)
    files.pop("special_tokens_map.json", None)
    config |= {"bos_token": token, "eos_token": token, "add_bos_token": True}
    if "tokenizer.json" in files:
        files["tokenizer.json"] = separator.put(files["tokenizer.json"], token, tokenizer.eos_id)
        if str(config.get("tokenizer_class")).startswith("GPTNeoXTokenizer"):  # it reads no post-processor
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
    made = from_files(files | {"tokenizer_config.json": json.dumps(config, indent=1).encode()}, where)
    assert made.digest == tokenizer.digest
    made.ends = tokenizer.ends
    return made
