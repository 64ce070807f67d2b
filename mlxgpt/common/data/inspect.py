"""What a corpus or prepared shards hold: counts, longest documents, duplicates, a decoded sample."""

import hashlib
import heapq
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.data import corpus as corpora
from mlxgpt.common.data import prepare, shards
from mlxgpt.common.data.corpus import Corpus, Piece
from mlxgpt.common.data.split import describe
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.parallel import encode_in_order
from mlxgpt.common.tokenizers.protocol import Tokenizer

LONGEST = 5
SAMPLE = 64
"""Tokens of the decoded sample."""


def inspect_corpus(corpus: Corpus, tokenizer: Tokenizer | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The figures of ``corpus``; without a ``tokenizer`` one is trained on it as a recipe's default would be.

    Memory: eight bytes a document.
    """
    scanned = corpora.scan(corpus)
    if tokenizer is None:
        tokenizer = prepare.train(corpus, scanned, "bpe", 2048, 0.1, say)
        origin = "trained on it just now"
    else:
        origin = "as given"
    longest: list[tuple[int, str]] = []
    hashes = array("Q")
    tokens = length = done = 0
    whole = hashlib.blake2b(digest_size=8)
    sample: list[int] = []
    for piece, ids in _encoded(corpus, tokenizer, scanned.characters):
        if piece.first:
            length, whole = 0, hashlib.blake2b(digest_size=8)
        length += len(piece.text)
        whole.update(piece.text.encode())
        tokens += len(ids)
        done += len(piece.text)
        if not sample and 2 * done >= scanned.characters:  # from the middle, the same each time
            sample = ids[:SAMPLE].tolist()
        if piece.last:
            hashes.append(int.from_bytes(whole.digest(), "little"))
            _keep(longest, length, piece.name)
    distinct = len(np.unique(np.frombuffer(hashes, np.uint64))) if hashes else 0
    return {
        "source": corpus.name,
        "files": len(corpus.files),
        "documents": scanned.documents,
        "empty_documents": scanned.empty,
        "bytes": scanned.size,
        "characters": scanned.characters,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.n_vocab, "origin": origin},
        "tokens": tokens,
        **beginning.described(tokenizer, beginning.begins_with(tokenizer)),
        "tokens_per_byte": tokens / scanned.size,
        "longest": [{"characters": count, "document": name} for count, name in sorted(longest, reverse=True)],
        "duplicates": len(hashes) - distinct,
        "byte_order_marks": scanned.marks,
        "sample": tokenizer.decode(sample),
        "notes": [*corpus.notes, *tokenizer.notes],
    }


def _encoded(corpus: Corpus, tokenizer: Tokenizer, characters: int) -> Iterator[tuple[Piece, np.ndarray]]:
    """Every piece with its ids; large corpora by several processes."""
    workers = (os.cpu_count() or 1) if characters >= prepare.ALONE and tokenizer.kind != "char" else 1
    waiting: list[list[Piece]] = []

    def groups() -> Iterator[list[str]]:
        for group in prepare.grouped(("", piece) for piece in corpus.read() if piece.text):
            waiting.append([piece for _, piece in group])
            yield [piece.text for _, piece in group]

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for ids in encode_in_order(tokenizer, Path(folder), groups(), workers):
            yield from zip(waiting.pop(0), ids, strict=True)


def _keep(longest: list[tuple[int, str]], count: int, name: str) -> None:
    heapq.heappush(longest, (count, name))
    if len(longest) > LONGEST:
        heapq.heappop(longest)


def inspect_shards(folder: Path) -> dict[str, Any]:
    """The figures of prepared shards, which are held against their checksums first.

    Documents are told apart by the eos token; without one, longest and duplicates are None.

    Raises:
        UserError: damaged shards.
    """
    index = shards.read_index(folder)
    largest = shards.verify(folder, index)
    tokenizer = load_tokenizer(folder / "tokenizer")
    splits, longest, hashes = {}, [], array("Q")
    for name, split in index["splits"].items():
        tokens = shards.open_split(folder, index, name)
        splits[name] = {key: split[key] for key in ("documents", "tokens", "bytes")} | {"shards": len(split["shards"])}
        if index["eos_id"] is not None:
            for start, length, digest in _documents(tokens, index["eos_id"]):
                hashes.append(digest)
                _keep(longest, length, f"{name} token {start}")
    train = shards.open_split(folder, index, "train")
    middle = max(len(train) // 2 - SAMPLE // 2, 0)
    total = {key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes")}
    total["documents"] -= len(index["splits"]["train"].get("cuts", []))  # a cut one is in both
    told = index["eos_id"] is not None
    return {
        "source": str(folder),
        "made_from": index["source"],
        **total,
        "splits": splits,
        "held_out": describe(index),
        "dtype": index["dtype"],
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.n_vocab, "eos_id": tokenizer.eos_id},
        **beginning.described(tokenizer, index.get("begins_with", [])),
        "largest_token": largest,
        "tokens_per_byte": total["tokens"] / total["bytes"],
        "longest": [{"tokens": count, "document": name} for count, name in sorted(longest, reverse=True)]
        if told
        else None,
        "duplicates": len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64))) if told and hashes else None,
        "sample": tokenizer.decode(train[middle : middle + SAMPLE].tolist()),
        "notes": tokenizer.notes,
    }


def _documents(tokens: shards.Tokens, eos: int) -> Iterator[tuple[int, int, int]]:
    """(first token, length, hash) of every document of a split."""
    start = length = 0
    whole = hashlib.blake2b(digest_size=8)
    for block in tokens.blocks():
        place = 0
        for end in [*np.flatnonzero(block == eos).tolist(), len(block)]:
            part = block[place:end]
            whole.update(part.tobytes())
            length += len(part)
            if end < len(block):
                yield start, length, int.from_bytes(whole.digest(), "little")
                start, length, whole = start + length + 1, 0, hashlib.blake2b(digest_size=8)
            place = end + 1
    if length:
        yield start, length, int.from_bytes(whole.digest(), "little")
