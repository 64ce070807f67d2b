"""Byte-level BPE by tiktoken, several times faster than `tokenizers`, taken only where the ids are provably the same.

The claim: with ids that rise in merge order, each token made by one merge of two earlier tokens, and every token
encoding to itself, the two rules ("merge the lowest-ranked pair that is a merge", "merge the pair whose joined bytes
have the lowest id") choose the same pair at every step. For take the first step at which joined bytes T = p + q are a
token of rank r whose merge is (x, y), not (p, q). No merge crossed the ends of T so far, so T's bytes went through the
merges that they go through alone; alone, with ranks below r, they end as (x, y), and ranks below r are exhausted when
r is the lowest. So p = x and q = y. The split into words is GPT-2's expression in both; its equality was established
over every code point, and is held against `tokenizers` on a probe whenever a tokenizer is loaded.
"""

import json
import re

import numpy as np
import tokenizers
from tokenizers import models

from mlxgpt.common.tokenizers.protocol import cut_before_space

# GPT-2's expression, with the possessive quantifiers that keep it linear.
_GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

PROBE = (
    "The quick brown  fox's 12 dogs\n\n  don't\tjump; they'll   \r\n x_1 = [3.5, -2]  # end   ",
    "na\u00efve \u0416\u0443\u043a \u4f60\u597d\uff0c\u4e16\u754c\u3002\u3000\u0e2a\u0e27\u0e31\u0e2a",
    "\u0e14\u0e35 \U0001f600\u200d\U0001f525 \u00bd\u2167\u0664",
    "\u00a0a\u2003b\u2028c\u0085d\u200be\ufefff\x1cg\x00h\u180ei \u0301\u0327 '\u2019s 'S 'RE",
    " ",
    "   ",
    "\n",
    "a\n \n  b",
)
_PIECE = 1 << 17  # characters: longer texts go in pieces, since a very long run of spaces overflows tiktoken's stack


def bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, reversed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _ranks(content: dict, model: models.BPE) -> dict[bytes, int] | None:
    """Bytes -> id where the claim's conditions hold for the BPE of ``content``, else None."""
    bpe = content["model"]
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
    if bpe.get("type") != "BPE" or any(bpe.get(name) for name in unusual) or bpe.get("ignore_merges"):
        return None
    vocabulary: dict[str, int] = bpe["vocab"]
    to_byte = bytes_of_characters()
    ranks = {bytes([byte]): vocabulary[c] for c, byte in to_byte.items() if c in vocabulary}
    if len(ranks) != 256:
        return None
    last = -1
    for merge in bpe["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        token = left + right
        rank, parts = vocabulary[token], [p for p in (left, right) if len(p) > 1]
        if rank <= last or any(vocabulary[part] >= rank for part in parts) or any(c not in to_byte for c in token):
            return None
        if [piece.id for piece in model.tokenize(token)] != [rank]:
            return None
        ranks[bytes(to_byte[c] for c in token)] = last = rank
    special = {token["id"] for token in content["added_tokens"]}
    return ranks if set(vocabulary.values()) - set(ranks.values()) <= special else None


class FastBPE:
    """tiktoken with the ranks of a `tokenizers` byte-level BPE."""

    def __init__(self, ranks: dict[bytes, int], special: list[str]) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding("mlxgpt", pat_str=_GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self._special = re.compile("|".join(re.escape(text) for text in special)) if special else None

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> "FastBPE | None":
        """The fast twin of ``backend``; None where tiktoken is missing or the ids are not provably the same."""
        content = json.loads(backend.to_str())
        split = content["pre_tokenizer"] or {}
        plain = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
        if not plain or content["normalizer"]:
            return None
        ranks = _ranks(content, backend.model)
        if ranks is None:
            return None
        try:
            fast = cls(ranks, [token["content"] for token in content["added_tokens"]])
        except ImportError:
            return None
        slow = [item.ids for item in backend.encode_batch(list(PROBE), add_special_tokens=False)]
        return fast if [fast._ids(text) for text in PROBE] == slow else None

    def encode(self, text: str) -> np.ndarray | None:
        """The ids; None for a text that is left to `tokenizers`: one with special tokens or endless white space."""
        if self._special is not None and self._special.search(text):
            return None
        if len(text) <= _PIECE:
            return np.asarray(self._ids(text), dtype=np.int32)
        pieces = cut_before_space(text, _PIECE)
        if pieces is None:
            return None
        return np.asarray([i for piece in pieces for i in self._ids(piece)], dtype=np.int32)

    def _ids(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)
