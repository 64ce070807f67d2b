"""Generation: cache against full forward pass, both frameworks against the specification, batches and errors."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlxgpt.generate as mlx_generate  # first: it loads a BLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from compare import agree, worst
from decoding import BACKENDS, GENERATE, P, V, logits_of, make_config, make_model, make_weights, oracle, some_tokens
from transformers import AutoModelForCausalLM

import torch_ref.generate as torch_generate
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.inference import generation, sampling
from mlxgpt.model import make_cache as mlx_cache
from torch_ref.model import make_cache as torch_cache

FAMILIES = ("gpt2", "llama", "qwen3")

# ---- rung 6: cached decoding and chunked prefill are the full forward pass


def in_chunks(backend: str, model, tokens: list[int], cuts: list[int]) -> np.ndarray:
    cache = (mlx_cache if backend == "mlx" else torch_cache)(model, 1, P)
    edges = [0, *cuts, len(tokens)]
    pieces = [logits_of(backend, model, [tokens[a:b]], cache=cache) for a, b in pairwise(edges)]
    assert cache[0].offset == len(tokens)
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_is_the_full_forward_pass(backend: str, family: str) -> None:
    model, tokens = make_model(backend, make_config(family)), some_tokens(P)
    full = logits_of(backend, model, [tokens])
    agree("token by token", in_chunks(backend, model, tokens, list(range(1, P))), full, 1e-5)
    agree("chunks of unequal length", in_chunks(backend, model, tokens, [5, 6, 19, 36]), full, 1e-5)
    agree("last_only", logits_of(backend, model, [tokens], last_only=True), full[:, -1:], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_check_sees_a_mask_aligned_to_the_wrong_corner(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model(backend, make_config("llama")), some_tokens(P)
    full = logits_of(backend, model, [tokens])

    def upper_left(self, T, S, *_):
        mask = np.arange(S)[None, :] <= np.arange(T)[:, None]
        return mx.array(mask) if backend == "mlx" else torch.from_numpy(mask)

    monkeypatch.setattr(type(model), "mask", upper_left)
    assert worst("mutant", in_chunks(backend, model, tokens, [5, 20]), full) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_chunks_and_layout_do_not_change_the_tokens(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, sizes = GENERATE[backend], make_config("llama")
    prompts, sample = [some_tokens(21), some_tokens(9, 1)], SampleConfig(max_tokens=12)
    expected = module.generate(make_model(backend, sizes), None, prompts, sample)
    monkeypatch.setattr(module, "PREFILL", 4)
    assert module.generate(make_model(backend, sizes), None, prompts, sample) == expected
    model, plain = make_model(backend, sizes), make_model(backend, sizes)
    module.prepare(model)
    agree("prepared", logits_of(backend, model, prompts[:1]), logits_of(backend, plain, prompts[:1]), 1e-5)
    assert module.generate(model, None, prompts, sample) == expected


# ---- rung 7: both frameworks draw the tokens that the numpy specification draws

SAMPLES: list[dict[str, Any]] = [
    dict(temperature=0.0),
    dict(temperature=0.0, repetition_penalty=1.3),
    dict(temperature=1.0),
    dict(temperature=0.7, seed=5),
    dict(temperature=1.5, top_k=5),
    dict(temperature=1.5, top_k=V + 1),
    dict(temperature=1.5, top_p=0.8),
    dict(temperature=1.5, min_p=0.1),
    dict(temperature=1.0, repetition_penalty=1.4),
    dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=9),
    dict(temperature=0.0, presence_penalty=2.0),
    dict(temperature=0.0, frequency_penalty=1.5),
    dict(temperature=1.0, presence_penalty=-1.0, frequency_penalty=-0.5, repetition_penalty=0.9),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", SAMPLES, ids=str)
def test_both_frameworks_draw_what_the_specification_draws(family: str, options: dict) -> None:
    sizes, prompt, sample = make_config(family), some_tokens(7), SampleConfig(max_tokens=24, **options)
    expected = oracle(make_model("torch", sizes), prompt, sample)
    for backend in BACKENDS:
        found = GENERATE[backend].generate(make_model(backend, sizes), None, [prompt], sample)[0].tokens
        assert found == expected, backend


def test_every_option_changes_the_tokens() -> None:
    sizes, prompt = make_config("gpt2"), some_tokens(7)
    model = make_model("torch", sizes, scale=3.0)
    drawn = [
        oracle(model, prompt, SampleConfig(max_tokens=24, **options))
        for options in SAMPLES
        if options.get("top_k") != V + 1
    ]
    assert len(set(map(tuple, drawn))) == len(drawn)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_on_device_is_the_specification_over_many_rows(backend: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 301)).astype(np.float32) * 3
    logits[::2] -= 12  # rows in which all are negative, so that the penalty of those decides as well
    seen = rng.random(logits.shape) < 0.2
    keys = rng.integers(0, 2**32, len(logits), dtype=np.uint32)
    for options in SAMPLES:
        sample = SampleConfig(**options)
        if backend == "mlx":
            found = np.array(
                mlx_generate.sample_tokens(mx.array(logits), mx.array(seen.tolist()), mx.array(keys), sample)
            )
        else:
            arrays = (torch.from_numpy(logits), torch.from_numpy(seen), torch.from_numpy(keys.view(np.int32)))
            found = torch_generate.sample_tokens(*arrays, sample).numpy()
        assert np.array_equal(found, sampling.sample_tokens(logits, seen, keys, sample)), options


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_on_device_is_the_specification(backend: str) -> None:
    keys = np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32)
    if backend == "mlx":
        found = np.array(mlx_generate.gumbel(mx.array(keys), 50_000))
    else:
        found = torch_generate.gumbel(torch.from_numpy(keys.view(np.int32)), 50_000).numpy()
    agree("gumbel", found, sampling.gumbel(keys, 50_000), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_the_specifications(backend: str) -> None:
    logits = np.array([[0, 3, 1, 3, 1, 2], [5, 5, 5, 5, 5, 5]], dtype=np.float32)
    as_array = mx.array if backend == "mlx" else torch.from_numpy
    for sample in (SampleConfig(top_k=1), SampleConfig(top_k=4), SampleConfig(top_p=0.5), SampleConfig(min_p=1.0)):
        found = np.array(GENERATE[backend].keep(as_array(logits), sample).tolist())
        assert np.array_equal(found, sampling.keep(logits, sample)), sample
    keys = as_array(np.zeros(2, np.int32)) if backend == "torch" else mx.zeros(2, mx.uint32)
    drawn = GENERATE[backend].sample_tokens(as_array(logits), None, keys, SampleConfig(temperature=0.0))
    assert drawn.tolist() == [1, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_what_transformers_generates(family: str, tmp_path: Path) -> None:
    sizes, prompt = make_config(family), some_tokens(7)
    write_model(tmp_path / "m", sizes, make_weights(sizes))
    judge: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    for penalty in (1.0, 1.4):
        options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        found = judge.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=penalty, **options)
        sample = SampleConfig(temperature=0.0, max_tokens=20, repetition_penalty=penalty)
        for backend in BACKENDS:
            ours = GENERATE[backend].generate(make_model(backend, sizes), None, [prompt], sample)[0].tokens
            assert ours == found[0, 7:].tolist(), (backend, penalty)


# ---- batches, context, errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(backend: str, family: str) -> None:
    """Prompts of 1 to P tokens: each ends where its own context ends, whatever its neighbors do."""
    model, generate = make_model(backend, make_config(family)), GENERATE[backend].generate
    prompts = [some_tokens(n, n) for n in (3, 17, 1, P, 30)]
    for sample in (SampleConfig(max_tokens=50), SampleConfig(max_tokens=50, temperature=0.0, repetition_penalty=1.2)):
        batch = generate(model, None, prompts, sample)
        assert batch == [generate(model, None, [prompt], sample)[0] for prompt in prompts]
        assert [len(result.tokens) for result in batch] == [P - len(prompt) + 1 for prompt in prompts]
        assert {result.finish_reason for result in batch} == {"context"}
        assert [result.prompt_tokens for result in batch] == [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_a_prompt_differ_and_seeds_differ(backend: str) -> None:
    model, generate = make_model(backend, make_config("llama"), scale=2.0), GENERATE[backend].generate
    a, b = some_tokens(3), some_tokens(4, 1)
    batch = generate(model, None, [a, b, a, a], SampleConfig(max_tokens=20))
    assert len({tuple(result.tokens) for result in batch}) == 4
    assert batch[0] == generate(model, None, [a], SampleConfig(max_tokens=20))[0]
    assert batch[0] != generate(model, None, [a], SampleConfig(max_tokens=20, seed=1))[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_step_is_queued_before_a_token_is_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = make_config("llama")
    model, steps = make_model(backend, sizes), []
    draw = GENERATE[backend].sample_tokens
    monkeypatch.setattr(GENERATE[backend], "sample_tokens", lambda *args: (steps.append(0), draw(*args))[1])
    rows = generation.start_rows(sizes, None, [some_tokens(3)], ())
    tokens = GENERATE[backend].decode(model, rows, SampleConfig(max_tokens=3), V)
    counts = [len(steps) for _ in tokens]
    assert counts == [2, 3, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_asked_for(backend: str) -> None:
    model = make_model(backend, make_config("gpt2"))
    result = GENERATE[backend].generate(model, None, [[1, 2]], SampleConfig(max_tokens=0))[0]
    assert result == generation.Result("", [], 2, "length")
    assert GENERATE[backend].generate(model, None, [], SampleConfig()) == []
    rows = generation.start_rows(model.config, None, [[1, 2]], ())
    assert list(GENERATE[backend].decode(model, rows, SampleConfig(max_tokens=0), V)) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_finite_stop_the_run(backend: str) -> None:
    sizes = make_config("gpt2")
    for bad in (float("nan"), float("inf")):
        model = make_model(backend, sizes)
        if backend == "mlx":
            model.ln_f.weight = mx.full((32,), bad)
        else:
            model.ln_f.weight.data.fill_(bad)
        with pytest.raises(RunError, match="prompt 1, token 1: the model's logits are not finite"):
            GENERATE[backend].generate(model, None, [[1, 2]], SampleConfig(max_tokens=5))


class Unused:
    """A model that must not be run."""

    def __init__(self) -> None:
        self.config = make_config("llama")


ERRORS = [
    ([some_tokens(P + 1)], (), "prompt 1: 41 tokens; expected at most model.block_size = 40"),
    ([[1], []], (), "prompt 2: empty; expected at least one token"),
    ([[1, V]], (), "prompt 1: token id 61; expected 0 to 60, the model's vocabulary"),
    ([[-1]], (), "prompt 1: token id -1; expected 0 to 60, the model's vocabulary"),
    (["text"], (), "prompt 1: text needs a tokenizer, and this model has none; expected token ids"),
    ([[1]], ("x",), "stop strings need a tokenizer, and this model has none"),
    ([[1]], ("",), "stop string '': expected at least one character"),
    ("text", (), "prompts = 'text': expected a list of prompts"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompts, stop, message", ERRORS)
def test_wrong_prompts_are_refused_before_the_start(backend: str, prompts: object, stop: tuple, message: str) -> None:
    with pytest.raises(UserError) as caught:
        GENERATE[backend].generate(Unused(), None, prompts, SampleConfig(), stop)
    assert str(caught.value) == message
