"""From a corpus to checksummed shards: streamed, by several processes, in an order that does not depend on how many.

Shards are made in a hidden sibling folder and renamed when all of them and their index are on disk, so a folder that
has its name is complete. The cache keeps them under a key of the documents' bytes, the split and the tokenizer.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.config import DataConfig
from mlxgpt.common.data import corpus as corpora
from mlxgpt.common.data.corpus import Corpus, Piece, Scan
from mlxgpt.common.data.shards import FORMAT, SHARD, ShardWriter, Tokens, is_shards, open_split, write_index
from mlxgpt.common.data.split import cross_entropy, split
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.files import put
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.load import KINDS, load_tokenizer, train_tokenizer
from mlxgpt.common.tokenizers.parallel import encode_in_order
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.units import counted

Say = Callable[[str], None]

GROUP = 1 << 20  # characters that a process gets at once
ALONE = 8 << 20  # characters: a smaller corpus is not worth starting processes for
# Bytes of text that a tokenizer is trained on; more changes little, and SentencePiece holds it in memory.
TRAINING = {"char": 1 << 62, "bpe": 64 << 20, "sp-bpe": 32 << 20, "sp-unigram": 32 << 20}


def cache_folder() -> Path:
    """$MLXGPT_CACHE, else mlxgpt in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MLXGPT_CACHE")
    return (
        Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxgpt"
    )


def cached(data: DataConfig, say: Say = print) -> Path:
    """The folder of shards of ``data`` in the cache, made now unless the same documents and tokenizer were before.

    Raises:
        UserError: anything wrong with the source, the tokenizer or the disk.
    """
    corpus = corpora.open_corpus(data.source, data.text_key)
    tokenizer = None if data.tokenizer in KINDS else load_tokenizer(data.tokenizer)
    named = (
        f"{data.tokenizer} {0 if data.tokenizer == 'char' else data.vocab_size}"
        if tokenizer is None
        else tokenizer.digest
    )
    content: list[Any] = [FORMAT, "cut", corpus.digest(), data.val_fraction, named]
    if tokenizer and _around(tokenizer) not in (([], []), ([], [tokenizer.eos_id])):
        content.append(_around(tokenizer))
    key = json.dumps(content)
    stem = "".join(c if c.isalnum() else "-" for c in Path(corpora.called(data.source)).stem)[:32]
    folder = cache_folder() / "shards" / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not is_shards(folder):
        prepare(corpus, data, folder, tokenizer, say)
    return folder


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands in the shards before and after each document."""
    return beginning.opening(tokenizer), beginning.end(tokenizer, np.array([], np.int32)).tolist()


def prepare(corpus: Corpus, data: DataConfig, folder: Path, tokenizer: Tokenizer | None, say: Say = print) -> None:
    """Makes ``folder``: shards, index.json and the tokenizer; without a ``tokenizer`` one is trained as ``data`` says.

    Raises:
        UserError: a damaged source, a character that the tokenizer lacks, no space left.
        RunError: the source changed meanwhile, or a process died.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = folder.parent / f".{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    try:
        temporary.mkdir()
        _fill(temporary, corpus, data, tokenizer, say)
        try:
            put(temporary, folder, replace=False)
        except OSError:
            if not is_shards(folder):
                raise
            say(f"{folder} was made by another process meanwhile: using that")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder.parent).free >> 20
        raise UserError(
            f"{folder}: no space left to write shards ({free} MB free): set MLXGPT_CACHE or --out elsewhere"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what preparations of ``folder`` that were killed on this machine left behind."""
    start = f".{folder.name}.tmp-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{glob.escape(start)}*"):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(left.name.removeprefix(start)), 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)


def _fill(folder: Path, corpus: Corpus, data: DataConfig, tokenizer: Tokenizer | None, say: Say) -> None:
    started = time.perf_counter()
    for note in corpus.notes:
        say(note)
    say(f"reading {corpus.name}")
    digest = corpus.digest()
    scanned = corpora.scan(corpus)
    say(f"{corpus.name}: {counted(scanned.documents, 'document')}, {scanned.size:,} bytes")
    if scanned.empty:
        say(f"{corpus.name}: left out {counted(scanned.empty, 'document')} without text")
    if scanned.marks:
        say(f"{corpus.name}: a byte order mark begins {counted(scanned.marks, 'document')}, and is kept as text")
    if tokenizer is None:
        tokenizer = train(corpus, scanned, data.tokenizer, data.vocab_size, data.val_fraction, say)
    if scanned.separators and tokenizer.kind == "SentencePiece":
        say(f"{corpus.name}: {scanned.separators:,} characters U+2581, which SentencePiece reads as spaces")
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    index = _write_shards(folder, corpus, scanned, data, tokenizer, say)
    if corpus.digest() != digest:
        raise RunError(f"{corpus.name}: changed while it was read: prepare it again")
    source: dict[str, Any] = {"name": corpus.name, "sha256": digest, "documents": scanned.documents}
    if corpus.name == "pydocs":
        source["python"] = sys.version.split()[0]
    index |= {"source": source, "val_fraction": data.val_fraction}
    write_index(folder, index)
    counts = " and ".join(f"{part['tokens']:,} {name}" for name, part in index["splits"].items())
    say(f"prepared {counts} tokens in {time.perf_counter() - started:.1f} s")


def train(corpus: Corpus, scanned: Scan, kind: str, vocab_size: int, val_fraction: float, say: Say) -> Tokenizer:
    """A tokenizer of ``corpus``: char knows every character of it, the others learn from its training split.

    ``val_fraction`` 0 means no split. A corpus larger than TRAINING gives an even sample of its pieces, chosen by hash.
    """
    share = min(1.0, TRAINING[kind] / scanned.size)
    part = f"{share:.1%} of the corpus, chosen by hash" if share < 1 else corpus.name
    size = "" if kind == "char" else f" of {vocab_size:,} tokens"
    say(f"training a {kind} tokenizer{size} on {part}")
    limit = int(share * (1 << 32))

    def texts() -> Iterator[str]:
        everything = (("train", piece) for piece in corpus.read())
        for side, piece in split(corpus.read(), scanned, val_fraction) if val_fraction else everything:
            # The low bits choose the sample, as the high ones choose the split.
            if kind == "char" or (side == "train" and (share == 1 or piece.hash & 0xFFFFFFFF < limit)):
                yield piece.text

    started = time.perf_counter()
    tokenizer = train_tokenizer(kind, texts(), vocab_size)
    say(f"trained a tokenizer: {tokenizer.kind}, {tokenizer.n_vocab:,} tokens, {time.perf_counter() - started:.1f} s")
    if kind != "char" and tokenizer.n_vocab < vocab_size:
        say(f"the corpus has no more to merge: {tokenizer.n_vocab:,} tokens in place of {vocab_size:,}")
    return tokenizer


def _write_shards(
    folder: Path, corpus: Corpus, scanned: Scan, data: DataConfig, tokenizer: Tokenizer, say: Say
) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    writers = {name: ShardWriter(folder, name, dtype, SHARD) for name in ("train", "val")}
    counts: dict[str, dict[str, Any]] = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in writers}
    workers = data.workers or os.cpu_count() or 1
    if scanned.characters < ALONE or tokenizer.kind == "char":
        workers = 1  # characters go through faster than through a pipe
    first, last = (np.array(ids, np.int32) for ids in _around(tokenizer))
    progress = Progress(scanned.characters, say)
    cuts: list[list[int]] = []
    longest, length = {"document": "", "tokens": 0}, 0
    waiting: list[list[tuple[str, Piece]]] = []

    def groups() -> Iterator[list[str]]:
        for group in grouped(split(corpus.read(), scanned, data.val_fraction)):
            waiting.append(group)
            yield [piece.text for _, piece in group]

    try:
        with progress:
            for ids in encode_in_order(tokenizer, folder / "tokenizer", groups(), workers):
                for (name, piece), tokens in zip(waiting.pop(0), ids, strict=True):
                    assert not len(tokens) or int(tokens.max()) < tokenizer.n_vocab
                    writers[name].write(beginning.begin(first.tolist(), tokens) if piece.first else tokens)
                    if name == "val":
                        length = len(tokens) + (0 if piece.first else length)
                        longest = max(longest, {"document": piece.name, "tokens": length}, key=lambda x: x["tokens"])
                        if piece.cut:
                            cuts[-1][1] += len(tokens)
                    elif piece.cut and piece.last:
                        cuts.append([writers[name].tokens, 0])
                    if piece.last:
                        writers[name].write(last)
                    counts[name]["documents"] += piece.first
                    counts[name]["bytes"] += len(piece.text.encode())
                    progress.advance(len(piece.text))
        if progress.done != scanned.characters:
            raise RunError(f"{corpus.name}: changed while it was read: prepare it again")
        for writer in writers.values():
            writer.finish()
    except UserError as error:
        raise UserError(f"{_guilty(tokenizer, waiting)}: {error}") from None
    finally:
        for writer in writers.values():
            writer.abandon()
    for name, writer in writers.items():
        counts[name] |= {"tokens": writer.tokens, "shards": writer.shards}
    counts["train"]["cuts"], counts["val"]["longest"] = cuts, longest
    index = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocab_size": tokenizer.n_vocab,
        "eos_id": tokenizer.eos_id,
        "begins_with": first.tolist(),
        "tokenizer": {"kind": tokenizer.kind, "digest": tokenizer.digest},
        "splits": counts,
    }
    held = {name: _unigram(open_split(folder, index, name), tokenizer.n_vocab) for name in writers}
    for name, other in (("train", "val"), ("val", "train")):
        if held[name].any():
            own, under = (cross_entropy(held[name], held[which]) for which in (name, other))
            counts[name]["unigram"] = {"own": own, "other": under}
    return index


def _unigram(tokens: Tokens, n_vocab: int) -> np.ndarray:
    """How often each token occurs, (n_vocab,)."""
    counts = np.zeros(n_vocab, np.int64)
    for block in tokens.blocks():
        counts += np.bincount(block, minlength=n_vocab)
    return counts


def _guilty(tokenizer: Tokenizer, groups: list[list[tuple[str, Piece]]]) -> str:
    """The name of the first piece that ``tokenizer`` cannot encode."""
    for _, piece in (item for group in groups for item in group):
        try:
            tokenizer.encode_batch([piece.text])
        except UserError:
            return piece.name + (f" from character {piece.start}" if piece.start else "")
    return "corpus"


def grouped(pieces: Iterator[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    """Pieces in groups of about GROUP characters; where they are cut depends on the pieces alone."""
    group: list[tuple[str, Piece]] = []
    size = 0
    for item in pieces:
        group.append(item)
        size += len(item[1].text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


class Progress:
    """A bar on a terminal, else a line every ten seconds: characters done of ``total``."""

    def __init__(self, total: int, say: Say) -> None:
        self.total, self.done, self._say = total, 0, say
        self._bar: Any = None
        self._started = self._told = time.perf_counter()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and self.total > ALONE:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("tokenizing", total=self.total)
            self._bar.start()
        return self

    def advance(self, count: int) -> None:
        """``count`` more characters are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif (now := time.perf_counter()) - self._told > 10:
            self._told = now
            rate = self.done / (now - self._started)
            left = (self.total - self.done) / rate
            self._say(f"tokenizing: {self.done / self.total:.0%}, {rate / 1e6:.1f} M characters/s, {left:.0f} s left")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
