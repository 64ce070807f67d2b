"""quantize: what is written, that either backend writes the same, what is measured, and what is refused."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from compare import agree
from interop import written
from models import tiny, weights

from convert.conversion import convert
from convert.formats.registry import open_model
from convert.fuse import fuse
from convert.quantize import course, run, windows
from convert.quantize.run import Report, quantize
from mlxgpt import cli
from mlxgpt.common import backend as backends
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params
from mlxgpt.common.model.affine import Quantized

BACKENDS = list(backends.PACKAGES)
WIDE: dict[str, Any] = dict(n_embd=64, n_hidden=96, block_size=32, vocab_size=80)
CONFIGS = {
    "llama": tiny(family="llama", **WIDE),
    "qwen3": tiny(family="qwen3", n_kv_head=2, head_dim=16, tied=False, **WIDE),
    "gpt2": tiny(family="gpt2", **WIDE | {"n_hidden": 256}),  # as mlx-lm has it
}


def model(place: Path, name: str = "llama", dtype: str = "float32") -> Path:
    model_folder.write_model(place / name, CONFIGS[name], weights(CONFIGS[name], scale=6.0), dtype=dtype)
    return place / name


def text(place: Path, windows: int = 24, seed: int = 3) -> str:
    """Ids of so many windows of 32, and one, as nanoGPT's files have them."""
    made = place / f"{windows}-{seed}.bin"
    drawn = np.random.default_rng(seed).zipf(1.3, size=32 * windows + 1) % 80
    drawn.astype("<u2").tofile(made)
    return str(made)


def stored(place: Path) -> bytes:
    return (place / "model.safetensors").read_bytes()


def matrices(place: Path) -> dict[str, Quantized]:
    found = model_folder.read_stored(place, model_folder.read_config(place))
    return {name: each for name, each in found.items() if isinstance(each, Quantized)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_to_nearest_is_what_convert_writes(name: str, backend: str, tmp_path: Path) -> None:
    """Byte for byte, with a text and without."""
    source = model(tmp_path, name, "bfloat16")
    convert(source, tmp_path / "c", "mlx-lm", bits=4, group_size=32)
    report = quantize(source, tmp_path / "q", 4, "rtn", group_size=32, backend=backend)
    assert stored(tmp_path / "q") == stored(tmp_path / "c") and report.perplexity is None
    read = [json.loads((tmp_path / each / "config.json").read_text()) for each in "cq"]
    assert read[0]["quantization"] == read[1]["quantization"]
    measured = quantize(source, tmp_path / "m", 4, "rtn", group_size=32, data=text(tmp_path), backend=backend)
    assert stored(tmp_path / "m") == stored(tmp_path / "c")
    assert measured.kl and measured.kl > 0 and measured.measured == 24 * 32 and not measured.calibrated


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_rounding_to_nearest_is_mx_quantize_at_all_bits(bits: int, tmp_path: Path) -> None:
    quantize(model(tmp_path), tmp_path / "q", bits, "rtn", group_size=32)
    whole = weights(CONFIGS["llama"], scale=6.0)
    found = matrices(tmp_path / "q")
    assert set(found) == {name for name, each in whole.items() if each.ndim == 2}
    for name, each in found.items():
        expected = mx.quantize(mx.array(whole[name]), group_size=32, bits=bits)
        for ours, theirs in zip((each.words, each.scales, each.biases), expected, strict=True):
            assert np.array_equal(ours, np.array(theirs)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_gptq_is_closer_and_loads_everywhere(name: str, tmp_path: Path) -> None:
    """In mlx-lm and in both frameworks with the same logits; and KL is what those logits say."""
    from mlx_lm.utils import load_model

    source, data, other = model(tmp_path, name), text(tmp_path), text(tmp_path, 4, 5)
    rtn, made = (
        quantize(source, tmp_path / method, 3, method, group_size=32, data=data, eval_data=other)
        for method in ("rtn", "gptq")
    )
    assert made.kl and rtn.kl and made.kl < 0.85 * rtn.kl
    assert made.bits_per_weight == rtn.bits_per_weight and made.calibrated == 24 * 32 and made.measured == 4 * 32
    tokens = np.fromfile(other, "<u2")[:-1].reshape(4, 32).astype(np.int32)
    theirs = np.array(load_model(tmp_path / "gptq")[0](mx.array(tokens)))
    for backend in BACKENDS:
        ours = np.array(backends.load(backend).load.load(tmp_path / "gptq", device="cpu")[0](tokens).tolist())
        agree(name, ours, theirs, 1e-4)
    load = backends.load("torch").load.load
    p, q = (_logs(np.array(load(place, device="cpu")[0](tokens).tolist())) for place in (source, tmp_path / "gptq"))
    np.testing.assert_allclose(made.kl, (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-3)
    targets = np.fromfile(other, "<u2")[1:].reshape(4, 32, 1).astype(np.int64)
    np.testing.assert_allclose(np.log(made.perplexity or 0), -np.take_along_axis(q, targets, -1).mean(), rtol=1e-4)


def _logs(logits: np.ndarray) -> np.ndarray:
    top = logits - logits.max(-1, keepdims=True)
    return top - np.log(np.exp(top).sum(-1, keepdims=True))


def test_the_same_hessians_give_the_same_bits_and_own_ones_nearly_the_same_model(tmp_path: Path) -> None:
    source = model(tmp_path)
    options: dict[str, Any] = {"data": text(tmp_path), "group_size": 32}
    reports: dict[str, Report] = {}
    for one, two in (BACKENDS, BACKENDS[::-1]):
        kept = tmp_path / f"kept-{one}"
        reports[one] = quantize(source, tmp_path / one, 4, backend=one, hessians=kept, **options)
        quantize(source, tmp_path / f"{one}-{two}", 4, backend=two, hessians=kept, **options)
        assert stored(tmp_path / one) == stored(tmp_path / f"{one}-{two}")
    quantize(source, tmp_path / "plain", 4, backend=BACKENDS[0], **options)
    assert stored(tmp_path / "plain") == stored(tmp_path / BACKENDS[0])
    mlx, torch = (reports[each].perplexity for each in BACKENDS)
    assert mlx and torch and abs(mlx - torch) < 1e-3 * torch


def test_hessians_of_something_else_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    source, data, kept = model(tmp_path), text(tmp_path), tmp_path / "kept"
    quantize(source, tmp_path / "a", 4, group_size=32, data=data, hessians=kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    cases: list[tuple[Path, Any, dict[str, Any], str]] = [
        (model(tmp_path, "qwen3"), 4, {}, "model"),
        (source, 3, {}, "bits"),
        (source, 4, {"data": text(tmp_path, 25)}, "text"),
        (source, 4, {"dtype": "bfloat16"}, "model"),
    ]
    for src, bits, more, what in cases:
        with pytest.raises(UserError, match=f"gathered for {what} .*: expected another folder"):
            quantize(src, tmp_path / "b", bits, **{"group_size": 32, "data": data, "hessians": kept, **more})
    damaged = sorted(kept.glob("h.0*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=f"{damaged.name}: damaged"):
        quantize(source, tmp_path / "b", 4, group_size=32, data=data, hessians=kept)
    assert {path.name for path in kept.iterdir()} == set(before)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no hessians.json"):
        quantize(source, tmp_path / "b", 4, group_size=32, data=data, hessians=tmp_path / "other")
    assert not (tmp_path / "b").exists()


def test_every_block_is_rounded_by_what_the_blocks_before_it_give_once_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered from the plain model alone, the inputs are others, and so is the result."""
    source, data = model(tmp_path), text(tmp_path)
    seen: dict[str, list[np.ndarray]] = {"once": [], "plain": []}
    inner, gathered = course.Course._inputs, seen["once"]

    def watched(self: Any, place: str, gather: Any) -> Any:
        found = inner(self, place, gather)
        gathered.append(found.gram)
        return found

    monkeypatch.setattr(course.Course, "_inputs", watched)
    quantize(source, tmp_path / "a", 2, group_size=32, data=data)
    gathered = seen["plain"]
    monkeypatch.setattr(course.Course, "_rounded", lambda self, weights, inputs, modules: dict(weights))
    quantize(source, tmp_path / "b", 2, group_size=32, data=data)
    same = [np.allclose(one, two) for one, two in zip(seen["once"], seen["plain"], strict=True)]
    # the head's and what a tied model is given first; then nothing is as it was
    assert same == [True] + [False] * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_holds_the_weights_of_one_block(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that numpy held at the most, of models that differ in depth alone."""
    monkeypatch.setitem(run.METHODS, "gptq", lambda weight, inputs, scheme: Quantized.of(weight, scheme.bits, 64))
    peaks, data = [], text(tmp_path, 2)
    for layers in (1, 2, 6):
        config = tiny(family="llama", n_embd=128, n_hidden=512, n_layer=layers, block_size=32)
        place = tmp_path / str(layers)
        model_folder.write_model(place, config, params.init_params(config, 1))
        tracemalloc.start()
        quantize(place, tmp_path / f"q-{layers}", 4, data=data, group_size=64, backend=backend)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    block = 4 * (4 * 128 * 128 + 3 * 128 * 512)
    assert abs(peaks[2] - peaks[1]) < block / 2  # the first also imports


def test_an_adapter_is_merged_as_fuse_does(tmp_path: Path) -> None:
    made = written(tmp_path, "llama-gqa", alpha=4.0)
    fuse(made.base, made.adapter, tmp_path / "tuned")
    quantize(tmp_path / "tuned", tmp_path / "a", 4, "rtn", group_size=32)
    quantize(made.base, tmp_path / "b", 4, "rtn", group_size=32, adapters=[(made.adapter, 1.0)])
    quantize(made.adapter, tmp_path / "c", 4, "rtn", group_size=32)
    assert stored(tmp_path / "a") == stored(tmp_path / "b") == stored(tmp_path / "c")
    quantize(made.base, tmp_path / "d", 4, "rtn", group_size=32)
    assert stored(tmp_path / "d") != stored(tmp_path / "a")


def test_the_report_counts_all_tensors_and_the_folder_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = str(model(tmp_path)), text(tmp_path)
    words = ["quantize", source, str(tmp_path / "q"), "--bits", "4", "--data", data, "--group-size", "64"]
    assert cli.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    tensors = model_folder.read_tensors(tmp_path / "q" / "model.safetensors")
    size = sum(each.nbytes for each in tensors.values())
    assert said["size"] == size and said["bits_per_weight"] == 8 * size / params.count(CONFIGS["llama"])
    assert said["whole"] == ["h.0.mlp.c_proj", "h.1.mlp.c_proj"] and said["matrices"] == {"4": 13}
    assert said["calibrated"] == 22 * 32 and said["measured"] == 2 * 32
    kept = json.loads((tmp_path / "q" / "config.json").read_text())["mlxgpt"]["provenance"]["quantized"]
    assert kept["kl"] == said["kl"] and kept["method"] == "gptq" and kept["data"] == Path(data).name
    assert cli.main([*words, "--force"]) == 0
    shown = capsys.readouterr().out
    assert "bits per weight  " in shown and "KL " in shown and "10 matrices" not in shown


def test_the_last_tenth_is_held_out_and_what_is_left_is_said(tmp_path: Path) -> None:
    config, data = CONFIGS["llama"], text(tmp_path, 40)
    made = windows.read(data, None, None, config, "text", 10**6, True)
    ids = np.fromfile(data, "<u2")
    assert made.calibration.shape == (36, 33) and made.evaluation.shape == (4, 33) and not made.notes
    assert np.array_equal(np.concatenate([made.calibration, made.evaluation])[:, :-1].ravel(), ids[:-1])
    assert np.array_equal(made.evaluation[:, 1:].ravel(), ids[-128:])
    few = windows.read(data, None, None, config, "text", 64, True)
    assert few.calibration.shape == few.evaluation.shape == (2, 33) and len(few.notes) == 2
    ids[:-5].tofile(tmp_path / "odd.bin")
    assert (
        "27 tokens fill no window"
        in windows.read(str(tmp_path / "odd.bin"), None, None, config, "text", 64, False).notes[0]
    )
    other = windows.read(str(tmp_path / "odd.bin"), data, None, config, "text", 10**6, False)
    assert other.notes == (f"{tmp_path / 'odd.bin'}: is not read, for nothing is fitted to it",)
    assert windows.read(data, data, None, config, "text", 10**6, False).notes == ()


REFUSED: dict[str, tuple[list[str], str]] = {
    "no text": (["--bits", "4"], "--method gptq: no text to calibrate on: expected --data FILE"),
    "no text for mixed bits": (["--bits", "mixed:4.5", "--method", "rtn"], "no text to calibrate on"),
    "bits": (["--bits", "7", "--method", "rtn"], "--bits 7: expected 2, 3, 4, 5, 6, 8, or mixed:4.5"),
    "mixed": (["--bits", "mixed:x", "--data", "TEXT"], "--bits mixed:x: expected"),
    "a short text": (["--bits", "4", "--data", "SHORT"], "20 tokens: expected at least 33, a window and its targets"),
    "one window": (["--bits", "4", "--data", "ONE"], "1 windows of 32 tokens: expected 2"),
    "groups": (["--bits", "4", "--method", "rtn", "--group-size", "128"], "divides the inputs of no matrix (64, 96)"),
    "hessians of rtn": (["--bits", "4", "--method", "rtn", "--hessians", "kept"], "--method rtn has none"),
    "not there": (["--bits", "4", "--data", "nothing.txt"], "nothing.txt"),
    "hessians in the result": (["--bits", "4", "--data", "TEXT", "--hessians", "DST"], "where the model goes"),
    "fitted and measured": (["--bits", "4", "--data", "TEXT", "--eval-data", "TEXT"], "--eval-data TEXT: is --data"),
    "tokens of nothing": (["--bits", "4", "--method", "rtn", "--tokens", "9"], "--tokens: does nothing without --data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = REFUSED[name]
    source = model(tmp_path)
    texts = {"TEXT": text(tmp_path), "SHORT": str(tmp_path / "short.bin"), "ONE": text(tmp_path, 1)}
    texts["DST"], said = str(tmp_path / "q"), said.replace("TEXT", texts["TEXT"])
    np.arange(20, dtype="<u2").tofile(texts["SHORT"])
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["quantize", str(source), str(tmp_path / "q"), *(texts.get(word, word) for word in words)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_quantized_base_a_foreign_family_and_what_exists_are_refused(tmp_path: Path) -> None:
    source = model(tmp_path)
    quantize(source, tmp_path / "q", 8, "rtn", group_size=32)
    with pytest.raises(UserError, match=r"quantized already.*mlxgpt convert .* NEW --dtype bfloat16"):
        quantize(tmp_path / "q", tmp_path / "r", 4, "rtn", group_size=32)
    with pytest.raises(UserError, match="exists; --force replaces it"):
        quantize(source, tmp_path / "q", 4, "rtn", group_size=32)
    config = tiny(family="mlxgpt", **WIDE)
    model_folder.write_model(tmp_path / "own", config, weights(config))
    with pytest.raises(UserError, match="family mlxgpt: mlx-lm has no such architecture"):
        quantize(tmp_path / "own", tmp_path / "r", 4, "rtn", group_size=32)
    assert not (tmp_path / "r").exists()


def test_a_place_that_cannot_be_replaced_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = model(tmp_path), text(tmp_path)
    monkeypatch.setattr(run.windows, "read", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    for place, message in (
        (source, "is, holds or lies in the source"),
        (source / "q", "is, holds or lies in the source"),
        (tmp_path / "file", "--force replaces a folder"),
        (tmp_path / "other", "this folder holds none"),
    ):
        with pytest.raises(UserError, match=message):
            quantize(source, place, 4, group_size=32, data=data, force=True)


def test_what_breaks_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = model(tmp_path), text(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_report", broken)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "q", 4, group_size=32, data=data, hessians=tmp_path / "kept")
    assert sorted(path for path in tmp_path.rglob("*") if "kept" not in path.parts) == before
    calls = iter([None, None])
    monkeypatch.setattr(
        course.Course, "_rounded", lambda self, weights, *_: dict(weights) if next(calls, 1) is None else broken()
    )
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "q", 4, group_size=32, data=data, hessians=tmp_path / "half")
    assert not (tmp_path / "half").exists() and not (tmp_path / "q").exists()


def test_open_model_reads_what_was_written(tmp_path: Path) -> None:
    quantize(model(tmp_path), tmp_path / "q", 4, data=text(tmp_path), group_size=32)
    found = open_model(tmp_path / "q")
    assert found.format == "mlx-lm" and all(each.packed for each in found.tensors.values() if len(each.shape) == 2)
