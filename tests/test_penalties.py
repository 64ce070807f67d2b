"""What is added to logits: penalties by counts, biases, what may not come; and the log-probabilities of tokens."""

from types import SimpleNamespace
from typing import Any

import mlxgpt.generate  # noqa: F401  (it loads a BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
import torch
from compare import agree
from decoding import BACKENDS, GENERATE, V, logits_of, make_config, make_model, oracle, some_tokens

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference import sampling

KINDS: list[dict[str, Any]] = [
    dict(temperature=0.0),
    dict(temperature=0.0, repetition_penalty=1.3),
    dict(temperature=0.7, seed=5),
    dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=9),
]


def as_arrays(backend: str, *values: np.ndarray) -> tuple:
    if backend == "mlx":
        return tuple(mx.array(value) for value in values)
    return tuple(torch.from_numpy(value.view(np.int32) if value.dtype == np.uint32 else value) for value in values)


def on_host(array: Any) -> np.ndarray:
    return array.numpy() if isinstance(array, torch.Tensor) else np.array(array)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_added_to_logits_is_the_specification_over_many_rows(backend: str) -> None:
    draw, module = np.random.default_rng(2), GENERATE[backend]
    logits = draw.normal(size=(100, 301)).astype(np.float32) * 3
    seen, bias = draw.random(logits.shape) < 0.2, draw.normal(size=301).astype(np.float32)
    counts, keys = draw.integers(0, 4, logits.shape).astype(np.float32), draw.integers(0, 2**32, 100, dtype=np.uint32)
    bias[draw.integers(0, 301, 60)] = -np.inf
    on_device = as_arrays(backend, logits, seen, keys)
    for options in KINDS:
        presence, frequency = draw.uniform(-2, 2, 2).tolist()
        sample = SampleConfig(**options)
        expected = sampling.added(counts, bias, presence, frequency)
        found = module.added(*as_arrays(backend, counts, bias), presence, frequency)
        assert np.array_equal(on_host(found), expected)
        none = module.added(as_arrays(backend, counts)[0], None, presence, frequency)
        assert np.array_equal(on_host(none), sampling.added(counts, None, presence, frequency))
        drawn = on_host(module.sample_tokens(*on_device, sample, found))
        assert np.array_equal(drawn, sampling.sample_tokens(logits, seen, keys, sample, expected)), options


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens_do_not_make_logits_infinite(backend: str) -> None:
    logits, masks = np.zeros((2, 5), np.float32), np.full((2, 5), -np.inf, np.float32)
    logits[1, 0], masks[:, 3] = np.nan, 0
    given = as_arrays(backend, logits, np.zeros(2, np.uint32), masks)
    for temperature in (0.0, 1.0):
        found = GENERATE[backend].sample_tokens(
            given[0], None, given[1], SampleConfig(temperature=temperature), given[2]
        )
        assert found.tolist() == [3, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_are_of_the_raw_logits_and_ties_go_to_the_lowest_id(backend: str) -> None:
    draw, module = np.random.default_rng(3), GENERATE[backend]
    logits = draw.integers(-4, 5, (50, 97)).astype(np.float32)  # many are equal
    logits[7] = 2
    tokens = draw.integers(0, 97, 50).astype(np.int32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    order = np.argsort(-logits, axis=-1, kind="stable")
    for count in (0, 1, 5, 20, 97, 120):
        chosen, ids, values = (on_host(each) for each in module.logprobs(*as_arrays(backend, logits, tokens), count))
        agree("chosen", chosen, exact[np.arange(50), tokens], 1e-6)
        assert np.array_equal(ids, order[:, :count]) and values.dtype == chosen.dtype == np.float32
        if count:
            agree("values", values, np.take_along_axis(exact, order[:, :count], axis=-1), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_a_text_are_those_of_its_logits_a_few_tokens_at_a_time(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, module, text, n_vocab = make_model(backend, make_config("llama")), GENERATE[backend], some_tokens(30), V - 3
    text = [min(token, n_vocab - 1) for token in text]
    exact = logits_of(backend, model, [text])[0, :-1, :n_vocab].astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    monkeypatch.setattr(module, "HEAD", 8)
    sizes, head = [], type(model).head
    monkeypatch.setattr(type(model), "head", lambda self, x: (sizes.append(x.shape[1]), head(self, x))[1])
    ids = mx.array([text]) if backend == "mlx" else torch.tensor([text])
    hidden, targets = model.hidden(ids)[:, :-1], np.array(text[1:])
    chosen, found, values = module.scores(model, hidden, targets, n_vocab, 5)
    assert sizes == [8, 8, 8, 5]
    assert all(isinstance(each, np.ndarray) for each in (chosen, found, values))
    order = np.argsort(-exact, axis=-1, kind="stable")[:, :5]
    agree("chosen", chosen, exact[np.arange(29), targets], 1e-5)
    assert np.array_equal(found, order)
    agree("values", values, np.take_along_axis(exact, order, axis=-1), 1e-5)
    shapes = [each.shape for each in module.scores(model, hidden[:, :0], targets[:0], n_vocab, 5)]
    assert shapes == [(0,), (0, 5), (0, 5)]


def test_both_frameworks_draw_what_the_specification_draws_at_settings_of_all_kinds() -> None:
    """Two prompts, one of them twice, under settings and biases drawn at random."""
    draw, sizes = np.random.default_rng(6), make_config("llama")
    models = {backend: make_model(backend, sizes) for backend in BACKENDS}
    prompts, kinds = [some_tokens(7), some_tokens(11, 1), some_tokens(7)], set()
    for case in range(12):
        maybe = {
            "top_k": int(draw.integers(2, 50)),
            "top_p": float(draw.uniform(0.6, 1)),
            "min_p": float(draw.uniform(0, 0.1)),
            "repetition_penalty": float(draw.uniform(0.8, 1.5)),
            "presence_penalty": float(draw.uniform(-2, 2)),
            "frequency_penalty": float(draw.uniform(-1, 2)),
        }
        chosen = {name: value for name, value in maybe.items() if draw.random() < 0.6}
        temperature = 0.0 if case % 4 == 0 else float(draw.uniform(0.5, 2))
        sample = SampleConfig(max_tokens=12, temperature=temperature, seed=case, **chosen)
        biased = draw.integers(0, V, 20).tolist() if case % 3 else []
        bias = {token: float(draw.choice([-100, -1.5, 0.5, 3])) for token in biased}
        expected = [
            oracle(models["torch"], prompt, sample, bias, copy) for prompt, copy in zip(prompts, (0, 0, 1), strict=True)
        ]
        kinds |= {*chosen, "greedy" if not temperature else "drawn", "biased" if bias else "free"}
        for backend in BACKENDS:
            found = GENERATE[backend].generate(models[backend], None, prompts, sample, bias=bias)
            assert [result.tokens for result in found] == expected, (backend, sample, bias)
    assert len(kinds) == 6 + 4  # each setting, greedy and not, with biases and without


@pytest.mark.parametrize("backend", BACKENDS)
def test_penalties_are_of_drawn_tokens_and_not_of_the_prompt(backend: str) -> None:
    """At temperature 0 with a presence penalty that outweighs the logits every token comes once, the prompt's too."""
    model, generate = make_model(backend, make_config("llama", block_size=V + 9), scale=1.0), GENERATE[backend].generate
    prompt = some_tokens(9)
    drawn = generate(model, None, [prompt], SampleConfig(temperature=0.0, max_tokens=V, presence_penalty=1e3))[0].tokens
    assert sorted(drawn) == list(range(V))
    # and by frequency each second time after all came once
    sample = SampleConfig(temperature=0.0, max_tokens=V, frequency_penalty=-1e3)
    assert len(set(generate(model, None, [prompt], sample)[0].tokens)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_of_drawn_tokens_are_those_of_the_whole_text(backend: str) -> None:
    """Of the raw logits, whatever the settings; in a batch as alone, of the tokens that are in the text."""
    model, generate = make_model(backend, make_config("llama")), GENERATE[backend].generate
    prompts = [some_tokens(7), some_tokens(3, 1)]
    sample = SampleConfig(max_tokens=8, temperature=1.5, top_k=5, presence_penalty=1.0)
    plain = generate(model, None, prompts, sample, bias={3: 2.0})
    ends = {plain[0].tokens[4]}
    batch = generate(model, None, prompts, sample, bias={3: 2.0}, top=4, ends=ends)
    assert batch[0].tokens == plain[0].tokens[: plain[0].tokens.index(*ends)] and not plain[0].logprobs
    for prompt, result in zip(prompts, batch, strict=True):
        exact = logits_of(backend, model, [prompt + result.tokens])[0, len(prompt) - 1 : -1].astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
        assert [each.token for each in result.logprobs] == result.tokens
        found = np.array([each.logprob for each in result.logprobs])
        agree("drawn", found, exact[np.arange(len(found)), result.tokens], 1e-5)
        order = np.argsort(-exact, axis=-1)[:, :4]
        assert [[token for token, _ in each.top] for each in result.logprobs] == order.tolist()
        values = np.array([[value for _, value in each.top] for each in result.logprobs])
        agree("likeliest", values, np.take_along_axis(exact, order, axis=-1), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_forbids_and_forces(backend: str) -> None:
    model, generate = make_model(backend, make_config("llama")), GENERATE[backend].generate
    sample = SampleConfig(max_tokens=10, temperature=2.0)
    assert generate(model, None, [[1, 2]], sample, bias={5: 1000})[0].tokens == [5] * 10
    found = generate(model, None, [[1, 2]], sample, bias=dict.fromkeys(range(0, V, 2), -1000.0))[0].tokens
    assert all(token % 2 for token in found)
    assert generate(model, None, [[1, 2]], sample, bias={})[0] == generate(model, None, [[1, 2]], sample)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "bias, message",
    [
        ({V: 1.0}, f"logit_bias: token id {V}; expected 0 to {V - 1}, the model's vocabulary"),
        ({-1: 1.0}, f"logit_bias: token id -1; expected 0 to {V - 1}"),
        ({"5": 1.0}, "logit_bias: token id '5'; expected 0 to"),
        ({True: 1.0}, "logit_bias: token id True; expected 0 to"),
        ({5: float("nan")}, "logit_bias of token 5 = nan: expected a number between -1e+10 and 1e+10"),
        ({5: float("-inf")}, "logit_bias of token 5 = -inf: expected a number"),
        ({5: "1"}, "logit_bias of token 5 = '1': expected a number"),
        ({5: None}, "logit_bias of token 5 = None: expected a number"),
        ({5: True}, "logit_bias of token 5 = True: expected a number"),
    ],
)
def test_wrong_biases_are_refused_before_the_start(backend: str, bias: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        GENERATE[backend].generate(SimpleNamespace(config=make_config("llama")), None, [[1]], SampleConfig(), bias=bias)
    assert message in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_generation_counts_and_adds_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, module, made = make_model(backend, make_config("llama")), GENERATE[backend], []
    draw, add = module.sample_tokens, module.added
    monkeypatch.setattr(module, "sample_tokens", lambda *args: (made.append(args), draw(*args))[1])
    monkeypatch.setattr(module, "added", lambda *args: (made.append("added"), add(*args))[1])
    module.generate(model, None, [[1, 2]], SampleConfig(max_tokens=3))
    assert len(made) == 3 and all(args[1] is args[4] is None for args in made)
    made.clear()
    module.generate(model, None, [[1, 2]], SampleConfig(max_tokens=3, frequency_penalty=0.5))
    assert made.count("added") == 3
