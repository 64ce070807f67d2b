"""eval: every token scored once, the loss against a slow reference, bits per byte by hand, and what is refused."""

import json
import math
from pathlib import Path

import mlxgpt.generate as mlx_generate  # first: it loads a BLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny, weights

import torch_ref.generate as torch_generate
from mlxgpt import cli
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.data import shards
from mlxgpt.common.data.token_source import windows
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.evaluate.score import evaluate
from mlxgpt.common.evaluate.text import Text, open_text
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.tokenizers.beginning import with_separator
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.model import Model as MlxModel
from torch_ref.model import Model as TorchModel

TEXT = "caf\u00e9 \u65e5\u672c \U0001f600 the cat sat on the mat, the end. " * 12


def quiet(progress: str) -> None:
    """No progress."""


def scorer(backend: str, config: ModelConfig):
    arrays = weights(config, scale=6.0)
    if backend == "mlx":
        model = MlxModel(config)
        model.load_weights([(name, mx.array(value)) for name, value in arrays.items()])
        return lambda tokens, targets, positions=None: mlx_generate.score(model, tokens, targets)
    model = TorchModel(config)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return lambda tokens, targets, positions=None: torch_generate.score(model, tokens, targets)


# ---- every token once


@given(st.integers(2, 60), st.integers(1, 9), st.data(), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_every_token_but_the_first_is_scored_once_with_the_context_promised(count, block, data, rows) -> None:
    stride = data.draw(st.integers(1, block))
    times = np.zeros(count, dtype=int)
    for batch in windows(np.arange(count), block, rows, stride):
        assert len(batch.tokens) <= rows
        for inputs, targets, scored in zip(batch.tokens, batch.targets, batch.weights, strict=True):
            for place in np.flatnonzero(scored):
                times[targets[place]] += 1
                # tokens are their own positions: what is read before a target is what stands before it in the text
                assert inputs[: place + 1].tolist() == list(range(targets[place] - place - 1, targets[place]))
                assert place + 1 >= min(block - stride + 1, targets[place])
    assert times.tolist() == [0] + [1] * (count - 1)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("family, stride", [("gpt2", 8), ("llama", 3), ("qwen3", 1)])
def test_strided_loss_is_the_slow_reference(backend: str, family: str, stride: int) -> None:
    """One forward pass a token, of exactly the tokens in its window, the softmax in float64."""
    config = tiny(family=family, block_size=8)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 31).astype(np.int32)
    model = TorchModel(config).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights(config, scale=6.0).items()})
    expected = 0.0
    for target in range(1, len(tokens)):
        start = max(0, math.ceil((target - 8) / stride)) * stride
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None, start:target]))[0, -1].double()
        expected -= float(torch.log_softmax(logits, dim=-1)[int(tokens[target])])
    found = evaluate(scorer(backend, config), Text("t", tokens, 100), config.vocab_size, 8, stride, quiet)
    assert found.tokens == len(tokens) - 1
    assert found.loss_sum == pytest.approx(expected, rel=1e-5)
    # a window that forgets its context would be seen
    forgetful = evaluate(scorer(backend, config), Text("t", tokens, 100), config.vocab_size, 4, 4, quiet)
    assert abs(forgetful.loss_sum - expected) > 1e-3 * expected


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_scoring_the_head_in_pieces_changes_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(family="llama")
    tokens = np.random.default_rng(1).integers(0, 80, (2, 33)).astype(np.int32)
    whole = scorer(backend, config)(tokens[:, :-1], tokens[:, 1:])
    for module in (mlx_generate, torch_generate):
        monkeypatch.setattr(module, "HEAD", 5)
    pieces = scorer(backend, config)(tokens[:, :-1], tokens[:, 1:])
    assert whole.shape == (2, 32) and np.allclose(whole, pieces, rtol=1e-5, atol=1e-6)


# ---- bits per byte


def uniform(vocab: int):
    """A model that knows nothing: log V nats a token."""
    return lambda tokens, targets, positions: np.full(tokens.shape, math.log(vocab), dtype=np.float32)


def without_eos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.eos_id = None
    return tokenizer


def test_bits_per_byte_by_hand(tmp_path: Path) -> None:
    text = "\u00e9a\u65e5\U0001f600b"  # 2 + 1 + 3 + 4 + 1 bytes
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer("char", [text], 0)
    given_eos = open_text(str(tmp_path / "t.txt"), tokenizer, "text", "val")
    assert tokenizer.eos_id is None or given_eos.size == 11
    plain = open_text(str(tmp_path / "t.txt"), without_eos(tokenizer), "text", "val")
    assert len(plain.tokens) == 5 and plain.size == 9  # the first character is given, not scored
    result = evaluate(uniform(7), plain, 1000, 3, 3, quiet)
    assert result.tokens == 4
    assert result.loss == pytest.approx(math.log(7), rel=1e-6) and result.perplexity == pytest.approx(7, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(4 * math.log2(7) / 9, rel=1e-6)


def test_documents_are_separated_and_every_byte_counts(tmp_path: Path) -> None:
    documents = ["the cat", "", "caf\u00e9 on the mat", "the end."]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": document}) + "\n" for document in documents))
    tokenizer = train_tokenizer("bpe", [TEXT], 290)
    assert tokenizer.eos_id is not None
    text = open_text(str(path), tokenizer, "body", "val")
    expected: list[int] = []
    for document in filter(None, documents):
        expected += [tokenizer.eos_id, *tokenizer.encode(document)]
    size = sum(len(document.encode()) for document in documents)
    first = tokenizer.decode(expected[1:2])
    assert text.tokens[:].tolist() == expected[1:]  # the first text begins with nothing: its first token is given
    assert text.size == size - len(first) and first.isascii()
    begun = open_text(str(path), with_separator(tokenizer), "body", "val")
    assert begun.tokens[:].tolist() == expected and begun.size == size


def write_shards(folder: Path, tokenizer: Tokenizer, text: str) -> None:
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    ids = tokenizer.encode_batch([text])[0]
    splits = {}
    for name, part in (("train", ids[:10]), ("val", ids)):
        writer = shards.ShardWriter(folder, name, np.dtype("<u2"), shard=50)
        writer.write(part)
        writer.finish()
        size = len(tokenizer.decode(part.tolist()).encode())
        splits[name] = {"documents": 1, "tokens": len(part), "bytes": size, "shards": writer.shards}
    about = {"kind": tokenizer.kind, "digest": tokenizer.digest}
    index = {"format": 1, "dtype": "uint16", "vocab_size": tokenizer.n_vocab, "eos_id": tokenizer.eos_id}
    shards.write_index(folder, {**index, "tokenizer": about, "source": {}, "splits": splits})


def test_text_shards_and_flat_file_of_the_same_tokens_agree(tmp_path: Path) -> None:
    tokenizer = without_eos(train_tokenizer("bpe", [TEXT], 290))
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    write_shards(tmp_path / "shards", tokenizer, TEXT)
    (tmp_path / "flat").mkdir()
    ids = tokenizer.encode_batch([TEXT])[0].astype("<u2")
    ids.tofile(tmp_path / "flat" / "val.bin")
    places = ["t.txt", "shards", "flat", "flat/val.bin"]
    texts = [open_text(str(tmp_path / place), tokenizer, "text", "val") for place in places]
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab)
    results = [evaluate(scorer("mlx", config), text, config.vocab_size, 32, 16, quiet) for text in texts]
    assert len(ids) > 100 and results[0].tokens == len(ids) - 1
    assert results[0].size == len(TEXT.encode()) - len(tokenizer.decode(ids[:1].tolist()).encode())
    assert results == [results[0]] * 4
    assert len(open_text(str(tmp_path / "shards"), tokenizer, "text", "train").tokens) == 10
    # without a tokenizer the shards still have a loss, and no bits per byte
    assert open_text(str(tmp_path / "flat"), None, "text", "val").size is None


# ---- errors


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("bpe", [TEXT], 290)
    other = train_tokenizer("bpe", [TEXT + "another text " * 30], 280)
    write_shards(tmp_path / "shards", tokenizer, TEXT)
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "large.bin").write_bytes(b"\xff\xff" * 4)
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    for place, known, message in [
        ("shards", other, "shards of a tokenizer with sha256"),
        ("odd.bin", tokenizer, "3 bytes; expected uint16 tokens"),
        ("empty.txt", tokenizer, "empty"),
        ("large.bin", tokenizer, "token id 65535; expected below"),
        ("t.txt", None, "text needs a tokenizer"),
        ("t.txt", train_tokenizer("char", ["the cat"], 0), "character"),
        ("none.txt", tokenizer, "no such file"),
        ("none.bin", tokenizer, "no such file"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_text(str(tmp_path / place), known, "text", "val")
        assert place in str(caught.value)
    with open(tmp_path / "shards" / "val-00001.bin", "r+b") as file:
        file.write(b"\x01")
    with pytest.raises(UserError, match=r"val-00001.bin: sha256"):
        open_text(str(tmp_path / "shards"), tokenizer, "text", "val")
    with pytest.raises(UserError, match="t: 1 tokens; expected at least 2"):
        evaluate(uniform(9), Text("t", np.array([3]), 1), 9, 4, 4, quiet)
    with pytest.raises(UserError, match="t: token id 9; expected below 9"):
        evaluate(uniform(9), Text("t", np.array([3, 9]), 1), 9, 4, 4, quiet)
    with pytest.raises(RunError, match="t: the loss is not finite within the first 2 tokens"):
        evaluate(lambda a, b, c: np.full(a.shape, np.nan), Text("t", np.arange(3), 1), 9, 4, 4, quiet)


# ---- the verbs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer("bpe", [TEXT], 290)
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab)
    write_model(place / "m", config, weights(config, scale=3.0))
    write_model(place / "bare", config, weights(config, scale=3.0))
    tokenizer.save(place / "m")
    (place / "t.txt").write_text(TEXT, encoding="utf-8")
    return place


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    code = cli.main([*argv, "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def test_eval_command(folder: Path, capsys: pytest.CaptureFixture) -> None:
    found = {}
    for backend in ("mlx", "torch"):
        common = ("eval", "-m", str(folder / "m"), "-d", str(folder / "t.txt"), "--backend", backend, "--stride", "8")
        code, out, err = run(capsys, *common, "--json")
        found[backend] = json.loads(out)
        assert code == 0 and err == "" and {"loss", "perplexity", "bits_per_byte", "tokens"} <= found[backend].keys()
        code, out, _ = run(capsys, *common)
        assert code == 0 and f"{found[backend]['loss']:.4f}" in out and f"{found[backend]['bits_per_byte']:.4f}" in out
    assert found["mlx"]["loss"] == pytest.approx(found["torch"]["loss"], rel=1e-6)
    first = train_tokenizer("bpe", [TEXT], 290)
    assert found["mlx"]["bytes"] == len(TEXT.encode()) - len(first.decode(first.encode(TEXT)[:1]).encode())
    assert found["mlx"]["begins_with"] == [] and "begins with    nothing" in out
    code, out, err = run(capsys, "eval", "-m", str(folder / "m"), "-d", str(folder / "t.txt"), "--stride", "33")
    assert (code, out) == (2, "") and "--stride 33: expected at most model.block_size = 32" in err


def test_generate_command(folder: Path, capsys: pytest.CaptureFixture) -> None:
    found = []
    for backend in ("mlx", "torch"):
        common = ("generate", "-m", str(folder / "m"), "-p", "the cat", "-n", "12", "--seed", "4", "--backend", backend)
        code, out, err = run(capsys, *common, "--json")
        found.append(json.loads(out))
        assert code == 0 and err == ""
        code, out, err = run(capsys, *common)
        assert code == 0 and out == found[-1]["text"] + "\n" and "12 tokens" in err and "max_tokens reached" in err
    assert found[0] == found[1]
    assert found[0]["tokens"] == len(found[0]["token_ids"]) == 12 and found[0]["prompt_tokens"] > 0
    code, out, err = run(
        capsys, "generate", "-m", str(folder / "m"), "-p", "the cat", "-n", "500", "--temperature", "0"
    )
    assert code == 0 and "the context of 32 tokens is full" in err


def test_generate_command_takes_several_prompts_and_files(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "prompt.txt").write_text("the end", encoding="utf-8")
    common = ("generate", "-m", str(folder / "m"), "-n", "5")
    code, out, _ = run(capsys, *common, "-p", "the cat", "--prompt-file", str(folder / "prompt.txt"), "--json")
    several = json.loads(out)["results"]
    alone = [json.loads(run(capsys, *common, "-p", prompt, "--json")[1]) for prompt in ("the cat", "the end")]
    assert code == 0 and several == alone
    code, out, _ = run(capsys, *common, "-p", "the cat", "-p", "the end")
    assert code == 0 and out == "".join(f"--- prompt {n + 1}\n{result['text']}\n" for n, result in enumerate(alone))
    stop = alone[0]["text"][2:4]
    code, out, _ = run(capsys, *common, "-p", "the cat", "--stop", stop, "--json")
    assert json.loads(out)["finish_reason"] == "stop" and stop not in json.loads(out)["text"]


@pytest.mark.parametrize(
    "more, message",
    [
        (("m", "-p", "the cat " * 60), "expected at most model.block_size = 32"),
        (("bare", "-p", "the cat"), "no tokenizer files"),
        (("m",), "expected --prompt TEXT or --prompt-file FILE"),
        (("m", "--prompt-file", "/nowhere"), "--prompt-file /nowhere: No such file"),
        (("m", "-p", "a", "--top-p", "0"), "sample.top_p = 0.0: expected above 0 and at most 1"),
        (("m", "-p", "a", "--stop", ""), "stop string ''"),
    ],
)
def test_generate_command_refuses_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture, more: tuple, message: str
) -> None:
    code, out, err = run(capsys, "generate", "-m", str(folder / more[0]), *more[1:])
    assert (code, out) == (2, "") and message in err and len(err.strip().splitlines()) == 1
