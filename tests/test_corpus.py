"""Readers of documents: exact text, one order, errors that name the file and the byte or row."""

import json
import os
from pathlib import Path

import pytest

from mlxgpt.common.data import corpus as corpora
from mlxgpt.common.data import pydocs
from mlxgpt.common.data.corpus import Piece, open_corpus, scan
from mlxgpt.common.errors import UserError


def texts(source: Path | str, key: str = "text") -> list[str]:
    return ["".join(piece.text for piece in document) for document in documents(source, key)]


def documents(source: Path | str, key: str = "text") -> list[list[Piece]]:
    found: list[list[Piece]] = []
    for piece in open_corpus(str(source), key).read():
        if piece.first:
            found.append([])
        found[-1].append(piece)
    return found


def test_text_is_kept_exactly(tmp_path: Path) -> None:
    for content in ("a\r\nb\rc\n\n", "\ufeffmark", "  lead and trail \n ", "\u4f60\u597d\U0001f525", "\x1c\x85\u2028x"):
        (tmp_path / "a.txt").write_bytes(content.encode())
        assert texts(tmp_path / "a.txt") == [content]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmark")
    assert scan(open_corpus(str(tmp_path / "a.txt"))).marks == 1


def test_folder_takes_all_files_sorted_and_says_what_it_leaves(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b" / "x.md").write_text("second")
    (tmp_path / "b" / "y.TXT").write_text("third")
    (tmp_path / "b.txt").write_text("fourth")
    (tmp_path / "c.jsonl").write_text('{"text": "fifth"}\n{"text": "sixth"}\n')
    (tmp_path / "z.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"\0")
    (tmp_path / ".hidden.txt").write_text("no")
    corpus = open_corpus(str(tmp_path))
    assert [piece.text for piece in corpus.read()] == ["first", "second", "third", "fourth", "fifth", "sixth"]
    assert "left out 1 file: .png; read are .txt" in corpus.notes[0]
    assert "1 empty file, the first is z.txt" in corpus.notes[1]


def test_symlink_loops_end_and_broken_links_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("once")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    assert texts(tmp_path) == ["once"]
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone.txt: a link to nothing: .*nowhere"):
        open_corpus(str(tmp_path))


def test_long_texts_come_in_pieces_cut_before_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 1000)
    monkeypatch.setattr(corpora, "_BLOCK", 333)
    text = "na\u00efve words \u4f60\u597d, and\r\nlines;  more\n" * 300
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    for name in ("a.txt", "a.jsonl"):
        (document,) = documents(tmp_path / name)
        assert "".join(piece.text for piece in document) == text
        assert len(document) > 8 and all(len(piece.text) <= 1000 for piece in document)
        assert [piece.last for piece in document] == [False] * (len(document) - 1) + [True]
        assert all(piece.text[0] in " \r\n" for piece in document[1:])
        assert all(text[piece.start :].startswith(piece.text) for piece in document)


def test_pieces_do_not_depend_on_how_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 1000)
    (tmp_path / "a.txt").write_text("one two\nthree \u00e9\u00e9\u00e9 " * 400 + "x" * 5000)
    found = []
    for block in (7, 1024, 1 << 20):
        monkeypatch.setattr(corpora, "_BLOCK", block)
        found.append(documents(tmp_path / "a.txt"))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: empty"),
        ("a.txt", b"abc\0def", "a.txt: binary: NUL at byte 3"),
        ("a.txt", "hello".encode("utf-16"), "a.txt: UTF-16 or UTF-32: NUL at byte 3"),
        ("a.md", b"good\nb\xe9d", "a.md: not UTF-8: byte 6 is 0xe9"),
        ("a.txt", b"cut off \xe4\xbd", "a.txt: not UTF-8: byte 8 is 0xe4"),
        ("a.txt", b"surrogate \xed\xa0\x80", "a.txt: not UTF-8: byte 10 is 0xed"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 3}\n', r"a.jsonl row 2: no key 'text': found 'body', 'id'"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}\n', "a.jsonl row 3: text is int '5': expected a string"),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl row 1: text is null: expected a string"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', "a.jsonl row 2: not JSON"),
        ("a.jsonl", b'["a"]\n', r"a.jsonl row 1: list .*expected an object such as {\"text\""),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl row 2: not UTF-8: byte 24 is 0xff"),
        ("a.jsonl", b'{"text": "\\ud800x"}\n', r"a.jsonl row 1: '\\ud800' at character 0: half of a surrogate"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "a.jsonl row 1: not JSON"),
        ("a.jsonl", b'{"text": ""}\n{"text": ""}\n', "a.jsonl: empty: 2 documents without text"),
        ("a.csv", b"a,b", "cannot tell what .csv holds: expected .txt"),
        ("a.parquet", b"PAR1 no", "a.parquet: not a parquet file"),
    ],
)
def test_damaged_input_is_named_exactly(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        scan(open_corpus(str(tmp_path / name)))


def test_byte_offsets_are_the_files_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_BLOCK", 64)
    for place in (63, 64, 65, 500):
        (tmp_path / "a.txt").write_bytes(
            "\u00e9".encode() * 250 * (place == 500) + b"a" * place * (place != 500) + b"\xff"
        )
        with pytest.raises(UserError, match=f"byte {place} is 0xff"):
            scan(open_corpus(str(tmp_path / "a.txt")))


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder: expected pydocs"):
        open_corpus(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no files to read"):
        open_corpus(str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="empty"):
        open_corpus(str(tmp_path))


def test_jsonl_skips_mark_and_blank_lines_and_takes_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "one\\r\\n"}\r\n\r\n{"body": "two"}')
    assert texts(tmp_path / "a.jsonl", "body") == ["one\r\n", "two"]
    assert [d[0].name for d in documents(tmp_path / "a.jsonl", "body")][1].endswith("a.jsonl row 3")


def test_parquet_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", "two\r\n", None]}), path)
    rows = open_corpus(str(path)).read()
    assert [next(rows).text, next(rows).text] == ["one", "two\r\n"]
    with pytest.raises(UserError, match="row 3: text is null"):
        next(rows)
    with pytest.raises(UserError, match="no column 'body': found 'id', 'text'"):
        texts(path, "body")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a parquet file"):
        texts(path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'mlxgpt\[parquet\]'"):
        texts(path)


def test_digest_follows_content_and_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "body": "b"}\n')
    first = open_corpus(str(path)).digest()
    assert open_corpus(str(path), "body").digest() != first
    os.utime(path, (1, 1))
    assert open_corpus(str(path)).digest() == first
    path.write_text('{"text": "A", "body": "b"}\n')
    assert open_corpus(str(path)).digest() != first


def test_pydocs_is_english_text_once_each() -> None:
    found = pydocs.documents()
    names = [name for name, _ in found]
    assert names == sorted(set(names)) and len({text for _, text in found}) == len(found)
    size = sum(len(text.encode()) for _, text in found)
    assert 1_000_000 < size < 8_000_000
    by_name = dict(found)
    assert by_name["json.dumps"].startswith("json.dumps(obj, *, skipkeys=False") and "JSON" in by_name["json.dumps"]
    assert any(name.startswith("topic ") for name in names)
    assert not any(name.startswith(("test.", "idlelib.")) for name in names)
    assert all(text.endswith("\n") and text.strip() for _, text in found)
