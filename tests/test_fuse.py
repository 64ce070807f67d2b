"""fuse: what the frameworks compute with the adapter, in the base's own dtype and bits, all else byte for byte."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import interop
import ml_dtypes
import numpy as np
import pytest
import templates
from interop import GATE, MODELS, written
from models import tiny, weights

from convert.conversion import convert
from convert.formats.registry import open_model
from convert.formats.rounding import Rounding
from convert.fuse import fuse
from convert.verify import verify
from mlxgpt import cli
from mlxgpt.common.config import AdapterConfig, Recipe, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.model import adapters, params
from mlxgpt.common.sft import template as sft_template
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer

WIDE = tiny(family="llama", n_embd=64, n_hidden=128, block_size=32)  # groups of 64 divide it


@pytest.mark.parametrize(("method", "frameworks"), [("lora", ("mlx", "torch")), ("dora", ("mlx",))])
def test_verify_holds_base_and_adapter_against_the_fused_model(
    tmp_path: Path, method: str, frameworks: tuple[str, ...]
) -> None:
    made = written(tmp_path, "llama-gqa", method=method, alpha=4.0)
    report = verify(made.adapter, made.fused, frameworks=frameworks)
    assert report.agrees, report.findings
    assert {"tensors", "logits", "greedy"} <= {each.rung for each in report.checked}


def test_verify_sees_a_fused_model_of_another_adapter(tmp_path: Path) -> None:
    made = written(tmp_path, "llama-gqa", alpha=4.0)
    fuse(made.base, [(made.adapter, 0.99)], tmp_path / "weaker")
    report = verify(made.adapter, tmp_path / "weaker", frameworks=("torch",))
    assert {"tensors", "logits"} <= {finding.rung for finding in report.findings}


def test_what_no_adapter_touches_is_copied_byte_for_byte(tmp_path: Path) -> None:
    made = written(tmp_path, "gpt2", targets=("c_attn",))
    before, after = (model_folder.read_tensors(place / "model.safetensors") for place in (made.base, made.fused))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {f"h.{n}.attn.c_attn.weight" for n in range(2)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_stored_as_the_base_is(tmp_path: Path, dtype: str) -> None:
    made = written(tmp_path, "qwen3", alpha=4.0)
    model_folder.write_model(tmp_path / "narrow", made.config, weights(made.config), dtype=dtype)
    fuse(tmp_path / "narrow", made.adapter, tmp_path / "out", force=True)
    base, out = (model_folder.read_tensors(tmp_path / name / "model.safetensors") for name in ("narrow", "out"))
    assert {array.dtype for array in out.values()} == {model_folder.DTYPES[dtype]}
    found = adapter_folder.read_adapter(made.adapter, None, made.config)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = adapters.fuse(base[name].astype(np.float32), found.targets["h.0.mlp.c_fc"], found.params, "h.0.mlp.c_fc")
    assert out[name].tobytes() == expected.astype(out[name].dtype).tobytes()
    fuse(tmp_path / "narrow", made.adapter, tmp_path / "wide", dtype="float32", force=True)
    wide = model_folder.read_tensors(tmp_path / "wide" / "model.safetensors")
    assert np.array_equal(wide[name], expected)


def quantized(place: Path, bits: int) -> tuple[Path, Path]:
    """A quantized base and an adapter that was trained on it."""
    model_folder.write_model(place / "plain", WIDE, weights(WIDE))
    convert(place / "plain", place / "base", to="mlx-lm", bits=bits, group_size=64)
    recipe = Recipe(model=WIDE, tune=TuneConfig(), adapter=AdapterConfig(rank=4, targets=("q_proj", "down_proj")))
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(0, 0.05, param.shape).astype(np.float32) for name, param in adapters.trainable(recipe).items()
    }
    (place / "adapter").mkdir()
    adapter_folder.write_adapter(place / "adapter", recipe, place / "base", arrays)
    return place / "base", place / "adapter"


def test_what_rounding_loses_of_an_update_is_counted() -> None:
    """By hand: bfloat16 has steps of 2^-7 at 1 and of 2^-5 at 4, and a half goes to the even one."""
    before = np.array([[1.0, 1.0], [1 / 3, 4.0]], np.float32)  # a third does not change, and rounding it is no loss
    exact = before + np.array([[2.0**-9, 2.0**-7], [0.0, 2.0**-6]])
    wide = np.concatenate([exact, [[1 / 3, 1 / 3]]])  # a new row has no update
    told = Rounding()
    for array in (wide * 2, wide):  # what is read again counts once
        told.add("x.weight", before, array, array.astype(ml_dtypes.bfloat16), "bfloat16")
    assert (told.changed, told.unmoved) == (3, 2)
    assert told.lost == pytest.approx((65 / 81) ** 0.5, rel=1e-12)
    assert str(told) == (
        "rounding to bfloat16 loses 89.6% of what the adapter changed (root mean square), and 2 of 3 changed weights "
        "(66.7%) stay as they were; --dtype float32 keeps the update"
    )
    exactly = Rounding()
    exactly.add("x.weight", before, exact, exact.astype(np.float32), "float32")
    assert not str(exactly)
    assert (exactly.lost, exactly.unmoved) == (0, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fusing_in_few_bits_says_what_is_lost(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = written(tmp_path, "qwen3", alpha=0.02, train=("ln_f",))
    model_folder.write_model(tmp_path / "narrow", made.config, weights(made.config), dtype=dtype)
    words = ["fuse", "-m", str(tmp_path / "narrow"), "--adapter", str(made.adapter), "--force", "-o"]
    assert cli.main([*words, str(tmp_path / "said")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"rounding to {dtype} loses"))
    assert cli.main([*words, str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rounding"]
    assert cli.main([*words, str(tmp_path / "wide"), "--dtype", "float32", "--json"]) == 0
    exactly = json.loads(capsys.readouterr().out)["rounding"]
    base, out, wide = (model_folder.read_params(tmp_path / n, made.config) for n in ("narrow", "out", "wide"))
    moves = {name: wide[name].astype(np.float64) - base[name] for name in base}
    lost = sum(float(((out[name] - wide[name].astype(np.float64))[moves[name] != 0] ** 2).sum()) for name in base)
    size = sum(float((each**2).sum()) for each in moves.values())
    still = sum(int(((out[name] == base[name]) & (moves[name] != 0)).sum()) for name in base)
    assert found["lost"] == pytest.approx((lost / size) ** 0.5, rel=1e-3)
    assert abs(found["unmoved"] - still) <= 3  # float32 hides changes that are smaller than its step
    assert still > 100
    assert found["changed"] == pytest.approx(sum(int((each != 0).sum()) for each in moves.values()), rel=0.01)
    assert f"{found['unmoved']:,} of {found['changed']:,} changed weights" in line
    assert line.endswith("--dtype float32 keeps the update")
    assert exactly["lost"] < 1e-3
    assert exactly["changed"] == found["changed"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_stays_quantized_and_says_what_that_costs(
    tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = quantized(tmp_path, bits)
    told = Rounding()
    _, loss = fuse(base, adapter, tmp_path / "out", rounding=told)
    _, none = fuse(base, adapter, tmp_path / "exact", dequantize=True, dtype="float32")
    assert none is None
    assert loss is not None
    assert loss.matrices == 4
    out, exact, before = (open_model(tmp_path / name).tensors for name in ("out", "exact", "base"))
    assert all(tensor.packed and tensor.packed.bits == bits for name, tensor in out.items() if "proj" in name)
    touched = [name for name in out if not np.array_equal(out[name].read(), before[name].read())]
    assert sorted(touched) == sorted(f"h.{n}.{m}.weight" for n in range(2) for m in ("attn.q_proj", "mlp.c_proj"))
    found = sum(float(((out[name].read() - exact[name].read()) ** 2).sum()) for name in touched)
    size = sum(float((exact[name].read() ** 2).sum()) for name in touched)
    assert abs(loss.weights / (found / size) ** 0.5 - 1) < 1e-5
    assert 0 < loss.weights < (0.2 if bits == 4 else 0.02)
    logits = interop.our_logits(interop.torch_ref, base, adapter)
    assert interop.worst("exact", interop.our_logits(interop.mlxgpt, tmp_path / "exact"), logits) <= GATE
    assert interop.worst("mlx-lm", interop.mlx_lm_logits(base, adapter), logits) <= GATE
    assert interop.mlx_lm_logits(tmp_path / "out").shape == logits.shape
    assert cli.main(["fuse", "-m", str(base), "--adapter", str(adapter), "-o", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert f"4 merged matrices quantized again: an error of {loss.weights:.2%} of the weights" in said
    assert f"quantizing loses {told.lost:.1%} of what the adapter changed" in said
    assert told.lost == pytest.approx(loss.update, rel=1e-6)
    still = sum(int((out[name].read() == before[name].read()).sum()) for name in touched)
    assert told.unmoved == still
    assert told.changed == pytest.approx(sum(out[name].read().size for name in touched), rel=0.01)
    assert f"{told.unmoved:,} of {told.changed:,} changed weights" in said
    assert "--dequantize --dtype float32 keeps the update" in said


def test_bits_that_differ_by_matrix_stay_so(tmp_path: Path) -> None:
    base, adapter = quantized(tmp_path, 4)
    convert(tmp_path / "plain", tmp_path / "eight", to="mlx-lm", bits=8, group_size=64)
    config, index = (json.loads((base / name).read_text()) for name in ("config.json", "model.safetensors.index.json"))
    four, eight = (model_folder.read_tensors(place / "model.safetensors") for place in (base, tmp_path / "eight"))
    module = "model.layers.1.self_attn.q_proj"
    mixed = {name: eight[name] if name.startswith(f"{module}.") else array for name, array in four.items()}
    model_folder.write_tensors(base / "model.safetensors", mixed, {"format": "mlx"})
    config["quantization"] |= {module: {"group_size": 64, "bits": 8}}
    (base / "config.json").write_text(json.dumps(config))
    assert set(index["weight_map"]) == set(mixed)
    fuse(base, adapter, tmp_path / "out", force=True)
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert scheme[module] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert np.isfinite(interop.mlx_lm_logits(tmp_path / "out")).all()


def test_tied_stays_tied_and_the_head_gets_the_update(tmp_path: Path) -> None:
    made = written(tmp_path, "gpt2", targets=("wte",), alpha=4.0)
    assert model_folder.read_config(made.fused).tied
    tensors = model_folder.read_tensors(made.fused / "model.safetensors")
    assert "lm_head.weight" not in tensors
    model, _, _ = interop.peft_load(made.base, made.adapter)
    assert interop.worst("peft", interop._torch_logits(model), interop.transformers_logits(made.fused)) <= GATE


def test_new_tokens_travel_with_their_tokenizer(tmp_path: Path) -> None:
    plain = train_tokenizer("bpe", [templates.TEXT], 300)
    chatty = sft_template.with_chatml(plain)
    config = tiny(family="llama", vocab_size=plain.n_vocab, tied=False)
    model_folder.write_model(tmp_path / "base", config, weights(config), tokenizer=plain)
    grown = dataclasses.replace(config, vocab_size=chatty.n_vocab)
    recipe = Recipe(model=grown, tune=TuneConfig(), adapter=AdapterConfig(rank=2, train=("wte", "lm_head")))
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(0, 0.1, p.shape).astype(np.float32) for n, p in adapters.trainable(recipe).items()}
    (tmp_path / "adapter").mkdir()
    adapter_folder.write_adapter(tmp_path / "adapter", recipe, tmp_path / "base", arrays, tokenizer=chatty)
    fuse(tmp_path / "adapter", None, tmp_path / "out")
    assert model_folder.read_config(tmp_path / "out") == grown
    assert load_tokenizer(tmp_path / "out").digest == chatty.digest
    ids = chatty.encode("<|im_start|>user")
    assert max(ids) >= config.vocab_size
    for package in (interop.mlxgpt, interop.torch_ref):
        with_adapter = interop.our_logits(package, tmp_path / "adapter")
        assert with_adapter.shape[-1] == grown.vocab_size
        assert interop.worst("fused", interop.our_logits(package, tmp_path / "out"), with_adapter) <= GATE
        assert package.load.load(tmp_path / "adapter")[1].digest == chatty.digest
    assert interop.mlx_lm_logits(tmp_path / "out").shape[-1] == grown.vocab_size


@pytest.mark.parametrize(
    ("settings", "flags", "said"),
    [
        ({}, [], "a model without an adapter: expected --adapter DIR"),
        ({}, ["--adapter", "BASE"], "a model, expected an adapter"),
        ({}, ["--adapter", "ADAPTER:much"], "weight 'much': expected a number"),
        ({}, ["--adapter", "ADAPTER:inf"], "expected a finite number"),
        ({}, ["--adapter", "/nowhere"], "/nowhere: no such folder"),
        ({"method": "dora"}, ["--adapter", "ADAPTER:0.5"], "has a dora update: expected it alone"),
        ({"train": ("ln_f",)}, ["--adapter", "ADAPTER:0.5"], "is trained whole: expected it in one of them"),
    ],
)
def test_what_cannot_be_fused_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Any, flags: list[str], said: str
) -> None:
    made = written(tmp_path, "gpt2", **settings)
    flags = [flag.replace("BASE", str(made.base)).replace("ADAPTER", str(made.adapter)) for flag in flags]
    assert cli.main(["fuse", "-m", str(made.base), "-o", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mutated_merge_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(tmp_path, "gpt2", alpha=8.0)
    intact = adapters.delta
    monkeypatch.setattr(adapters, "delta", lambda target, *rest: intact(target, *rest) / target.scale)
    fuse(made.base, made.adapter, tmp_path / "unscaled")
    monkeypatch.undo()
    expected = interop.our_logits(interop.torch_ref, made.base, made.adapter)
    assert (
        interop.worst("unscaled", interop.our_logits(interop.torch_ref, tmp_path / "unscaled"), expected) > 100 * GATE
    )


def test_adapters_move_between_the_layouts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = interop.write_base(tmp_path / "base", MODELS["gpt2"])
    expected = interop.write_peft(
        tmp_path / "peft", base, target_modules=["c_attn"], rank_pattern={"h.0.attn.c_attn": 2}
    )
    said = ["--model", str(base)]
    assert cli.main(["convert", str(tmp_path / "peft"), str(tmp_path / "lm"), "--to", "mlx-lm", *said]) == 0
    assert sorted(file.name for file in (tmp_path / "lm").iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert interop.worst("mlx-lm", interop.mlx_lm_logits(base, tmp_path / "lm"), expected) <= GATE
    assert cli.main(["convert", str(tmp_path / "lm"), str(tmp_path / "back"), "--to", "peft"]) == 0  # it names its base
    model, missing, unexpected = interop.peft_load(base, tmp_path / "back")
    assert not missing + unexpected
    assert interop.worst("peft", interop._torch_logits(model), expected) <= GATE
    assert cli.main(["convert", str(tmp_path / "lm"), str(tmp_path / "back"), "--to", "peft"]) == 2
    assert cli.main(["convert", str(tmp_path / "lm"), str(tmp_path / "back"), "--force"]) == 0
    assert (tmp_path / "back" / "adapters.safetensors").exists()
    capsys.readouterr()
    assert cli.main(["convert", str(tmp_path / "lm"), str(tmp_path / "gg"), "--to", "gguf"]) == 2
    said_first = f"fuse it first: mlxgpt fuse --model {base.resolve()} --adapter {tmp_path / 'lm'} --out FUSED, then "
    assert f"{said_first}mlxgpt convert FUSED {tmp_path / 'gg'} --to gguf" in capsys.readouterr().err
    for name in ("a.gguf", "a.GGUF", "a.safetensors"):
        assert cli.main(["convert", str(tmp_path / "lm"), str(tmp_path / name)]) == 2
        assert f"{said_first}mlxgpt convert FUSED {tmp_path / name}" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    assert cli.main(["convert", str(base), str(tmp_path / "gg"), "--to", "peft"]) == 2


def test_whole_tensors_do_not_fit_into_mlx_lm_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written(tmp_path, "llama-gqa", train=("wte",))
    assert cli.main(["convert", str(made.adapter), str(tmp_path / "lm"), "--to", "mlx-lm"]) == 2
    assert "mlx-lm holds no tensors that train whole (wte.weight)" in capsys.readouterr().err
    assert not (tmp_path / "lm").exists()


def test_the_old_bin_of_peft_is_read_without_running_it(tmp_path: Path) -> None:
    import torch

    base = interop.write_base(tmp_path / "base", MODELS["gpt2"])
    expected = interop.write_peft(tmp_path / "peft", base, target_modules=["c_attn"])
    tensors = model_folder.read_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, tmp_path / "peft/adapter_model.bin")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"found adapter_model.bin \(mlxgpt convert reads it\)"):
        adapter_folder.read_adapter(tmp_path / "peft", base, MODELS["gpt2"])
    assert cli.main(["convert", str(tmp_path / "peft"), str(tmp_path / "out"), "--model", str(base)]) == 0
    assert interop.worst("bin", interop.our_logits(interop.torch_ref, base, tmp_path / "out"), expected) <= GATE


def test_generate_and_eval_take_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer("bpe", [templates.TEXT], 300)
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab)
    model_folder.write_model(tmp_path / "base", config, weights(config, scale=4), tokenizer=tokenizer)
    recipe = Recipe(model=config, tune=TuneConfig(), adapter=AdapterConfig(rank=4))
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(0, 0.3, p.shape).astype(np.float32) for n, p in adapters.trainable(recipe).items()}
    (tmp_path / "adapter").mkdir()
    adapter_folder.write_adapter(tmp_path / "adapter", recipe, tmp_path / "base", arrays)
    fuse(tmp_path / "adapter", None, tmp_path / "fused")
    (tmp_path / "text.txt").write_text(templates.TEXT[:400])
    places = {"plain": ["-m", "base"], "both": ["-m", "base", "--adapter", "adapter"], "alone": ["-m", "adapter"],
              "twice": ["-m", "base", "--adapter", "adapter:0.25", "--adapter", "adapter:0.75"],
              "fused": ["-m", "fused"]}  # fmt: skip
    texts, losses = {}, {}
    for name, words in places.items():
        flags = [word if word.startswith("-") else str(tmp_path / word) for word in words]
        for backend in ("mlx", "torch"):
            more = ["--backend", backend, "--device", "cpu", "--json"]
            assert cli.main(["generate", *flags, "-p", "The", "-n", "12", "--temperature", "0", *more]) == 0
            texts[name, backend] = json.loads(capsys.readouterr().out)["token_ids"]
            assert cli.main(["eval", *flags, "-d", str(tmp_path / "text.txt"), *more]) == 0
            losses[name, backend] = json.loads(capsys.readouterr().out)["loss"]
    same = [key for key in texts if key[0] != "plain"]
    assert len({tuple(texts[key]) for key in same}) == 1
    assert texts["plain", "mlx"] != texts["both", "mlx"]
    assert max(losses[key] for key in same) - min(losses[key] for key in same) < 1e-4
    assert params.count(config)
