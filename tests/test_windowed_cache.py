"""A layer with a window holds what it still looks at: the same logits and tokens as one that holds everything."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from decoding import BACKENDS, GENERATE, logits_of, make_config, make_model, oracle, some_tokens
from serving import running, served_model, submit

import mlxgpt.batching
import mlxgpt.cache
import mlxgpt.model
import torch_ref.batching
import torch_ref.cache
import torch_ref.model
from mlxgpt.common import backend as backends
from mlxgpt.common.config import ModelConfig, SampleConfig
from mlxgpt.common.inference import kv_cache
from mlxgpt.common.inference.conversation import Conversation

MODULES: dict[str, Any] = {"mlx": mlxgpt.model, "torch": torch_ref.model}
CACHES: dict[str, Any] = {"mlx": mlxgpt.cache, "torch": torch_ref.cache}
BATCHING: dict[str, Any] = {"mlx": mlxgpt.batching, "torch": torch_ref.batching}
WINDOW, LONG = 9, 160
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral"},
    "gemma2": {"family": "gemma2"},
    "gemma3_text": {"family": "gemma3_text", "n_layer": 3, "window_layers": [0, 2]},
    "gpt_neo": {"family": "gpt_neo", "n_kv_head": 4},
    "alibi": {"family": "mlxgpt", "position": "alibi", "window_layers": [1]},
    "dynamic": {"family": "mistral", "rope_scaling": "dynamic", "rope_original": 60, "rope_factor": 2.0},
}


def windowed(name: str = "gemma3_text", **more: Any) -> ModelConfig:
    """Local layers, all or some, that see a small part of the context."""
    return make_config(**{"window": WINDOW, "block_size": LONG, **FAMILIES[name], **more})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and slack so small that a window passes tokens often."""
    monkeypatch.setattr(kv_cache, "SLACK", 3)
    for module in (kv_cache, *CACHES.values()):
        monkeypatch.setattr(module, "BLOCK", 4)


def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, caches keep all tokens, as if they had no window."""
    monkeypatch.setattr(kv_cache, "kept", lambda window: LONG)


def chunks(backend: str, model: Any, tokens: list[list[int]], edges: list[int]) -> tuple[np.ndarray, list[Any]]:
    """Logits of texts that are read in pieces, and the cache."""
    cache = MODULES[backend].make_cache(model, len(tokens), LONG)
    made = [
        logits_of(backend, model, [row[start:stop] for row in tokens], cache=cache) for start, stop in pairwise(edges)
    ]
    return np.concatenate(made, 1), cache


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_computes_what_an_unbounded_cache_computes(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = windowed(name)
    model, tokens = make_model(backend, config), [some_tokens(70), some_tokens(70, 1)]
    whole = logits_of(backend, model, tokens)
    cuts = [[0, 5, 6, 20, 21, 22, 23, 24, 55, *range(56, 71)], [0, 60, *range(61, 71)], [0, 69, 70]]
    found = [chunks(backend, model, tokens, edges) for edges in (cuts if name != "dynamic" else cuts[1:2])]
    for _, cache in found[:1]:
        for n, layer in enumerate(cache):
            most = WINDOW - 1 + 3 + 4
            assert layer.parts[0].shape[2] <= most if n in config.window_layers else layer.held == 70
    unbounded(monkeypatch)
    for (logits, _), edges in zip(found, cuts if name != "dynamic" else cuts[1:2], strict=True):
        right, cache = chunks(backend, model, tokens, edges)
        assert min(layer.held for layer in cache) == 70
        assert np.abs(logits - right).max() < 1.5e-6 * np.abs(right).max()
        if name != "dynamic":  # its frequencies follow the length of each pass
            assert np.abs(logits - whole).max() < 3e-5 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_far_beyond_the_window_draws_the_tokens_of_full_passes(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unequal length, padded, read in pieces."""
    config = windowed(name)
    model, reference = make_model(backend, config), make_model("torch", config)
    monkeypatch.setattr(GENERATE[backend], "PREFILL", 16)
    sample = SampleConfig(temperature=0.8, top_k=20, max_tokens=25, seed=2)
    prompts = [some_tokens(50, 1), some_tokens(3, 2)]
    found = GENERATE[backend].generate(model, None, prompts, sample)
    assert [each.tokens for each in found] == [oracle(reference, prompt, sample) for prompt in prompts]


@pytest.mark.parametrize("name", ["gemma3_text", "alibi"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_unequal_length_join_and_leave(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And begin with what others left, where a window still holds it; else they are read anew."""
    config = windowed(name)
    model = make_model(backend, config)
    monkeypatch.setattr(GENERATE[backend], "PREFILL", 16)
    with running(backend, lambda: served_model(backend, config), max_batch=3, cache_bytes=1 << 20) as engine:
        served = engine.served["tiny"]
        sizes = ((4, 30), (70, 20), (23, 12), (41, 9))
        cases = [(some_tokens(size, size), SampleConfig(max_tokens=count, seed=size)) for size, count in sizes]
        answers = [submit(engine, served, *case) for case in cases]
        answers = [answer.wait() for answer in answers]
        long, sample = cases[1]
        more = [[*long, *answers[1].tokens[0], 5, 6], [*long[:69], 7, 8], [*long[:50], 1, 2]]
        cases += [(ids, sample) for ids in more]
        answers += [submit(engine, served, ids, sample).wait() for ids in more]
    cached = [answer.begun and answer.begun.cached for answer in answers[4:]]
    assert cached == [89, 69, 0]  # a continuation, one within the slack, and one whose keys are gone
    for (prompt, settings), answer in zip(cases, answers, strict=True):
        assert answer.tokens == [GENERATE[backend].generate(model, None, [prompt], settings)[0].tokens]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_cut_back_by_the_slack(backend: str) -> None:
    config = windowed()
    model, batching = make_model(backend, config), BATCHING[backend]
    batch, texts = batching.Batch(model, config.vocab_size), [some_tokens(37, 1), some_tokens(90, 2)]
    for text in texts:
        prompt = batching.Prompt(model, text[:-5], config.vocab_size)
        while prompt.left:
            prompt.read(16)
        batch.join(prompt, 1)
    nothing: list[Any] = [(), ()]
    for place in range(-5, 0):
        batch.ahead([text[place] for text in texts], nothing, nothing)
    right = np.array(batch._logits.tolist())
    for back in (1, 3, 2):
        batch.cut([len(text) - back for text in texts])
        for place in range(-back, 0):
            batch.ahead([text[place] for text in texts], nothing, nothing)
        assert np.abs(np.array(batch._logits.tolist()) - right).max() < 1e-6 * np.abs(right).max()
    for row, text in enumerate(texts):
        whole = logits_of(backend, model, [text])[0, -1]
        assert np.abs(right[row] - whole).max() < 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_that_goes_farther_back_is_read_anew(backend: str) -> None:
    class Template:
        end_id = 0

    class Tokens:
        n_vocab = 61

    model = make_model(backend, windowed())
    talk: Any = Conversation(backends.load(backend), model, Tokens(), Template(), set())  # type: ignore[arg-type]
    text = some_tokens(100)
    logits_of(backend, model, [text], cache=talk._cache)
    logits_of(backend, model, [[1]], cache=talk._cache)  # the window lets go of what it passed
    talk._held = [*text, 1]
    assert talk._cut([*text[:99], 5, 6]) == 99
    talk._held = text[:99]
    assert talk._cut([*text[:40], 5, 6]) == 0
    found = logits_of(backend, model, [[*text[:40], 5]], cache=talk._cache)
    right = logits_of(backend, model, [[*text[:40], 5]])
    assert np.abs(found - right).max() < 1e-5 * np.abs(right).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_text_costs_memory_in_the_global_layers_only(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    config = windowed("gemma3_text", block_size=4096)
    model = make_model(backend, config)
    cache = MODULES[backend].make_cache(model, 1, 4096)
    ids = some_tokens(2048)
    for start in range(0, 2000, 500):
        logits_of(backend, model, [ids[start : start + 500]], cache=cache)
    for place in range(2000, 2048):
        logits_of(backend, model, [ids[place : place + 1]], cache=cache)
    assert [layer.held for layer in cache] == [120, 2048, 120]  # eight of the window, the slack, what was read since
    assert sum(layer.nbytes for layer in cache) == kv_cache.size(config, 1, 2048, 4)
    most = WINDOW - 1 + kv_cache.SLACK + kv_cache.BLOCK
    assert kv_cache.size(config, 1, 2048, 4) == 2 * 2 * 8 * 4 * (2048 + 2 * most)


def test_one_token_too_few_or_a_mask_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model("torch", windowed()), [some_tokens(40)]
    right = logits_of("torch", model, tokens)

    def differs() -> float:
        found, _ = chunks("torch", model, tokens, [0, 24, *range(25, 41)])
        return float(np.abs(found - right).max() / np.abs(right).max())

    assert differs() < 1e-5
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "kept", lambda window: window - 2)
        assert differs() > 1e-3
        patch.setattr(kv_cache, "kept", lambda window: window - 1)
        assert differs() < 1e-5
    real = torch_ref.model.Model.mask
    for more in (1, -1):
        with monkeypatch.context() as patch:
            patch.setattr(torch_ref.model.Model, "mask", lambda *args, more=more: real(*_wider(args, more)))
            assert differs() > 1e-3


def _wider(args: tuple[Any, ...], more: int) -> tuple[Any, ...]:
    """The arguments of Model.mask with another window."""
    return (*args[:5], args[5] and args[5] + more, *args[6:])
