"""Batches: pure functions of (seed, step), each token where it belongs, damage and short splits refused."""

import json
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt.common.batch import Source
from mlxgpt.common.config import DataConfig, TrainConfig
from mlxgpt.common.data.shards import Part, Tokens
from mlxgpt.common.data.token_source import TokenSource, open_data, permuted, windows
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.load import load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quiet(_: str) -> None:
    pass


def counting(folder: Path, count: int, name: str, files: int = 3) -> Tokens:
    """0, 1, 2, ... over several files, so that a token tells its position."""
    parts = []
    for i, piece in enumerate(np.array_split(np.arange(count), files)):
        path = folder / f"{name}{i}.bin"
        path.write_bytes(piece.astype("<u4").tobytes())
        parts.append(Part(path, 0, len(piece)))
    return Tokens(parts, np.dtype("<u4"))


def source(
    folder: Path, train: int = 1000, val: int = 103, block: int = 8, sampling: str = "random", **settings: Any
) -> TokenSource:
    given: dict[str, Any] = {"batch_size": 4, "seed": 3} | settings
    config = TrainConfig(**given)
    return TokenSource(counting(folder, train, "t"), counting(folder, val, "v"), block, config, sampling)


def test_reading_crosses_files(tmp_path: Path) -> None:
    tokens = counting(tmp_path, 100, "x", files=9)
    for start, count in ((0, 100), (10, 3), (9, 30), (99, 1), (50, 0)):
        assert tokens.read(start, count).tolist() == list(range(start, start + count))
    assert np.concatenate(list(tokens.blocks(7))).tolist() == list(range(100))
    assert tokens[90:200].tolist() == list(range(90, 100))


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path, sampling: str) -> None:
    data = source(tmp_path, sampling=sampling)
    for step in (5, 1, 900):
        first = data.batch(step)
        again = source(tmp_path, sampling=sampling).batch(step)
        assert np.array_equal(first.tokens, again.tokens)
        assert np.array_equal(first.targets, first.tokens + 1)
        assert np.array_equal(np.diff(first.tokens), np.ones((4, 7)))
        assert first.tokens.dtype == first.targets.dtype == np.int32 and first.weight == 32
        assert first.row_ids == tuple(f"train token {row[0]}" for row in first.tokens)
    assert not np.array_equal(data.batch(1).tokens, data.batch(2).tokens)
    assert not np.array_equal(data.batch(1).tokens, source(tmp_path, sampling=sampling, seed=4).batch(1).tokens)


def test_rows_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    whole, small = source(tmp_path).batch(7), source(tmp_path, micro_batch_size=1).batch(7)
    assert np.array_equal(whole.tokens, small.tokens)


def test_random_reaches_both_ends(tmp_path: Path) -> None:
    data = source(tmp_path, train=12, val=9)
    starts = {int(row[0]) for step in range(1, 60) for row in data.batch(step).tokens}
    assert starts == {0, 1, 2, 3}


def test_an_epoch_has_every_window_once(tmp_path: Path) -> None:
    data = source(tmp_path, train=8 * 30 + 5, sampling="epoch", batch_size=7)
    rows = np.concatenate([data.batch(step).tokens[:, 0] for step in range(1, 31)])
    epochs = rows.reshape(7, 30) // 8
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 7


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000])
def test_permuted_is_a_permutation(count: int) -> None:
    assert sorted(permuted(1, 0, i, count) for i in range(count)) == list(range(count))


def test_permuted_is_even() -> None:
    """Where windows 0 and 1 of 12 land over 3000 epochs: chi-squared stays below its 0.999 quantile."""
    landed = Counter(permuted(5, epoch, 0, 12) for epoch in range(3000))
    follower = Counter((permuted(5, epoch, 1, 12) - permuted(5, epoch, 0, 12)) % 12 for epoch in range(3000))
    assert sum((landed[i] - 250) ** 2 / 250 for i in range(12)) < 31.3
    assert sum((follower[i] - 3000 / 11) ** 2 / (3000 / 11) for i in range(1, 12)) < 29.6


def scored(batches: list) -> list[tuple[int, int]]:
    """(context's last token, target) of every weighted position."""
    found = []
    for batch in batches:
        assert set(np.unique(batch.weights)) <= {0.0, 1.0}
        keep = batch.weights == 1
        found += list(zip(batch.tokens[keep].tolist(), batch.targets[keep].tolist(), strict=True))
    return found


@pytest.mark.parametrize("val", [9, 10, 32, 33, 34, 103, 129])
def test_validation_scores_every_token_once(tmp_path: Path, val: int) -> None:
    data = source(tmp_path, val=val)
    batches = list(data.validation())
    assert scored(batches) == [(i, i + 1) for i in range(val - 1)]
    assert {batch.tokens.shape for batch in batches} == {(4, 8)}


def test_few_validation_batches_are_spread_evenly(tmp_path: Path) -> None:
    data = source(tmp_path, val=8 * 4 * 10 + 1, eval_batches=5)
    assert [int(batch.tokens[0, 0]) // 32 for batch in data.validation()] == [0, 2, 4, 6, 8]
    assert len(list(source(tmp_path, val=33, eval_batches=5).validation())) == 1


@pytest.mark.parametrize("count", [2, 8, 9, 10, 31, 100])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_windows_score_every_token_once(tmp_path: Path, count: int, stride: int | None) -> None:
    batches = list(windows(np.arange(count), 8, 3, stride))
    assert sorted(scored(batches)) == [(i, i + 1) for i in range(count - 1)]
    for batch in batches:
        for tokens, weights in zip(batch.tokens, batch.weights, strict=True):
            # A target has at least block - stride tokens of context, unless the text starts later.
            places = np.flatnonzero(weights)
            if len(places) and tokens[0] > 0:
                assert places[0] == 8 - (stride or 8)
    same = list(windows(counting(tmp_path, count, "w"), 8, 3, stride))
    assert all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.weights, b.weights)
        for a, b in zip(batches, same, strict=True)
    )


def test_windows_refuse_what_cannot_be_scored() -> None:
    for tokens, stride, message in (([1], None, "at least 2"), ([1, 2, 3], 0, "stride 0"), ([1, 2, 3], 9, "stride 9")):
        with pytest.raises(UserError, match=message):
            list(windows(np.array(tokens), 8, 3, stride))


def corpus(folder: Path, count: int = 300) -> Path:
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the {i} quick brown fox\n" * 3}) for i in range(count)))
    return path


def test_open_data_gives_a_source_and_its_tokenizer(tmp_path: Path) -> None:
    config = DataConfig(source=str(corpus(tmp_path)), vocab_size=300)
    data, tokenizer = open_data(config, 16, TrainConfig(batch_size=2), say=quiet)
    typed: Source = data
    assert tokenizer and tokenizer.n_vocab == data.vocab_size <= 300
    assert "brown" in tokenizer.decode(typed.batch(1).tokens.ravel().tolist())
    assert set(data.digest) == {"train-00000.bin", "val-00000.bin", "tokenizer"}
    assert sum(batch.weight for batch in data.validation()) == data.n_val_tokens - 1
    assert data.largest < data.vocab_size


def test_digest_is_that_of_the_content_not_of_the_path(tmp_path: Path) -> None:
    config = DataConfig(source=str(corpus(tmp_path)), vocab_size=300)
    first, _ = open_data(config, 16, TrainConfig(), say=quiet)
    moved = tmp_path / "moved"
    first.folder.rename(moved)
    second, tokenizer = open_data(DataConfig(source=str(moved)), 16, TrainConfig(), say=quiet)
    assert first.digest == second.digest and tokenizer
    run = tmp_path / "run"
    run.mkdir()
    moved.rename(run / "data")
    third, _ = open_data(DataConfig(source="nowhere.txt"), 16, TrainConfig(), run, quiet)
    assert third.digest == first.digest
    with pytest.raises(UserError, match="were made with another tokenizer"):
        load_tokenizer(run / "data" / "tokenizer").save(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        open_data(DataConfig(source=str(run / "data"), tokenizer=str(tmp_path)), 16, TrainConfig(), say=quiet)


def test_corrupted_cache_is_refused_and_says_how_to_mend(tmp_path: Path) -> None:
    config = DataConfig(source=str(corpus(tmp_path)), vocab_size=300)
    data, _ = open_data(config, 16, TrainConfig(), say=quiet)
    path = data.folder / "val-00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"val-00000.bin: sha256 .*expected .*remove .* to have it made again"):
        open_data(config, 16, TrainConfig(), say=quiet)


@pytest.mark.parametrize(("block", "which"), [(300, "validation split"), (5000, "validation split")])
def test_short_split_is_refused(tmp_path: Path, block: int, which: str) -> None:
    config = DataConfig(source=str(corpus(tmp_path, 30)), vocab_size=300)
    with pytest.raises(UserError, match=rf"{which}: \d+ tokens: expected at least model.block_size \+ 1 = {block + 1}"):
        open_data(config, block, TrainConfig(), say=quiet)


# nanoGPT's flat files


def flat(folder: Path, name: str, ids: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(ids.astype("<u2").tobytes())
    return folder / name


@pytest.mark.parametrize("as_folder", [True, False])
def test_flat_files_are_read_as_they_are(tmp_path: Path, as_folder: bool) -> None:
    train = flat(tmp_path / "d", "train.bin", np.arange(500) % 65)
    flat(tmp_path / "d", "val.bin", np.arange(100) % 60)
    (tmp_path / "d" / "meta.pkl").write_bytes(b"not read unless named")
    said: list[str] = []
    path = train.parent if as_folder else train
    data, tokenizer = open_data(DataConfig(source=str(path)), 8, TrainConfig(), say=said.append)
    assert tokenizer is None and (data.n_train_tokens, data.n_val_tokens) == (500, 100)
    assert (data.largest, data.vocab_size) == (64, 65)
    assert next(data.validation()).tokens[0].tolist() == list(range(8))
    assert "samples print ids unless data.tokenizer=" in said[0] and "meta.pkl is read" in said[0]
    assert set(data.digest) == {"train.bin", "val.bin"}


def test_flat_file_alone_is_cut(tmp_path: Path) -> None:
    path = flat(tmp_path, "tokens.bin", np.arange(1000))
    said: list[str] = []
    data, _ = open_data(DataConfig(source=str(path), val_fraction=0.2), 8, TrainConfig(), say=said.append)
    assert (data.n_train_tokens, data.n_val_tokens) == (800, 200)
    assert next(data.validation()).tokens[0, 0] == 800
    assert "its last 20% validate" in said[1]


@pytest.mark.parametrize("content", [b"", b"\1\0\2"])
def test_flat_file_cut_off_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"train.bin: {len(content)} bytes: expected uint16 tokens"):
        open_data(DataConfig(source=str(tmp_path)), 8, TrainConfig(), say=quiet)


def test_flat_file_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    data, _ = open_data(DataConfig(source=str(corpus(tmp_path)), vocab_size=300), 16, TrainConfig(), say=quiet)
    path = flat(tmp_path, "train.bin", np.array([5, 40_000] * 500))
    config = DataConfig(source=str(path), tokenizer=str(data.folder / "tokenizer"))
    with pytest.raises(UserError, match="token 40000: expected ids below the"):
        open_data(config, 8, TrainConfig(), say=quiet)
    with pytest.raises(UserError, match="no such file"):
        open_data(DataConfig(source=str(tmp_path / "none.bin")), 8, TrainConfig(), say=quiet)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        for i in range(50):
            file.write((np.arange(1 << 20) % (i + 100)).astype("<u2").tobytes())  # 100 MB in all
    unit = 1 if __import__("sys").platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    data, _ = open_data(DataConfig(source=str(path), sampling="epoch"), 64, TrainConfig(), say=quiet)
    for step in range(1, 200):
        data.batch(step)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 40 << 20
