"""llama2.c: .bin files written here from its formats alone, against a forward pass with its rotation of pairs."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from compare import agree

import mlxgpt.load
import torch_ref.load
from convert import convert, open_model
from mlxgpt import cli
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.foreign import llama2c as llama2c_tokenizer

SIZES = dict(dim=48, hidden=72, layers=2, heads=4, kv_heads=2, vocab=288, length=24)
IDS = [1, 260, 5, 271, 280, 3, 3, 287, 262, 14]
Model = dict[str, Any]


def model(seed: int = 3, shared: bool = True, **sizes: int) -> Model:
    """Weights by llama2.c's own names, rows of q and k for the rotation of pairs."""
    s = SIZES | sizes
    draw = np.random.default_rng(seed)
    kv = s["dim"] // s["heads"] * s["kv_heads"]
    n, dim, hidden = s["layers"], s["dim"], s["hidden"]
    shapes = {"tok": (s["vocab"], dim), "att": (n, dim), "wq": (n, dim, dim), "wk": (n, kv, dim), "wv": (n, kv, dim),
              "wo": (n, dim, dim), "ffn": (n, dim), "w1": (n, hidden, dim), "w2": (n, dim, hidden),
              "w3": (n, hidden, dim), "norm": (dim,)} | ({} if shared else {"out": (s["vocab"], dim)})  # fmt: skip
    made: Model = {
        name: (draw.standard_normal(shape) / math.sqrt(shape[-1])).astype("<f4") for name, shape in shapes.items()
    }
    for name in ("att", "ffn", "norm"):
        made[name] = 1 + made[name]
    return made | {"sizes": s, "shared": shared}


def tables(s: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines as llama2.c's model.py makes them: by PyTorch."""
    half = s["dim"] // s["heads"]
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, half, 2).float() / half))
    angles = torch.outer(torch.arange(s["length"]), frequencies).float()
    return angles.cos().numpy(), angles.sin().numpy()


def header(made: Model, sign: int = 1) -> bytes:
    s = made["sizes"]
    return struct.pack("<7i", *list(s.values())[:5], sign * s["vocab"], s["length"])


def version_0(made: Model) -> bytes:
    order = ["tok", "att", "wq", "wk", "wv", "wo", "ffn", "w1", "w2", "w3", "norm"]
    parts = [made[name] for name in order] + list(tables(made["sizes"])) + ([] if made["shared"] else [made["out"]])
    return header(made, 1 if made["shared"] else -1) + b"".join(part.tobytes() for part in parts)


def version_1(made: Model) -> bytes:
    order = ["att", "ffn", "norm", "tok", "wq", "wk", "wv", "wo", "w1", "w2", "w3"] + ["out"] * (not made["shared"])
    start = struct.pack("<Ii", 0x616B3432, 1) + header(made) + bytes([made["shared"]])
    return start.ljust(256, b"\0") + b"".join(made[name].tobytes() for name in order)


def version_2(made: Model, group: int, after_all: bool = False) -> tuple[bytes, Model]:
    """The file, and the weights that it stands for; ``after_all``: scales behind all int8, as older files have them."""
    stands, quantized, scales = dict(made), [], []
    for name in ["tok", "wq", "wk", "wv", "wo", "w1", "w2", "w3"] + ["out"] * (not made["shared"]):
        layers = made[name] if made[name].ndim == 3 else made[name][None]
        found = []
        for each in layers:
            rows = each.reshape(-1, group)
            scale = (np.abs(rows).max(1) / 127).astype("<f4")
            ints = np.round(rows / scale[:, None]).astype(np.int8)
            quantized.append(ints.tobytes())
            scales.append(scale.tobytes())
            found.append((ints.astype(np.float32) * scale[:, None]).reshape(each.shape))
        stands[name] = np.stack(found).reshape(made[name].shape)
    start = struct.pack("<Ii", 0x616B3432, 2) + header(made) + bytes([made["shared"]]) + struct.pack("<i", group)
    norms = b"".join(made[name].tobytes() for name in ("att", "ffn", "norm"))
    pairs = zip(quantized, scales, strict=True)
    body = b"".join(quantized + scales) if after_all else b"".join(ints + scale for ints, scale in pairs)
    return start.ljust(256, b"\0") + norms + body, stands


def forward(made: Model, ids: list[int]) -> np.ndarray:
    """run.c's logits, (T, V), in float64: neighboring numbers of a head turn against each other."""
    s, w = (
        made["sizes"],
        {name: value.astype(np.float64) for name, value in made.items() if name not in ("sizes", "shared")},
    )
    heads, size = s["heads"], s["dim"] // s["heads"]
    turns = np.exp(1j * np.outer(np.arange(len(ids)), 10000.0 ** (-np.arange(0, size, 2) / size)))

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def turned(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(*x.shape[:2], size // 2, 2)
        found = (pairs[..., 0] + 1j * pairs[..., 1]) * turns[:, None]
        return np.stack((found.real, found.imag), -1).reshape(x.shape)

    x = w["tok"][ids]
    for n in range(s["layers"]):
        h = norm(x, w["att"][n])
        q, k, v = ((h @ w[name][n].T).reshape(len(ids), -1, size) for name in ("wq", "wk", "wv"))
        q, k = turned(q), turned(k)
        k, v = (np.repeat(each, heads // s["kv_heads"], 1) for each in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)
        scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", weights, v).reshape(len(ids), -1) @ w["wo"][n].T
        h = norm(x, w["ffn"][n])
        gate = h @ w["w1"][n].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][n].T)) @ w["w2"][n].T
    return norm(x, w["norm"]) @ w["tok" if made["shared"] else "out"].T


def logits(place: Path, framework: str) -> np.ndarray:
    """(T, V) of a folder."""
    if framework == "mlx":
        return np.array(mlxgpt.load.load(place)[0](mx.array([IDS])))[0]
    if framework == "torch":
        return torch_ref.load.load(place)[0](torch.tensor([IDS])).detach().numpy()[0]
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    return read(place)(torch.tensor([IDS])).logits.detach().numpy()[0]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_bin_is_the_model_that_run_c_runs(version: int, shared: bool, tmp_path: Path) -> None:
    made = model(shared=shared)
    data, stands = version_2(made, 12) if version == 2 else ((version_0, version_1)[version](made), made)
    (tmp_path / "m.bin").write_bytes(data)
    report = convert(tmp_path / "m.bin", tmp_path / "hf")
    assert report.source_format == "llama2c" and open_model(tmp_path / "hf").config.tied is shared
    expected = forward(stands, IDS)
    for framework in ("mlx", "torch", "transformers"):
        agree(framework, logits(tmp_path / "hf", framework), expected, 2e-6)
    if version < 2:
        convert(tmp_path / "hf", tmp_path / "back.bin", version=version)
        assert (tmp_path / "back.bin").read_bytes() == data


def test_rows_of_pairs_read_ashalves_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: q and k are left as they lie."""
    monkeypatch.setattr("convert.formats.llama2c.halves", lambda array, heads: array)
    made = model()
    (tmp_path / "m.bin").write_bytes(version_1(made))
    convert(tmp_path / "m.bin", tmp_path / "hf")
    with pytest.raises(AssertionError):
        agree("mlx", logits(tmp_path / "hf", "mlx"), forward(made, IDS), 2e-6)


def test_scales_after_all_values_are_found(tmp_path: Path) -> None:
    for after_all in (False, True):
        data, stands = version_2(model(), 16, after_all)
        (tmp_path / "m.bin").write_bytes(data)
        found = open_model(tmp_path / "m.bin").tensors
        assert np.array_equal(found["wte.weight"].read(), stands["tok"])
        assert np.array_equal(found["h.1.mlp.c_fc.weight"].read(), stands["w3"][1])


def test_tables_of_another_machine_come_back(tmp_path: Path) -> None:
    """Version 0 holds cosines as the exporting PyTorch rounded them: through folders and GGUF, byte for byte."""
    data = bytearray(version_0(model()))
    count = SIZES["length"] * SIZES["dim"] // SIZES["heads"] // 2
    cos = np.frombuffer(data, "<f4")[-2 * count :].copy()
    cos.view("<u4")[5::7] += 1
    data[-8 * count :] = cos.tobytes()
    (tmp_path / "m.bin").write_bytes(data)
    convert(tmp_path / "m.bin", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == data
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    for broken in ("", "x", values["llama2c"]["table_ulps"][:40], 5):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(values | {"llama2c": {"table_ulps": broken}}))
        with pytest.raises(UserError, match="table_ulps of config.json: damaged"):
            convert(tmp_path / "hf", tmp_path / "b.bin")
    data[-4 * count :] = np.zeros(count, "<f4").tobytes()
    (tmp_path / "m.bin").write_bytes(data)
    with pytest.raises(UserError, match="tables of cosines and sines are not those of rope_theta 10000"):
        open_model(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-4], "bytes long, expected"),
        (lambda data: data + b"\0", "bytes long, expected"),
        (lambda data: data[:4] + struct.pack("<i", 7) + data[8:], "version 7 of llama2.c"),
        (lambda data: data[:8] + struct.pack("<i", 1 << 30) + data[12:], "are no model's"),
        (lambda data: data[:28] + struct.pack("<i", 1 << 23) + data[32:], "bytes long, expected"),
        (lambda data: data[:36] + b"\2" + data[37:], "expected 0 or 1"),
        (lambda data: data[:200] + b"\1" + data[201:], "the rest of the header is not zero"),
        (lambda data: data[:100], "less than a header"),
    ],
)
def test_files_that_lie_are_refused(change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "m.bin").write_bytes(change(version_1(model())))
    assert cli.main(["convert", str(tmp_path / "m.bin"), str(tmp_path / "hf")]) == 2
    assert message in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["m.bin"]


# the tokenizer


WORDS = [" ", "e", "t", "h", "a", "n", "\u00e9", "\u4e2d", " t", "th", " th", "he", " the", "an", "na", "anan", " a",
         "  ", "ta", "en", "ee", "at", "hat", " hat", "nan", "aa", "et", "te", "\n"]  # fmt: skip
TEXTS = ["the hat", "a banana then the nanana", "", "  two  spaces ", "\u00e9t\u00e9 \u4e2d\u6587 \U0001f600",
         "line\nline\n", "that ate tea", "aaaa eee tththth"]  # fmt: skip


def tokenizer_bin() -> bytes:
    """A tokenizer.bin of 288 tokens with scores in no particular order."""
    scores = np.random.default_rng(1).permutation(len(WORDS))
    tokens = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)] + [(b"<0x%02X>" % i, 0.0) for i in range(256)]
    tokens += [(word.encode(), -float(score)) for word, score in zip(WORDS, scores, strict=True)]
    longest = struct.pack("<I", max(len(text) for text, _ in tokens))
    return longest + b"".join(struct.pack("<fI", score, len(text)) + text for text, score in tokens)


def run_c_encode(text: str) -> list[int]:
    """run.c's encode(), without its <s>: a space, characters or bytes, then the best merge until there is none."""
    raw, at, vocab, scores = tokenizer_bin(), 4, {}, []
    while at < len(raw):
        score, size = struct.unpack("<fI", raw[at : at + 8])
        vocab.setdefault(raw[at + 8 : at + 8 + size], len(scores))
        scores.append(score)
        at += 8 + size
    names = {i: token for token, i in vocab.items()}
    ids = [vocab[b" "]] if text else []
    for character in text:
        known = vocab.get(character.encode())
        ids += [known] if known is not None else [byte + 3 for byte in character.encode()]
    while True:
        merged = [(scores[i], -n, i) for n in range(len(ids) - 1)
                  if (i := vocab.get(names[ids[n]] + names[ids[n + 1]])) is not None]  # fmt: skip
        if not merged:
            return ids
        _, n, i = max(merged)
        ids[-n : 2 - n] = [i]


def test_a_tokenizer_bin_gives_run_cs_ids_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(version_0(model()))
    (tmp_path / "t.bin").write_bytes(tokenizer_bin())
    convert(tmp_path / "m.bin", tmp_path / "hf", tokenizer=tmp_path / "t.bin")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = mlxgpt.load.load(tmp_path / "hf")[1]
    assert ours and ours.before == [1]
    for text in TEXTS:
        expected = run_c_encode(text)
        assert ours.encode(text) == expected and theirs(text).input_ids == [1, *expected], text
    convert(tmp_path / "hf", tmp_path / "back.bin")
    assert (tmp_path / "back.tokenizer.bin").read_bytes() == tokenizer_bin()
    assert (tmp_path / "back.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()
    with pytest.raises(UserError, match=r"b\.tokenizer\.bin: exists"):
        (tmp_path / "b.tokenizer.bin").write_bytes(b"")
        convert(tmp_path / "hf", tmp_path / "b.bin")


def test_the_same_greedy_text_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """transformers puts <s> before a prompt, and so does generate."""
    (tmp_path / "m.bin").write_bytes(version_0(model(length=96)))
    (tmp_path / "t.bin").write_bytes(tokenizer_bin())
    convert(tmp_path / "m.bin", tmp_path / "hf", tokenizer=tmp_path / "t.bin")
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("the hat", return_tensors="pt").input_ids
    made = read(tmp_path / "hf").generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = made[0, ids.shape[1] :].tolist()
    for backend in ("mlx", "torch"):
        command = ["generate", "-m", str(tmp_path / "hf"), "-p", "the hat", "-n", "64", "--temperature", "0", "--json"]
        assert cli.main([*command, "--backend", backend]) == 0
        found = json.loads(capsys.readouterr().out)["token_ids"]
        assert found == expected[: len(found)] and (len(found) == 64 or expected[len(found)] == 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: struct.pack("<I", 99) + data[4:], "longest token has 99 bytes"),
        (lambda data: data[:8] + struct.pack("<I", 1 << 31) + data[12:], "truncated"),
        (lambda data: data[:4], "0 tokens"),
        (lambda data: data.replace(b"<0x41>", b"<0x42>"), "expected b'<0x41>'"),
        (lambda data: data + struct.pack("<fI", 0.0, 2) + b"he", "'he' is there twice"),
        (lambda data: data + struct.pack("<fI", math.nan, 3) + b"hen", "run.c does not merge"),
        (lambda data: data + struct.pack("<fI", 0.0, 2) + b"\xff\xfe", "not UTF-8"),
    ],
)
def test_tokenizers_that_lie_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(change(tokenizer_bin()))
    with pytest.raises(UserError, match=message):
        llama2c_tokenizer.read_tokenizer(tmp_path / "t.bin")
