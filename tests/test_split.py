"""Which text validates: by hash, by cuts inside documents, with a gap; and what is said of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mlxgpt.common.config import DataConfig, TrainConfig
from mlxgpt.common.data import corpus as corpora
from mlxgpt.common.data.corpus import Piece, open_corpus, scan
from mlxgpt.common.data.inspect import inspect_shards
from mlxgpt.common.data.split import FEW, cross_entropy, split
from mlxgpt.common.data.token_source import TokenSource, open_data


def splits(source: Path, val_fraction: float) -> dict[str, list[Piece]]:
    corpus = open_corpus(str(source))
    found: dict[str, list[Piece]] = {"train": [], "val": []}
    for name, piece in split(corpus.read(), scan(corpus), val_fraction):
        found[name].append(piece)
    return found


def test_one_long_document_is_cut_as_nanogpt_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 100)
    text = "".join(f"\u00e9 word {i}\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    for fraction in (0.1, 0.25, 0.999):
        found = splits(tmp_path / "a.txt", fraction)
        place = int((1 - fraction) * len(text))
        assert "".join(piece.text for piece in found["train"]) == text[:place]
        assert "".join(piece.text for piece in found["val"]) == text[place:]
        assert sum(piece.first for piece in found["val"]) == 1
        assert not any(piece.last for piece in found["train"])


def test_documents_are_split_by_their_hash(tmp_path: Path) -> None:
    rows = [f"document {i}" for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in [*rows[::-1], rows[0], "new"]))
    one, two = splits(tmp_path / "a.jsonl", 0.1), splits(tmp_path / "b.jsonl", 0.1)
    assert 150 < len(one["val"]) < 250
    # Another order, a copy and a new document move nothing to the other side.
    assert {p.text for p in one["val"]} == {p.text for p in two["val"]} - {"new"}
    assert not {p.text for p in two["val"]} & {p.text for p in two["train"]}


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_few_documents_leave_no_split_empty(tmp_path: Path, fraction: float) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    found = splits(tmp_path, fraction)
    assert [len(found["train"]), len(found["val"])] == [2, 1]


def lines(name: str, count: int) -> str:
    return "".join(f"{name} line {i} of a text\n" for i in range(count))


def texts(found: list[Piece]) -> dict[str, str]:
    whole: dict[str, str] = {}
    for piece in found:
        whole[Path(piece.name).name] = whole.get(Path(piece.name).name, "") + piece.text
    return whole


def test_few_documents_are_each_cut_at_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE", 300)
    documents = {f"{name}.txt": lines(name, 100 * (i + 1)) for i, name in enumerate("abc")}
    documents["d.txt"] = "word " * 1000  # no line ends: at a word
    documents["e.txt"] = "x" * 3000  # neither
    documents["short.txt"] = "too short to cut"
    for name, text in documents.items():
        (tmp_path / name).write_text(text)
    found = splits(tmp_path, 0.1)
    train, val = texts(found["train"]), texts(found["val"])
    assert set(val) == set(documents) - {"short.txt"} or set(train) == set(documents) - {"short.txt"}
    for name in ("a.txt", "b.txt", "c.txt", "d.txt", "e.txt"):
        assert train[name] + val[name] == documents[name]
        assert 0.05 < len(val[name]) / len(documents[name]) < 0.2
    assert all(train[name].endswith("\n") for name in ("a.txt", "b.txt", "c.txt"))
    assert val["d.txt"].startswith(" word")
    assert len(train["e.txt"]) == 2700
    for side in ("train", "val"):  # each part begins and ends as a document does
        assert sum(piece.first for piece in found[side]) == sum(piece.last for piece in found[side])
        assert len(texts(found[side])) == sum(piece.first for piece in found[side])
        assert all(piece.cut for piece in found[side] if "short" not in piece.name)


def test_from_a_hundred_documents_only_one_above_the_validation_text_is_cut(tmp_path: Path) -> None:
    rows = [lines(f"row {i}", 60) for i in range(FEW)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    assert not any(piece.cut for side in splits(tmp_path, 0.1).values() for piece in side)
    (tmp_path / "long.txt").write_text(lines("long", 3000))
    found = splits(tmp_path, 0.1)
    assert {Path(piece.name).name for side in found.values() for piece in side if piece.cut} == {"long.txt"}
    assert {piece.cut for piece in found["val"]} == {True, False}


def test_copies_validate_at_the_same_place(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(lines("same", 200))
    found = splits(tmp_path, 0.1)
    assert len({piece.text for piece in found["val"]}) == len({piece.text for piece in found["train"]}) == 1


def prepared(folder: Path, block: int) -> tuple[TokenSource, list[str]]:
    said: list[str] = []
    data = DataConfig(source=str(folder), tokenizer="char")
    found, _ = open_data(data, block, TrainConfig(batch_size=2), say=said.append)
    return found, said


def test_training_stops_a_block_before_what_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    documents = {name: lines(name, 200) for name in "abc"}
    for name, text in documents.items():
        (folder / f"{name}.txt").write_text(text)
    found, said = prepared(folder, 64)
    whole, _ = prepared(folder, 8)
    parts = texts(splits(folder, 0.1)["train"])
    expected = "".join(parts[f"{name}.txt"][:-64] for name in documents)
    tokenizer = open_data(DataConfig(source=str(folder), tokenizer="char"), 64, TrainConfig())[1]
    assert tokenizer is not None
    train = found._train.read(0, found.n_train_tokens)
    assert tokenizer.decode(train.tolist()) == expected
    assert whole.n_train_tokens - found.n_train_tokens == 3 * (64 - 8)
    assert whole.n_val_tokens == found.n_val_tokens
    # A part that validates and is shorter than the gap takes only its own length from training.
    short, _ = prepared(folder, 700)
    assert short.n_train_tokens + 2 * short.n_val_tokens == sum(map(len, documents.values()))
    assert "the ends of 3 of 3 documents, a gap of up to 64 tokens before each" in said[-2]


def test_the_distance_of_the_two_is_said_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(lines(name, 50 if name < "c" else 200) + lines("other", 20))
    found, said = prepared(folder, 16)
    held = found.statistics["held_out"]
    assert held["longest"]["document"].endswith("c.txt") and 0.5 < held["longest"]["share"] < 0.7
    assert held["share"] == found.n_val_tokens / (found.n_val_tokens + found.n_train_tokens + 3 * 16)
    unigram = held["unigram"]
    assert unigram["val"]["other"] > unigram["val"]["own"] and unigram["train"]["other"] > unigram["train"]["own"]
    assert f"{unigram['val']['other']:.2f} from the training text's counts" in said[-1]
    assert inspect_shards(found.folder)["held_out"] == held
    assert inspect_shards(found.folder)["documents"] == 3


def test_cross_entropy_is_witten_bells() -> None:
    counts, under = np.array([3, 1, 0, 0]), np.array([2, 0, 2, 0])
    p = (np.array([2, 0, 2, 0]) + 2 / 4) / (4 + 2)
    assert math.isclose(p.sum(), 1)
    assert math.isclose(cross_entropy(counts, under), -(3 * math.log(p[0]) + math.log(p[1])) / 4)
