"""A cache grows in blocks: the same bits as one allocated whole, and no more memory than what it holds asks for."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from decoding import BACKENDS, GENERATE, P, logits_of, make_config, make_model, some_tokens

import mlxgpt.cache
import mlxgpt.model
import torch_ref.cache
import torch_ref.model
from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.inference import generation
from mlxgpt.common.inference.conversation import Conversation

MODULES: dict[str, Any] = {"mlx": mlxgpt.model, "torch": torch_ref.model}
GROWN: dict[str, Any] = {"mlx": mlxgpt.cache, "torch": torch_ref.cache}
LONG = 131_072
EDGES = [0, 5, 8, 9, 20, 21, 31, 32, 33, P]  # of chunks: into, up to and over the ends of blocks of 8


def chunks(backend: str, model: Any, tokens: list[list[int]], pads: list[int] | None) -> list[np.ndarray]:
    """Logits of every chunk, and what the caches hold in the end."""
    generate = GENERATE[backend]
    array = (lambda a: generate.mx.array(a)) if backend == "mlx" else (lambda a: generate.torch.tensor(a))
    cache, made = MODULES[backend].make_cache(model, len(tokens), P), []
    for start, stop in pairwise(EDGES):
        more: dict[str, Any] = {}
        if pads:
            places = np.clip(np.arange(start, stop)[None] - np.array(pads)[:, None], 0, P - 1).astype(np.int32)
            more = {"positions": array(places), "pad": array(pads)}
        made.append(logits_of(backend, model, [row[start:stop] for row in tokens], cache=cache, **more))
    held = [each[:, :, :P] for layer in cache for each in layer.parts]
    return made + [np.array(each) if backend == "mlx" else each.numpy() for each in held]


@pytest.mark.parametrize("pads", [None, [0, 11]], ids=["equal", "padded"])
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_growing_cache_computes_the_bits_of_a_whole_one(
    backend: str, family: str, pads: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(backend, make_config(family, **({"window": 12} if family == "mistral" else {})))
    tokens = [some_tokens(P), some_tokens(P, 1)]
    found = {}
    for block in (8, LONG):
        monkeypatch.setattr(GROWN[backend], "BLOCK", block)
        found[block] = chunks(backend, model, tokens, pads)
    for grown, whole in zip(found[8], found[LONG], strict=True):
        assert np.array_equal(grown, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_of_a_batch_continue_alike_however_the_cache_grows(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generate = make_model(backend, make_config("llama")), GENERATE[backend]
    monkeypatch.setattr(generate, "PREFILL", 6)
    drawn = {}
    for block in (4, LONG):
        monkeypatch.setattr(GROWN[backend], "BLOCK", block)
        sample = SampleConfig(temperature=0.9, max_tokens=20, seed=4)
        drawn[block] = [each.tokens for each in generate.generate(model, None, [some_tokens(17), [5, 6]], sample)]
    assert drawn[4] == drawn[LONG]
    assert [len(tokens) for tokens in drawn[4]] == [20, 20]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_context_costs_nothing_until_it_is_used(backend: str) -> None:
    """131,072 positions at once would be 64 MiB here, of which a few tokens need a block."""
    model = make_model(backend, make_config("llama", block_size=LONG))
    row = generation.start_rows(model.config, None, [[1, 2, 3]], ())
    sample, module, whole = SampleConfig(temperature=0.0, max_tokens=LONG), MODULES[backend], 2 * 2 * 2 * LONG * 8 * 4
    cache, mx = module.make_cache(model, 1, LONG), GENERATE["mlx"].mx
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    steps = GENERATE[backend].decode(model, row, sample, model.config.vocab_size, cache)
    for _ in range(GROWN[backend].BLOCK):  # over the end of the first block
        next(steps)
    steps.close()
    held = sum(each.nbytes for layer in cache for each in layer.parts)
    assert held == whole * 2 * GROWN[backend].BLOCK // LONG
    assert mx.get_peak_memory() - before < whole / 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_begins_with_an_empty_cache(backend: str) -> None:
    class Template:
        end_id = 0

    class Tokens:
        n_vocab = 61

    model = make_model(backend, make_config("llama", block_size=LONG))
    talk: Any = Conversation(backends.load(backend), model, Tokens(), Template(), set())  # type: ignore[arg-type]
    assert sum(each.nbytes for layer in talk._cache for each in layer.parts) == 0
    assert talk._cache[0].length == LONG
