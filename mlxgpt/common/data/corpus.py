"""Documents from pydocs, text files, .jsonl, .parquet and folders of them: streamed, in an order that never changes.

A text file is one document, a row of the others is one. Text is kept exactly as it is in the file, line ends and byte
order marks included. What is no text is an error that names the file and the byte or row.
"""

import codecs
import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.protocol import _LAST_WORD_END
from mlxgpt.common.units import counted

PIECE = 1 << 20
"""Characters: a longer document is handled in pieces of at most this many."""
TEXT = (".txt", ".md", ".text", ".markdown", ".rst")
SUFFIXES = (*TEXT, ".jsonl", ".parquet")

LONGEST = 1024
"""Documents whose lengths a scan keeps."""
_BLOCK = 1 << 22  # bytes read at once


class NoText(UserError):
    """A row without the key or column that was to hold its text."""


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that is longer than PIECE characters."""

    text: str
    name: str  # file, and row where there are rows
    first: bool = True
    last: bool = True
    start: int = 0  # its first character's place in the document
    cut: bool = False  # the document's other part is in the other split

    @property
    def hash(self) -> int:
        """64 bits of the text; a document's are those of its first piece."""
        return int.from_bytes(hashlib.blake2b(self.text.encode(), digest_size=8).digest(), "little")


@dataclass
class Corpus:
    """What a source holds. ``read`` streams it from the start each time; ``notes`` are worth telling the user."""

    name: str
    files: list[Path]
    text_key: str
    read: Callable[[], Iterator[Piece]]
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """sha256 of the files' bytes in order, and of how they are read: changes whenever a document does."""
        total = hashlib.sha256()
        for path in self.files:
            key = self.text_key if path.suffix.lower() in (".jsonl", ".parquet") else ""
            total.update(f"{path.suffix.lower()} {key} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    total.update(block)
        return total.hexdigest()


@dataclass(frozen=True)
class Scan:
    """What one pass over a corpus counts."""

    documents: int
    characters: int
    size: int  # bytes of UTF-8
    empty: int  # documents without a character, which are left out
    smallest: int  # the smallest and the largest hash of a document
    largest: int
    separators: int  # U+2581, which SentencePiece cannot tell from a space
    marks: int  # documents that start with a byte order mark
    longest: list[tuple[int, int]]  # (characters, number from 0) of the LONGEST longest documents, in no order


def open_corpus(source: str | Sequence[str], text_key: str = "text") -> Corpus:
    """The corpus at ``source``: pydocs, a file or a folder, all of whose files are taken in sorted order; or several.

    Raises:
        UserError: nothing there, nothing to read in it, or a file of a kind that is not read.
    """
    if not isinstance(source, str):
        return _several(source, text_key)
    if source == "pydocs":
        from mlxgpt.common.data import pydocs

        return Corpus("pydocs", pydocs.files(), "", _read_pydocs)
    path, notes = Path(source).expanduser(), []
    if path.is_dir():
        files, others = _walk(path)
        if others:
            kinds = ", ".join(sorted({other.suffix or other.name for other in others})[:6])
            notes.append(f"{source}: left out {counted(len(others), 'file')}: {kinds}; read are {' '.join(SUFFIXES)}")
        if not files:
            raise UserError(f"{source}: no files to read in this folder: expected {' '.join(SUFFIXES)}")
    elif path.is_file():
        files = [path]
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{source}: cannot tell what {path.suffix or 'this'} holds: expected {' '.join(SUFFIXES)}")
    else:
        raise UserError(f"{source}: no such file or folder: expected pydocs, {' '.join(SUFFIXES)} or a folder of them")
    empty = [file for file in files if file.stat().st_size == 0]
    if len(empty) == len(files):
        raise UserError(f"{source}: empty: expected text")
    if empty:
        notes.append(f"{source}: left out {counted(len(empty), 'empty file')}, the first is {empty[0].name}")
        files = [file for file in files if file not in set(empty)]
    return Corpus(source, files, text_key, lambda: _read_files(files, text_key), notes)


def _several(sources: Sequence[str], text_key: str) -> Corpus:
    """The files of all sources, in the order of the sources, each once."""
    if "pydocs" in sources:
        raise UserError("pydocs and files: expected one of the two")
    parts = [open_corpus(source, text_key) for source in sources]
    files = list({path.resolve(): path for part in parts for path in part.files}.values())
    notes = [note for part in parts for note in part.notes]
    return Corpus(called(sources), files, text_key, lambda: _read_files(files, text_key), notes)


def called(source: str | Sequence[str]) -> str:
    """What to call a source in a line: its path, or the first path and how many more."""
    if isinstance(source, str):
        return source
    return source[0] + (f" and {len(source) - 1} more" if len(source) > 1 else "")


def scan(corpus: Corpus, progress: Callable[[int], None] | None = None) -> Scan:
    """Reads the whole corpus once and counts; ``progress`` is told the characters so far.

    Raises:
        UserError: a damaged or binary file, or not one character of text.
    """
    documents = characters = size = empty = separators = marks = 0
    smallest, largest = 1 << 64, -1
    longest: list[tuple[int, int]] = []
    for piece in corpus.read():
        if not piece.text:
            empty += 1
            continue
        if piece.first:
            documents += 1
            marks += piece.text[0] == "\ufeff"
            found = piece.hash
            smallest, largest = min(smallest, found), max(largest, found)
        if piece.last:
            heapq.heappush(longest, (piece.start + len(piece.text), documents - 1))
            if len(longest) > LONGEST:
                heapq.heappop(longest)
        characters += len(piece.text)
        size += len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        separators += piece.text.count("\u2581")
        if progress:
            progress(characters)
    if not documents:
        raise UserError(f"{corpus.name}: empty: {counted(empty, 'document')} without text")
    return Scan(documents, characters, size, empty, smallest, largest, separators, marks, longest)


def _walk(root: Path) -> tuple[list[Path], list[Path]]:
    """The files below ``root`` that are read, sorted, and the others; each folder once, hidden names left alone."""
    found: list[Path] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link back up, or a second way to the same folder
        seen.add((status.st_dev, status.st_ino))
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        waiting += [entry for entry in reversed(entries) if entry.is_dir()]
        for entry in entries:
            if entry.is_file():
                (found if entry.suffix.lower() in SUFFIXES else others).append(entry)
            elif entry.is_symlink() and not entry.is_dir():
                raise UserError(f"{entry}: a link to nothing: {os.readlink(entry)}")
    return sorted(found, key=lambda path: path.relative_to(root).parts), others


def _read_pydocs() -> Iterator[Piece]:
    from mlxgpt.common.data import pydocs

    for name, text in pydocs.documents():
        yield Piece(text, f"pydocs {name}")


def _read_files(files: list[Path], text_key: str) -> Iterator[Piece]:
    for path in files:
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            yield from _rows(_read_jsonl(path, text_key), path)
        elif suffix == ".parquet":
            yield from _rows(_read_parquet(path, text_key), path)
        else:
            yield from _in_pieces(_read_text(path), str(path))


def _in_pieces(blocks: Iterator[str], name: str) -> Iterator[Piece]:
    """One document from blocks of text, re-cut before white space wherever there is some."""
    waiting, start = "", 0
    for block in blocks:
        waiting += block
        while len(waiting) > PIECE:
            found = _LAST_WORD_END.match(waiting, 0, PIECE)
            end = found.end() if found else PIECE
            yield Piece(waiting[:end], name, first=start == 0, last=False, start=start)
            waiting, start = waiting[end:], start + end
    yield Piece(waiting, name, first=start == 0, start=start)


def _rows(rows: Iterator[tuple[int, object]], path: Path) -> Iterator[Piece]:
    """The documents of (row number from 1, value)."""
    for number, value in rows:
        where = f"{path} row {number}"
        if not isinstance(value, str):
            raise UserError(f"{where}: text is {_shown(value)}: expected a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: {value[error.start]!r} at character {error.start}: half of a surrogate pair"
            ) from None
        yield from _in_pieces(iter((value,)), where)


def _shown(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def decoded(data: bytes, offset: int, where: str, final: bool) -> tuple[str, int]:
    """Text and the bytes used of ``data``, which starts at byte ``offset`` of its file."""
    zero = data.find(b"\0")
    if zero >= 0:
        kind = "UTF-16 or UTF-32" if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff") else "binary"
        raise UserError(f"{where}: {kind}: NUL at byte {offset + zero}: expected UTF-8 text")
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        at, found = offset + error.start, data[error.start]
        raise UserError(f"{where}: not UTF-8: byte {at} is 0x{found:02x} ({error.reason})") from None


def _read_text(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        data, offset = b"", 0
        while True:
            block = file.read(_BLOCK)
            data += block
            text, used = decoded(data, offset, str(path), final=not block)
            data, offset = data[used:], offset + used
            yield text
            if not block:
                return


def _read_jsonl(path: Path, key: str) -> Iterator[tuple[int, object]]:
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} row {number}"
            text, _ = decoded(line, offset, where, final=True)
            offset += len(line)
            text = text.removeprefix("\ufeff") if number == 1 else text
            if not text.strip():
                continue
            row = parse_json(text, where)
            if not isinstance(row, dict):
                raise UserError(f'{where}: {_shown(row)}: expected an object such as {{"{key}": "..."}}')
            if key not in row:
                raise NoText(f"{where}: no key {key!r}: found {', '.join(map(repr, list(row)[:8])) or 'no key'}")
            yield number, row[key]


def parse_json(text: str, where: str) -> object:
    """The value that ``text`` is as JSON; UserError where it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read: nested too deeply") from None


def _read_parquet(path: Path, key: str) -> Iterator[tuple[int, object]]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if key not in names:
            raise NoText(f"{path}: no column {key!r}: found {', '.join(map(repr, names[:8]))}")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[key]):
            for value in batch.column(0):
                number += 1
                yield number, value.as_py()


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile; what it raises while it is open becomes a UserError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow: pip install 'mlxgpt[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file that can be read: {' '.join(str(error).split())[:120]}") from None
