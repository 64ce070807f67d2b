"""The verbs of data and tokenizer, through the command line: what they print, make, and refuse."""

import hashlib
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlxgpt import cli
from mlxgpt.common import config, recipes
from mlxgpt.common.config import DataConfig, TrainConfig
from mlxgpt.common.data import fetch, shards
from mlxgpt.common.data.token_source import open_data
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.tokenizers.load import load_tokenizer

TEXT = "".join(f"line {i}: the quick brown fox, and caf\u00e9\r\n" for i in range(400))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Result:
    def __init__(self, code: int, out: str, error: str) -> None:
        self.code, self.out, self.error = code, out, error

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*words: object) -> Result:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return command


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


# fetch


class Server:
    """Serves one file; ``breaks_at`` ends an answer early, ``ranges`` says whether it continues."""

    def __init__(self, content: bytes) -> None:
        self.content, self.breaks_at, self.ranges, self.asked = content, 0, True, list[str | None]()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                owner.asked.append(asked)
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and owner.ranges else 0
                body = owner.content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: owner.breaks_at] if owner.breaks_at else body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/input.txt"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(TEXT.encode())
    thread = threading.Thread(target=made.http.serve_forever, daemon=True)
    thread.start()
    known = fetch.Known(made.url, hashlib.sha256(made.content).hexdigest(), len(made.content), "tiny.txt", "a test")
    monkeypatch.setitem(fetch.CORPORA, "tiny", known)
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


def test_fetch_downloads_once_and_checks(run: Any, server: Server, cache: Path) -> None:
    done = run("data", "fetch", "tiny")
    assert done.code == 0 and (cache / "corpora" / "tiny.txt").read_bytes() == server.content
    assert run("data", "fetch", "tiny").code == 0 and len(server.asked) == 1
    (cache / "corpora" / "tiny.txt").write_text("changed")
    done = run("data", "fetch", "tiny")
    assert done.code == 2 and re.search("tiny.txt: sha256 .*: expected .*: remove it", done.error)
    assert (cache / "corpora" / "tiny.txt").read_text() == "changed"


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_goes_on_where_it_broke_off(run: Any, server: Server, tmp_path: Path, ranges: bool) -> None:
    server.breaks_at, server.ranges = 5000, ranges
    done = run("data", "fetch", "tiny", "--out", tmp_path / "d")
    assert done.code == 2 and "interrupted at byte 5,000" in done.error and "run this again" in done.error
    assert not (tmp_path / "d" / "tiny.txt").exists()
    server.breaks_at = 0
    assert run("data", "fetch", "tiny", "--out", tmp_path / "d").code == 0
    assert (tmp_path / "d" / "tiny.txt").read_bytes() == server.content
    assert server.asked == [None, "bytes=5000-"]


def test_fetch_of_another_content_is_refused_and_starts_afresh(run: Any, server: Server, tmp_path: Path) -> None:
    right, server.content = server.content, b"x" * len(server.content)
    done = run("data", "fetch", "tiny", "--out", tmp_path / "d")
    assert done.code == 2 and f"expected {len(right)} bytes, sha256" in done.error
    assert list((tmp_path / "d").iterdir()) == []
    server.content = right
    assert run("data", "fetch", "tiny", "--out", tmp_path / "d").code == 0


def test_fetch_from_a_copy(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    known = fetch.Known("http://127.0.0.1:9/none", digest, len(TEXT.encode()), "tiny.txt", "a test")
    monkeypatch.setitem(fetch.CORPORA, "tiny", known)
    (tmp_path / "copy").write_bytes(TEXT.encode())
    (tmp_path / "other").write_bytes(b"other")
    assert run("data", "fetch", "tiny", "--from", tmp_path / "copy", "--out", tmp_path / "d").code == 0
    assert (tmp_path / "copy").exists()
    done = run("data", "fetch", "tiny", "--from", tmp_path / "other", "--out", tmp_path / "e")
    assert done.code == 2 and f"{tmp_path / 'other'}: 5 bytes, sha256" in done.error
    assert "no such file" in run("data", "fetch", "tiny", "--from", tmp_path / "none", "--out", tmp_path / "e").error
    done = run("data", "fetch", "tiny", "--out", tmp_path / "e")
    assert done.code == 2 and "cannot be reached" in done.error and "--from FILE" in done.error
    assert "did you mean 'tinyshakespeare'?" in run("data", "fetch", "tinyshakespear").error


# inspect


def test_inspect_counts_a_corpus(run: Any, tmp_path: Path) -> None:
    texts = ["one document", "two \u00e9", "one document", "the longest of them all", "one document"]
    found = run("data", "inspect", rows(tmp_path / "a.jsonl", [*texts, ""]), "--json").json
    expected = {"documents": 5, "empty_documents": 1, "duplicates": 2, "characters": sum(map(len, texts))}
    assert {key: found[key] for key in expected} == expected
    assert found["bytes"] == len("".join(texts).encode())
    assert found["longest"][0] == {"characters": 23, "document": f"{tmp_path / 'a.jsonl'} row 4"}
    assert found["sample"] in texts
    assert found["tokens_per_byte"] == found["tokens"] / found["bytes"]


def test_inspect_counts_with_the_tokenizer_it_is_given(run: Any, tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", [TEXT, TEXT[:100]])
    assert run("tokenizer", "train", source, "--kind", "char", "--out", tmp_path / "tok").code == 0
    found = run("data", "inspect", source, "--tokenizer", tmp_path / "tok", "--json").json
    assert found["tokens"] == found["characters"] == len(TEXT) + 100
    shown = run("data", "inspect", source, "--tokenizer", tmp_path / "tok")
    assert shown.code == 0 and re.search(r"duplicates +0\n", shown.out) and "'line" in shown.out


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_inspect_counts_shards_as_it_counts_their_source(run: Any, tmp_path: Path, kind: str) -> None:
    texts = [f"{TEXT[i : i + 40 + i]}" for i in range(60)] + ["twice"] * 2
    source = rows(tmp_path / "a.jsonl", texts)
    out = tmp_path / "shards"
    made = run("data", "prepare", source, "--out", out, "--tokenizer", kind, "--vocab-size", 300)
    assert made.code == 0 and f"--data {out}" in made.out
    of_shards = run("data", "inspect", out, "--json").json
    of_source = run("data", "inspect", source, "--tokenizer", out / "tokenizer", "--json").json
    assert of_shards["documents"] == of_source["documents"] == 62
    assert of_shards["bytes"] == of_source["bytes"]
    ends = 62 if kind == "bpe" else 0
    assert of_shards["tokens"] == of_source["tokens"] + ends
    if kind == "bpe":
        assert of_shards["duplicates"] == of_source["duplicates"] == 1
        longest = load_tokenizer(out / "tokenizer").encode(max(texts, key=len))
        assert of_shards["longest"][0]["tokens"] == len(longest)
    else:
        assert of_shards["duplicates"] is None
        assert "cannot tell" in run("data", "inspect", out).out
    tokens = shards.open_split(out, shards.read_index(out), "train")
    whole = load_tokenizer(out / "tokenizer").decode(tokens.read(0, len(tokens)).tolist())
    assert len(of_shards["sample"]) >= 64 and of_shards["sample"] in whole


def test_inspect_finds_damaged_shards(run: Any, tmp_path: Path) -> None:
    run("data", "prepare", rows(tmp_path / "a.jsonl", [TEXT, TEXT[::-1]]), "--out", tmp_path / "s", "--vocab-size", 300)
    path = tmp_path / "s" / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-10])
    done = run("data", "inspect", tmp_path / "s")
    assert done.code == 2 and "train-00000.bin" in done.error and "truncated" in done.error and not done.out


# prepare


def test_prepare_refuses_an_output_that_exists(run: Any, tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", [TEXT])
    (tmp_path / "out").mkdir()
    done = run("data", "prepare", source, "--out", tmp_path / "out")
    assert done.code == 2 and "out: exists already" in done.error
    assert list((tmp_path / "out").iterdir()) == []
    done = run("data", "prepare", tmp_path / "none.txt", "--out", tmp_path / "new")
    assert done.code == 2 and "none.txt: no such file" in done.error and not (tmp_path / "new").exists()
    done = run("data", "prepare", source, "--out", tmp_path / "new", "--val-fraction", "1.5")
    assert done.code == 2 and "data.val_fraction = 1.5" in done.error


# export


def a_run(folder: Path, source: Path, digest: dict[str, str] | None, **settings: Any) -> Path:
    """What export needs of a run: its recipe, and the data digests of its newest checkpoint."""
    folder.mkdir()
    recipe = config.Recipe(data=DataConfig(source=str(source), **settings))
    (folder / "recipe.toml").write_text(recipes.to_toml(recipe))
    if digest is not None:
        state = resolve.path_of(folder, 5) / checkpoint.STATE
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"data": digest}))
    return folder


def test_export_is_read_back_with_the_same_digest(run: Any, tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", [TEXT[i:] for i in range(0, 4000, 100)])
    settings = DataConfig(source=str(source), vocab_size=300)
    data, _ = open_data(settings, 16, TrainConfig(), say=lambda _: None)
    folder = a_run(tmp_path / "run", source, data.digest, vocab_size=300)
    for name in ("a.tar", "b.tar"):
        done = run("data", "export", folder, "--out", tmp_path / name)
        assert done.code == 0 and "tar -xf" in done.out
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    source.unlink()
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(folder, filter="data")
    again, tokenizer = open_data(settings, 16, TrainConfig(), folder, say=lambda _: None)
    assert again.digest == data.digest and tokenizer is not None
    assert (again.batch(3).tokens == data.batch(3).tokens).all()


def test_export_of_flat_files_takes_the_tokenizer_along(run: Any, tmp_path: Path) -> None:
    run("tokenizer", "train", rows(tmp_path / "a.jsonl", [TEXT]), "--out", tmp_path / "tok", "--vocab-size", 300)
    ids = load_tokenizer(tmp_path / "tok").encode(TEXT)
    (tmp_path / "tokens.bin").write_bytes(b"".join(i.to_bytes(2, "little") for i in ids))
    settings = DataConfig(source=str(tmp_path / "tokens.bin"), tokenizer=str(tmp_path / "tok"))
    data, _ = open_data(settings, 16, TrainConfig(), say=lambda _: None)
    folder = a_run(tmp_path / "run", tmp_path / "tokens.bin", data.digest, tokenizer=str(tmp_path / "tok"))
    assert run("data", "export", folder, "--out", tmp_path / "a.tar").code == 0
    (tmp_path / "tokens.bin").unlink()
    (tmp_path / "tok").rename(tmp_path / "gone")
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(folder, filter="data")
    again, tokenizer = open_data(settings, 16, TrainConfig(), folder, say=lambda _: None)
    assert again.digest == data.digest and tokenizer is not None


def test_export_refuses_data_the_run_was_not_trained_on(run: Any, tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", [TEXT, TEXT[::-1]])
    folder = a_run(tmp_path / "run", source, {"train-00000.bin": "0" * 64}, vocab_size=300)
    done = run("data", "export", folder, "--out", tmp_path / "a.tar")
    assert done.code == 2 and re.search("train-00000.bin of .*: not what .*run was trained on", done.error)
    assert "not a run" in run("data", "export", tmp_path, "--out", tmp_path / "a.tar").error
    assert "ends in .tar" in run("data", "export", folder, "--out", tmp_path / "a.zip").error
    assert not (tmp_path / "a.tar").exists()


# tokenizer


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-bpe", "sp-unigram"])
def test_tokenizer_train_and_inspect(run: Any, tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    out = tmp_path / "tok"
    done = run("tokenizer", "train", tmp_path / "a.txt", "--kind", kind, "--vocab-size", 300, "--out", out)
    assert done.code == 0 and f"data.tokenizer={out}" in done.out
    found = run("tokenizer", "inspect", out, "--text", "the caf\u00e9", "--json").json
    tokenizer = load_tokenizer(out)
    assert found["ids"] == tokenizer.encode("the caf\u00e9") and found["round_trip"]
    assert (found["vocab_size"], found["sha256"]) == (tokenizer.n_vocab, tokenizer.digest)
    shown = run("tokenizer", "inspect", out, "--text", "the")
    assert shown.code == 0 and "decodes to the same text" in shown.out
    again = run("tokenizer", "train", tmp_path / "a.txt", "--kind", kind, "--out", out)
    assert again.code == 2 and "exists already" in again.error


def test_tokenizer_inspect_refuses_what_is_none(run: Any, tmp_path: Path) -> None:
    done = run("tokenizer", "inspect", tmp_path)
    assert done.code == 2 and "no tokenizer here" in done.error
    (tmp_path / "a.txt").write_text("abc")
    run("tokenizer", "train", tmp_path / "a.txt", "--kind", "char", "--out", tmp_path / "tok")
    done = run("tokenizer", "inspect", tmp_path / "tok", "--text", "abz")
    assert done.code == 2 and "character 'z' (U+007A) at position 2" in done.error
