"""A cache in 8 or 4 bits: MLX's format in both frameworks, each token rounded once, and the bytes that it says."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes

import mlxgpt.affine  # first: it loads a BLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from decoding import BACKENDS, GENERATE, logits_of, make_config, make_model, make_weights, some_tokens
from serving import running, served_model, submit

import mlxgpt.cache
import mlxgpt.model
import torch_ref.affine
import torch_ref.cache
import torch_ref.model
from mlxgpt import cli
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.inference import kv_cache
from mlxgpt.common.model import affine

MODULES: dict[str, Any] = {"mlx": mlxgpt.model, "torch": torch_ref.model}
CACHES: dict[str, Any] = {"mlx": mlxgpt.cache, "torch": torch_ref.cache}
BITS = (8, 4)
LENGTH = 40


def wide_config(family: str = "llama", **more: Any) -> Any:
    """Heads that groups of 32 divide."""
    return make_config(family, head_dim=32, **more)


def numbers(dtype: str) -> np.ndarray:
    """Rows (3, 5, 64) of all kinds: spread, on one side of 0, equal, zero, tiny, with one large value."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 5, 64)).astype(np.float32)
    rows[0, 1], rows[0, 2] = np.abs(rows[0, 1]) + 3, -np.abs(rows[0, 2])
    rows[1, 0], rows[1, 1], rows[1, 2], rows[1, 3, 7] = 2.5, 0, rows[1, 2] * 1e-9, 300
    return rows.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("group_size", kv_cache.GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_both_frameworks_round_to_the_bits_of_the_format(dtype: str, bits: int, group_size: int) -> None:
    rows = numbers(dtype)
    expected = affine.quantize(rows, bits, group_size)
    ours = mlxgpt.affine.quantize(mx.array(rows.astype(np.float32)).astype(getattr(mx, dtype)), bits, group_size)
    given = torch.from_numpy(rows.astype(np.float32)).to(getattr(torch, dtype))
    theirs = torch_ref.affine.quantize(given, bits, group_size)
    assert (np.array(ours[0]) == expected[0]).all()
    assert (theirs[0].numpy().view(np.uint32) == expected[0]).all()
    for right, one, other in zip(expected[1:], ours[1:], theirs[1:], strict=True):
        assert (np.array(one.astype(mx.float32)) == right.astype(np.float32)).all()
        assert (other.float().numpy() == right.astype(np.float32)).all()
    whole = affine.dequantize(*expected, bits, group_size)
    assert (np.array(mlxgpt.affine.dequantize(*ours, bits, group_size)) == whole).all()
    assert (torch_ref.affine.dequantize(*theirs, bits, group_size).numpy() == whole).all()


def parts_of(backend: str, cache: list[Any], tokens: int) -> list[np.ndarray]:
    """What the layers hold, on the host."""
    held = [part[:, :, :tokens] for layer in cache for part in layer.parts]
    return [np.array(each) if backend == "mlx" else each.numpy() for each in held]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_pieces_is_the_whole_one(backend: str, bits: int) -> None:
    """Each token is rounded when it comes, and every query sees the rounded ones, its own included."""
    config = wide_config(position="rope")
    model, tokens = make_model(backend, config), some_tokens(LENGTH)
    whole = MODULES[backend].make_cache(model, 1, LENGTH, kv_bits=bits)
    right = logits_of(backend, model, [tokens], cache=whole)
    cache, made = MODULES[backend].make_cache(model, 1, LENGTH, kv_bits=bits), []
    for start, stop in pairwise([0, 7, 8, 31, LENGTH]):
        made.append(logits_of(backend, model, [tokens[start:stop]], cache=cache))
    plain = logits_of(backend, model, [tokens])
    assert np.abs(np.concatenate(made, 1) - right).max() < 1e-5 * np.abs(right).max()
    assert 1e-4 < np.abs(plain - right).max() < np.abs(right).max()


@pytest.mark.parametrize("bits", BITS)
def test_both_frameworks_hold_the_same_words_and_draw_the_same_tokens(bits: int) -> None:
    config, tokens, held, drawn = wide_config(), some_tokens(LENGTH - 2), {}, {}
    for backend in BACKENDS:
        model = make_model(backend, config)
        cache = MODULES[backend].make_cache(model, 1, LENGTH, kv_bits=bits)
        logits_of(backend, model, [tokens], cache=cache)
        held[backend] = parts_of(backend, cache, len(tokens))
        sample = SampleConfig(temperature=0.9, max_tokens=24, seed=5)
        prompts = [some_tokens(9), [3, 1], some_tokens(15, 4)]  # padded to one length
        made = [GENERATE[backend].generate(model, None, prompts, sample, kv_bits=bits)]
        made += [GENERATE[backend].generate(model, None, [prompt], sample, kv_bits=bits) for prompt in prompts[:1]]
        drawn[backend] = [each.tokens for results in made for each in results]
        assert drawn[backend][3] == drawn[backend][0]  # alone as in a batch
    assert drawn["mlx"] == drawn["torch"]
    first = [0, 1, 2, 3, 4, 5]  # of the first layer, whose keys both compute from the same embeddings
    differ = [(held["mlx"][n].view(np.uint8) != held["torch"][n].view(np.uint8)).mean() for n in first if n % 3 == 0]
    assert max(differ) < 0.01


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_held_is_words_scales_and_biases(backend: str, bits: int) -> None:
    config = wide_config(block_size=1024)
    model = make_model(backend, config)
    cache = MODULES[backend].make_cache(model, 2, 1024, kv_bits=bits)
    logits_of(backend, model, [some_tokens(300), some_tokens(300, 1)], cache=cache)
    grown = 2 * kv_cache.BLOCK
    for layer in cache:
        parts = [value for value in vars(layer).values() if hasattr(value, "nbytes")] + list(layer.parts)
        assert sum(part.nbytes for part in parts) == layer.nbytes
    found, full = sum(layer.nbytes for layer in cache), kv_cache.size(config, 2, grown, 4)
    assert found == kv_cache.size(config, 2, grown, 4, bits)
    assert found / full == (bits + 2) / 32  # a scale and a bias of 32 bits for 32 values


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_that_change_read_the_held_anew(backend: str) -> None:
    scaling = {"rope_scaling": "longrope", "rope_original": 20, "rope_long": [4.0] * 16, "rope_short": [1.0] * 16}
    model = make_model(backend, wide_config(**scaling))
    sample = SampleConfig(temperature=0.0, max_tokens=12)
    drawn = GENERATE[backend].generate(model, None, [some_tokens(14)], sample, kv_bits=8)[0].tokens
    ids = some_tokens(14) + drawn
    cache = MODULES[backend].make_cache(model, 1, LENGTH, kv_bits=8)
    logits = logits_of(backend, model, [ids[:-1]], cache=cache)
    assert int(logits[0, -1].argmax()) == drawn[-1]


def test_what_no_group_divides_is_refused_in_a_line() -> None:
    model = make_model("torch", make_config("llama"))
    for bits, words in ((8, "head_dim of 8"), (5, "expected 8 or 4"), (16, "expected 8 or 4")):
        with pytest.raises(UserError, match=words):
            GENERATE["torch"].generate(model, None, [[1]], SampleConfig(max_tokens=1), kv_bits=bits)
    assert [kv_cache.group_size(size, 8) for size in (32, 64, 96, 128, 256)] == [32, 64, 32, 64, 64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_another_group_are_caught(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CACHES[backend].affine
    real = module.dequantize

    def shifted(words: Any, scales: Any, biases: Any, *more: Any) -> Any:
        roll = mx.roll if backend == "mlx" else torch.roll
        return real(words, roll(scales, 1, -2), biases, *more)

    monkeypatch.setattr(module, "dequantize", shifted)
    with pytest.raises(AssertionError):
        test_a_prompt_in_pieces_is_the_whole_one(backend, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_company_draw_what_they_draw_alone(backend: str) -> None:
    """Rows join, leave and begin with what others held, and all of it is words."""
    config = wide_config()
    model = make_model(backend, config)
    with running(backend, lambda: served_model(backend, config), cache_bytes=1 << 20, kv_bits=8) as engine:
        served = engine.served["tiny"]
        cases = [(some_tokens(size, size), SampleConfig(max_tokens=10, seed=size)) for size in (3, 12, 19, 25)]
        answers = [submit(engine, served, *case).wait() for case in cases]
        again = submit(engine, served, [*cases[3][0], 1, 2, 3], cases[3][1]).wait()
    assert again.begun is not None and again.begun.cached == 25
    cases.append(([*cases[3][0], 1, 2, 3], cases[3][1]))
    for (prompt, sample), answer in zip(cases, [*answers, again], strict=True):
        assert answer.tokens == [GENERATE[backend].generate(model, None, [prompt], sample, kv_bits=8)[0].tokens]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_commands_hold_a_cache_in_bits(backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    for folder, config in ((narrow, make_config("llama")), (wide, wide_config())):
        write_model(folder, config, make_weights(config))
    text = tmp_path / "text.bin"
    np.array(some_tokens(120), np.uint16).tofile(text)
    losses, ids = {}, ",".join(map(str, some_tokens(9)))
    for bits in ("", "8", "4"):
        flags = ["--backend", backend, "--json", *(["--kv-bits", bits] if bits else [])]
        assert cli.main(["generate", "-m", str(wide), "--prompt-ids", ids, "--seed", "3", "-n", "8", *flags]) == 0
        sample = SampleConfig(max_tokens=8, seed=3)
        model = make_model(backend, wide_config())
        right = GENERATE[backend].generate(model, None, [some_tokens(9)], sample, kv_bits=int(bits or 0))[0].tokens
        assert json.loads(capfd.readouterr().out)["token_ids"] == right
        assert cli.main(["eval", "-m", str(wide), "-d", str(text), *flags]) == 0
        losses[bits] = json.loads(capfd.readouterr().out)["loss"]
    assert len(set(losses.values())) == 3 and np.ptp(list(losses.values())) < 0.05
    commands = (["generate", "--prompt-ids", "1"], ["eval", "-d", str(text)], ["serve", "--port", "0"])
    for command in commands:
        assert cli.main([*command, "-m", str(narrow), "--backend", backend, "--kv-bits", "8"]) == 2
        told = capfd.readouterr()
        assert told.out == "" and "head_dim of 8: leave it out" in told.err and told.err.count("\n") == 1
