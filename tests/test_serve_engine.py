"""The engine of mlxgpt serve: what a request gets alone it gets in any company, in both frameworks."""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from decoding import BACKENDS, GENERATE, P, V, make_config, some_tokens
from serving import WAIT, Answer, asked, running, served_model, submit

from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.engine import Engine
from mlxgpt.common.serve.engine.prefixes import Prefixes
from mlxgpt.common.serve.work import Busy, Stopped

ENDS = (7,)
MANY = 1 << 20  # bytes


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with running(request.param, lambda: served_model(request.param, ends=ENDS), max_batch=6) as made:
        yield made


def requests(count: int, seed: int = 0) -> list[tuple[list[int], SampleConfig, dict[str, Any]]]:
    """Prompts of all lengths, each with settings of its own."""
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        sample = SampleConfig(
            max_tokens=int(rng.integers(1, 30)),
            temperature=float(rng.choice([0, 0.7, 1.3])),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1, 0.9])),
            min_p=float(rng.choice([0, 0.05])),
            repetition_penalty=float(rng.choice([1, 1.2])),
            presence_penalty=float(rng.choice([0, 0.5])),
            frequency_penalty=float(rng.choice([0, -0.3])),
            seed=int(rng.integers(1000)),
        )
        bias = {int(rng.integers(V)): 2.5} if number % 4 == 0 else {}
        made.append((some_tokens(int(rng.integers(1, P)), number), sample, {"bias": bias}))
    return made


def alone(backend: str, engine: Engine, prompt: list[int], sample: SampleConfig, bias: dict[int, float]) -> Any:
    served = next(iter(engine.served.values()))
    model = served_model(backend, served.model.config, ends=ENDS).model
    return GENERATE[backend].generate(model, None, [prompt], sample, ends=ENDS, bias=bias)[0]


def name_of(engine: Engine) -> str:
    return engine._backend.name


def test_a_request_gets_in_any_batch_what_it_gets_alone(engine: Engine) -> None:
    served, cases = engine.served["tiny"], requests(24)
    answers = [submit(engine, served, prompt, sample, **more) for prompt, sample, more in cases]
    reasons = set()
    for (prompt, sample, more), answer in zip(cases, answers, strict=True):
        found = alone(name_of(engine), engine, prompt, sample, more["bias"])
        assert answer.wait().tokens == [found.tokens]
        assert answer.reasons == [found.finish_reason]
        reasons.add(found.finish_reason)
    assert reasons == {"eos", "length", "context"}
    assert engine.counts.running == engine.counts.waiting == 0


def test_choices_are_the_copies_of_equal_prompts(engine: Engine) -> None:
    backend, served, prompt = name_of(engine), engine.served["tiny"], some_tokens(9)
    sample = SampleConfig(max_tokens=12, seed=7, temperature=1.0)
    model = served_model(backend, ends=ENDS).model
    expected = [one.tokens for one in GENERATE[backend].generate(model, None, [prompt] * 9, sample, ends=ENDS)]
    assert len({tuple(tokens) for tokens in expected}) > 5
    answer = submit(engine, served, prompt, sample, copies=range(9)).wait()  # more than the batch holds
    assert answer.tokens == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "choices",
    (
        {"rope_scaling": "longrope", "rope_original": 20, "rope_long": [4.0] * 4, "rope_short": [1.0] * 4},
        {"rope_scaling": "dynamic", "rope_original": 20, "rope_factor": 2.0},
        {"window": 6, "window_layers": [0]},
        {"position": "alibi", "family": "mlxgpt"},
        {"position": "learned", "family": "mlxgpt"},
    ),
    ids=("longrope", "dynamic", "window", "alibi", "learned"),
)
def test_rows_of_unequal_length_are_exact_for_every_kind_of_position(backend: str, choices: dict[str, Any]) -> None:
    choices = dict(choices)
    config = make_config(choices.pop("family", "llama"), **choices)
    with running(backend, lambda: served_model(backend, config), max_batch=4, cache_bytes=MANY) as engine:
        cases = [(some_tokens(length, length), SampleConfig(max_tokens=14, seed=length)) for length in (3, 12, 19, 25)]
        answers = [submit(engine, engine.served["tiny"], *case) for case in cases]
        for (prompt, sample), answer in zip(cases, answers, strict=True):
            model = served_model(backend, config).model
            assert answer.wait().tokens == [GENERATE[backend].generate(model, None, [prompt], sample)[0].tokens]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_read_is_not_read_again_and_changes_nothing(backend: str) -> None:
    config, prompt, sample = make_config("llama"), some_tokens(12), SampleConfig(max_tokens=6, seed=1)
    with running(backend, lambda: served_model(backend, config), cache_bytes=MANY) as engine:
        served = engine.served["tiny"]
        one = submit(engine, served, prompt, sample).wait()
        longer = [*prompt, *one.tokens[0], 5, 6, 7]  # the second turn of a chat
        two = submit(engine, served, longer, sample).wait()
        other = submit(engine, served, [*prompt[:10], 1, 2], sample).wait()
        strange = submit(engine, served, some_tokens(12, 9), sample).wait()
    assert [each.begun and each.begun.cached for each in (one, two, other, strange)] == [0, 17, 10, 0]
    assert (engine.counts.cached_tokens, engine.counts.cache_hits, engine.counts.cache_misses) == (27, 2, 2)
    model = served_model(backend, config).model
    for ids, answer in ((longer, two), ([*prompt[:10], 1, 2], other)):
        assert answer.tokens == [GENERATE[backend].generate(model, None, [ids], sample)[0].tokens]


def test_the_least_used_are_forgotten_and_beginnings_are_held_once() -> None:
    class Sizes:
        """Keys and values that are as large as their tokens."""

        @staticmethod
        def size(layers: int) -> int:
            return layers

        @staticmethod
        def first(layers: int, tokens: int) -> int:
            return tokens

        @staticmethod
        def reaches(layers: int, tokens: int) -> bool:
            return True

    config, held = make_config("llama"), Prefixes(100, Sizes)
    a, b, c = (some_tokens(40, seed) for seed in (1, 2, 3))
    held.add("m", a[:20], 20)
    held.add("m", a, 40)
    held.add("m", a[:30], 30)
    assert held.bytes == 40
    held.add("m", b, 40)
    assert held.find("m", config, a) == (39, 39)  # one token is left to read
    held.add("m", c, 40)
    assert (held.find("m", config, b), held.find("m", config, a)[0]) == ((0, None), 39)
    assert held.find("other", config, a) == (0, None)
    assert held.find("m", config, a[:8]) == (0, None)
    held.add("m", some_tokens(200, 5), 200)
    assert held.bytes == 80


def test_keys_of_a_longer_sequence_are_not_taken_where_frequencies_depend_on_length() -> None:
    config = make_config("llama", rope_scaling="dynamic", rope_original=20, rope_factor=2.0)
    assert Prefixes._usable(config, 20, 20)
    assert not Prefixes._usable(config, 21, 20)
    assert not Prefixes._usable(config, 20, 21)
    assert Prefixes._usable(make_config("llama"), 21, 30)


def held_back(engine: Engine, served: Any) -> tuple[Answer, threading.Event]:
    """An endless request that holds the engine at its first token until the event is set."""
    work, answer = asked(served, [1], SampleConfig(max_tokens=P + 9, seed=3), bias={end: -1e9 for end in served.ends})
    entered, go = threading.Event(), threading.Event()

    def wait(said: Any) -> None:
        if not entered.is_set():
            entered.set()
            assert go.wait(WAIT)

    answer.heard = wait
    engine.submit(work)
    assert entered.wait(WAIT)
    return answer, go


def test_a_request_whose_client_left_frees_its_rows_and_no_other() -> None:
    with running("mlx", lambda: served_model("mlx"), max_batch=3, cache_bytes=MANY) as engine:
        served = engine.served["tiny"]
        first, go = held_back(engine, served)
        gone, quiet = asked(served, some_tokens(9), SampleConfig(max_tokens=20), copies=(0, 1))
        later, never = asked(served, some_tokens(9), SampleConfig(max_tokens=20), copies=(0, 1))
        stays = submit(engine, served, some_tokens(9), SampleConfig(max_tokens=20))
        for work in (gone, later):
            engine.submit(work)
            engine.cancel(work)
        go.set()
        assert first.wait().reasons == ["context"]
        assert stays.wait().reasons == ["length"]
        assert not quiet.pieces and not never.pieces
        assert (engine.counts.cancelled, engine.counts.finished) == (4, 2)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    with running("mlx", lambda: served_model("mlx"), max_batch=1, max_queue=2) as engine:
        served = engine.served["tiny"]
        first, go = held_back(engine, served)
        sample = SampleConfig(max_tokens=2)
        # the first is no longer in the queue, and holds its place
        taken = [submit(engine, served, [2], sample) for _ in range(2)]
        with pytest.raises(Busy) as refused:
            submit(engine, served, [2], sample)
        assert refused.value.seconds >= 1
        go.set()
        assert [each.wait().reasons for each in (first, *taken)] == [["context"], ["length"], ["length"]]
        submit(engine, served, [2], sample).wait()


def test_an_engine_that_drains_answers_what_it_took_and_takes_nothing_more() -> None:
    with running("torch", lambda: served_model("torch"), max_batch=1) as engine:
        served = engine.served["tiny"]
        first, go = held_back(engine, served)
        second = submit(engine, served, [2], SampleConfig(max_tokens=5))
        engine.stop(drain=True)
        with pytest.raises(Stopped, match="ending"):
            submit(engine, served, [2], SampleConfig(max_tokens=5))
        go.set()
        assert engine.join(WAIT)
        assert (first.reasons, second.reasons) == (["context"], ["length"])
        assert engine.death is None


def test_an_engine_that_is_stopped_tells_everyone() -> None:
    with running("mlx", lambda: served_model("mlx"), max_batch=1) as engine:
        served = engine.served["tiny"]
        first, go = held_back(engine, served)
        second = submit(engine, served, [2], SampleConfig(max_tokens=5))
        engine.stop(drain=False)
        go.set()
        assert (first.wait().reasons, second.wait().reasons) == (["cancelled"], ["cancelled"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_says_so_to_all_and_takes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with running("mlx", lambda: served_model("mlx"), max_batch=1) as engine:
        served = engine.served["tiny"]
        first, go = held_back(engine, served)
        second = submit(engine, served, [2], SampleConfig(max_tokens=5))

        def broken(*_: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(engine._backend.batching.Batch, "draw", broken)
        go.set()
        assert engine.join(WAIT)
        assert "a bug" in first.wait().errors[0] and "a bug" in second.wait().errors[0]
        assert isinstance(engine.death, RuntimeError)
        with pytest.raises(Stopped, match="a bug"):
            submit(engine, served, [2], SampleConfig(max_tokens=5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_thread_gives_its_streams_back(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, batching = [], backends.load(backend).batching
    leave = batching.leave
    monkeypatch.setattr(batching, "leave", lambda: (threads.append(threading.current_thread().name), leave()))
    with running(backend, lambda: served_model(backend)) as engine:
        submit(engine, engine.served["tiny"], [2], SampleConfig(max_tokens=2)).wait()
    assert threads == ["mlxgpt-engine"]


def test_a_model_that_does_not_load_is_an_error_of_the_start() -> None:
    def broken() -> Any:
        raise UserError("no model")

    with pytest.raises(UserError, match="no model"), running("mlx", broken):
        pass


class Wall:
    """A constraint that breaks at its third token."""

    over = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> np.ndarray:
        if len(self.taken) == 2:
            raise UserError("no way on")
        return np.arange(V) % 2 == 1

    def take(self, token: int) -> None:
        self.taken.append(token)


class Bug(Wall):
    """A constraint whose code is wrong."""

    def take(self, token: int) -> None:
        raise KeyError("a bug")


def test_a_bad_row_ends_alone(engine: Engine) -> None:
    served, prompt, sample = engine.served["tiny"], some_tokens(5), SampleConfig(max_tokens=8, seed=5)
    good = submit(engine, served, prompt, sample)
    bad = submit(engine, served, prompt, sample, constrain=Wall)
    wrong = submit(engine, served, prompt, sample, constrain=Bug)
    worse = submit(engine, served, prompt, sample, bias={3: float("nan")})
    assert good.wait().tokens == [alone(name_of(engine), engine, prompt, sample, {}).tokens]
    assert bad.wait().errors == ["no way on"]
    assert "a bug" in wrong.wait().errors[0]
    assert all(token % 2 for token in bad.tokens[0]) and len(bad.tokens[0]) == 2
    assert "logit_bias" in worse.wait().errors[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_finite_end_their_row_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(backend, lambda: served_model(backend), max_batch=2) as engine:
        served = engine.served["tiny"]
        draw = engine._backend.batching.Batch.draw

        def poisoned(batch: Any, choices: Any) -> Any:
            if len(batch.lengths) == 2:
                row = batch.lengths.index(min(batch.lengths))
                batch._logits = batch._logits * 1.0
                batch._logits[row] = float("nan")
            return draw(batch, choices)

        monkeypatch.setattr(engine._backend.batching.Batch, "draw", poisoned)
        first, go = held_back(engine, served)
        other = submit(engine, served, some_tokens(20), SampleConfig(max_tokens=5))
        go.set()
        assert "not finite" in first.wait().errors[0]
        assert other.wait().reasons == ["length"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_are_those_of_the_model_alone(backend: str) -> None:
    prompt = some_tokens(11)
    sample = SampleConfig(max_tokens=5, temperature=2.0, top_k=9, repetition_penalty=1.5, seed=2)
    with running(backend, lambda: served_model(backend), cache_bytes=MANY) as engine:
        served = engine.served["tiny"]
        submit(engine, served, prompt, sample).wait()
        answer = submit(engine, served, prompt, sample, logprobs=3, score_prompt=True).wait()
        plain = submit(engine, served, prompt, dataclasses.replace(sample, max_tokens=0), logprobs=0).wait()
    model, ids = served_model(backend).model, prompt + answer.tokens[0]
    logits = _logits(backend, model, ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert answer.begun and answer.begun.scores[0].logprob is None
    assert answer.begun.cached == 0  # a prompt that is scored is read whole
    drawn = [*answer.begun.scores[1:], *(each for piece in answer.pieces for each in piece.drawn)]
    assert [each.token for each in drawn] == ids[1:]
    for place, each in enumerate(drawn):
        order = np.argsort(-expected[place], kind="stable")[:3]
        assert abs((each.logprob or 0) - expected[place, each.token]) < 1e-4
        assert [token for token, _ in each.top] == order.tolist()
        assert np.abs(np.array([value for _, value in each.top]) - expected[place, order]).max() < 1e-4
    assert (plain.reasons, plain.tokens, plain.begun and plain.begun.scores) == (["length"], [[]], ())


def _logits(backend: str, model: Any, ids: list[int]) -> np.ndarray:
    from decoding import logits_of

    return logits_of(backend, model, [ids])[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_prompt_is_read_between_the_steps_of_others(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(backend, lambda: served_model(backend), max_batch=2) as engine:
        monkeypatch.setattr(engine._backend.generate, "PREFILL", 4)
        served, order = engine.served["tiny"], []
        first, go = held_back(engine, served)
        work, second = asked(served, some_tokens(22), SampleConfig(max_tokens=3))
        first.heard = lambda said: order.append("token")
        second.heard = lambda said: order.append(type(said).__name__)
        engine.submit(work)
        go.set()
        assert first.wait() and second.wait()
        assert order.index("Begun") >= 5  # 22 tokens, 4 at a time
        model = served_model(backend).model
        assert second.tokens == [GENERATE[backend].generate(model, None, [work.prompt], work.sample)[0].tokens]


def test_models_of_one_engine_draw_side_by_side() -> None:
    other = make_config("llama", n_layer=1)
    makers = (lambda: served_model("mlx"), lambda: served_model("mlx", other, "other"))
    prompt, sample, answers = some_tokens(6), SampleConfig(max_tokens=6, seed=1), []
    with running("mlx", *makers, max_batch=3, cache_bytes=MANY) as engine:
        for _ in range(2):
            answers = [submit(engine, served, prompt, sample) for served in engine.served.values()]
            for config, answer in zip((make_config("llama"), other), answers, strict=True):
                model = served_model("mlx", config).model
                assert answer.wait().tokens == [GENERATE["mlx"].generate(model, None, [prompt], sample)[0].tokens]
    assert answers[0].tokens != answers[1].tokens
