"""Preparation: the same shards from any number of processes, nothing half-made, damage named."""

import errno
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt.common.config import DataConfig
from mlxgpt.common.data import prepare, shards
from mlxgpt.common.data.corpus import Corpus, Scan, open_corpus
from mlxgpt.common.data.shards import open_split, read_index, verify
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.tokenizers.load import load_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog; caf\u00e9 \u4f60\u597d 12 times\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_rows(path: Path, count: int = 400) -> list[str]:
    rows = [f"{WORDS[i % 30 :]} {i}" * (i % 7 + 1) for i in range(count)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return rows


def quiet(_: str) -> None:
    pass


def made(source: Path, out: Path, **settings: Any) -> Path:
    data = DataConfig(**({"source": str(source), "vocab_size": 300, "workers": 1} | settings))
    tokenizer = None if data.tokenizer in ("char", "bpe", "sp-bpe", "sp-unigram") else load_tokenizer(data.tokenizer)
    prepare.prepare(open_corpus(data.source, data.text_key), data, out, tokenizer, quiet)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def everything(folder: Path, name: str) -> list[int]:
    tokens = open_split(folder, read_index(folder), name)
    return tokens.read(0, len(tokens)).tolist()


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl")
    monkeypatch.setattr(prepare, "ALONE", 0)
    monkeypatch.setattr(prepare, "GROUP", 3000)
    monkeypatch.setattr(prepare, "SHARD", 1000)
    one = contents(made(tmp_path / "a.jsonl", tmp_path / "one", workers=1))
    three = contents(made(tmp_path / "a.jsonl", tmp_path / "three", workers=3))
    assert one == three
    assert len([name for name in one if name.startswith("train-")]) > 3


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-bpe", "sp-unigram"])
def test_shards_hold_the_documents_with_eos_between(tmp_path: Path, kind: str) -> None:
    rows = write_rows(tmp_path / "a.jsonl", 60)
    folder = made(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=kind, vocab_size=400)
    tokenizer, index = load_tokenizer(folder / "tokenizer"), read_index(folder)
    found = []
    for name in ("train", "val"):
        ids, documents = everything(folder, name), []
        if tokenizer.eos_id is None:
            documents = [tokenizer.decode(ids)]
        else:
            assert ids[-1] == tokenizer.eos_id
            while ids:
                end = ids.index(tokenizer.eos_id)
                documents.append(tokenizer.decode(ids[:end]))
                ids = ids[end + 1 :]
            assert index["splits"][name]["documents"] == len(documents)
        assert index["splits"][name]["bytes"] == sum(len(d.encode()) for d in documents)
        found += documents
    assert sorted(found) == sorted(rows) if kind != "char" else sorted("".join(found)) == sorted("".join(rows))
    assert (index["vocab_size"], index["tokenizer"]["digest"]) == (tokenizer.n_vocab, tokenizer.digest)


def test_one_text_is_cut_without_eos(tmp_path: Path) -> None:
    text = WORDS * 50
    (tmp_path / "a.txt").write_text(text)
    folder = made(tmp_path / "a.txt", tmp_path / "out")
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert tokenizer.decode(everything(folder, "train")) == text[: int(0.9 * len(text))]
    assert tokenizer.decode(everything(folder, "val")) == text[int(0.9 * len(text)) :]


def test_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    ids = np.array([0, 65535, 65536, 70000])
    for dtype, given in (("<u2", ids[:2]), ("<u4", ids)):
        writer = shards.ShardWriter(tmp_path, "train", np.dtype(dtype), shard=3)
        writer.write(given)
        writer.finish()
        parts = [shards.Part(tmp_path / s["file"], 0, s["tokens"]) for s in writer.shards]
        assert shards.Tokens(parts, np.dtype(dtype)).read(0, len(given)).tolist() == given.tolist()


def test_cache_is_used_while_documents_and_tokenizer_are_the_same(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    data = DataConfig(source=str(tmp_path / "a.jsonl"), vocab_size=300)
    said: list[str] = []
    folder = prepare.cached(data, said.append)
    assert any("prepared" in line for line in said)
    said.clear()
    assert prepare.cached(data, said.append) == folder and not said
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    again = prepare.cached(DataConfig(source=str(tmp_path / "b.jsonl"), vocab_size=300), quiet)
    assert contents(again)["train-00000.bin"] == contents(folder)["train-00000.bin"]
    others = [
        DataConfig(source=str(tmp_path / "b.jsonl"), vocab_size=301),
        DataConfig(source=str(tmp_path / "b.jsonl"), vocab_size=300, val_fraction=0.2),
        DataConfig(source=str(tmp_path / "b.jsonl"), tokenizer="char"),
        DataConfig(source=str(tmp_path / "b.jsonl"), tokenizer=str(folder / "tokenizer")),
    ]
    assert len({prepare.cached(other, quiet) for other in others} | {again}) == 5
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('\n{"text": "one more"}')
    assert prepare.cached(DataConfig(source=str(tmp_path / "b.jsonl"), vocab_size=300), quiet) != again


def test_unknown_character_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 100)
    tokenizer = made(tmp_path / "a.txt", tmp_path / "first", tokenizer="char") / "tokenizer"
    (tmp_path / "b.jsonl").write_text('{"text": "abc"}\n{"text": "ab\u00e9"}\n')
    with pytest.raises(UserError, match=r"b.jsonl row 2: character '\u00e9' \(U\+00E9\) at position 2"):
        made(tmp_path / "b.jsonl", tmp_path / "second", tokenizer=str(tokenizer))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.jsonl", "first"]


def test_no_space_left_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl")

    def full(self: shards.ShardWriter, ids: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.ShardWriter, "write", full)
    with pytest.raises(UserError, match="out: no space left"):
        made(tmp_path / "a.jsonl", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh " * 100_000)
    code = f"""
import resource, signal, sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from mlxgpt.common.errors import UserError
from tests.test_prepare import made
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    made(Path({str(tmp_path)!r}) / "a.txt", Path({str(tmp_path)!r}) / "out", tokenizer="char")
except UserError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "refused:" in done.stdout and "no space left" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_killed_preparation_is_never_mistaken_for_a_complete_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 200)
    code = f"""
import sys, time
from collections.abc import Callable
from pathlib import Path
from typing import Any
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from mlxgpt.common.data import prepare
from tests.test_prepare import made
prepare.ALONE, prepare.GROUP = 0, 2000
def stop(*_):
    print("here", flush=True)
    time.sleep(60)
prepare.write_index = stop
made(Path({str(tmp_path)!r}) / "a.jsonl", Path({str(tmp_path)!r}) / "out", workers=2)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    left = [p for p in tmp_path.iterdir() if ".tmp-" in p.name]
    assert len(left) == 1 and not (tmp_path / "out").exists()
    made(tmp_path / "a.jsonl", tmp_path / "out")
    assert not left[0].exists(), "what the killed one left is swept away"
    assert verify(tmp_path / "out", read_index(tmp_path / "out")) >= 0


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 50)
    tokenizer = made(tmp_path / "a.jsonl", tmp_path / "out") / "tokenizer"
    code = f"""
import sys, time
from collections.abc import Callable
from pathlib import Path
from typing import Any
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from mlxgpt.common.tokenizers.parallel import encode_in_order
from mlxgpt.common.tokenizers.load import load_tokenizer
folder = Path({str(tokenizer)!r})
for ids in encode_in_order(load_tokenizer(folder), folder, (["abc"] for _ in range(100)), 2):
    print("here", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "here\n"
        assert len(workers_of(tokenizer)) == 2
        process.kill()
    deadline = time.monotonic() + 10
    while workers_of(tokenizer) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers_of(tokenizer)


def workers_of(tokenizer: Path) -> list[str]:
    listed = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f"-m mlxgpt.common.tokenizers.parallel {tokenizer}" in line]


def test_a_worker_that_dies_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl")
    monkeypatch.setattr(prepare, "ALONE", 0)
    monkeypatch.setenv("PYTHONHASHSEED", "nonsense")  # a Python with this does not start
    with pytest.raises(RunError, match="a tokenizing process ended with status 1"):
        made(tmp_path / "a.jsonl", tmp_path / "out", workers=2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl", 20)
    real = prepare.corpora.scan

    def scan_then_change(corpus: Corpus) -> Scan:
        scanned = real(corpus)
        write_rows(tmp_path / "a.jsonl", 21)
        return scanned

    monkeypatch.setattr(prepare.corpora, "scan", scan_then_change)
    with pytest.raises(RunError, match="changed while it was read"):
        made(tmp_path / "a.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    folder = made(tmp_path / "a.jsonl", tmp_path / "out")
    index, path = read_index(folder), folder / "train-00000.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    with pytest.raises(UserError, match=rf"train-00000.bin: {len(good) - 2} bytes: expected {len(good)}"):
        verify(folder, index)
    path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    expected = index["splits"]["train"]["shards"][0]["sha256"][:16]
    with pytest.raises(UserError, match=rf"train-00000.bin: sha256 [0-9a-f]{{16}}.*expected {expected}"):
        verify(folder, index)
    path.unlink()
    with pytest.raises(UserError, match="train-00000.bin: missing"):
        verify(folder, index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:200], "not an index of shards"),
        (lambda text: text.replace('"vocab_size": 300', '"vocab_size": 301'), "the index was changed"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2: this version reads format 1"),
        (lambda text: "[]", "not an index of shards"),
    ],
)
def test_damaged_index_is_named(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    write_rows(tmp_path / "a.jsonl")
    path = made(tmp_path / "a.jsonl", tmp_path / "out") / "index.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=f"index.json.*{message}"):
        read_index(tmp_path / "out")


def test_tokenizer_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab " * 900 + "zq " * 100)
    folder = made(tmp_path / "a.txt", tmp_path / "out", vocab_size=262)
    pieces = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["merges"]
    assert not any("z" in "".join(pair) for pair in pieces)


def test_large_corpora_train_the_tokenizer_on_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl")
    monkeypatch.setitem(prepare.TRAINING, "bpe", 20_000)
    said: list[str] = []
    data = DataConfig(source=str(tmp_path / "a.jsonl"), vocab_size=300)
    corpus = open_corpus(data.source)
    prepare.prepare(corpus, data, tmp_path / "out", None, said.append)
    assert any(re.search(r"of 300 tokens on \d+.\d% of the corpus, chosen by hash", line) for line in said)
