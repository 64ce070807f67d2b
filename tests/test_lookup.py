"""Drafts from the text itself: what they are, when they are made, and that nothing but the speed depends on them."""

import random
from functools import cache
from typing import Any

import pytest
from decoding import BACKENDS, make_config, make_model
from drafts import SETTINGS, Row, always, drafted, plain, ragged, same
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.inference.drafts import lookup, worth
from mlxgpt.common.inference.drafts.lookup import Lookup
from mlxgpt.common.tokenizers.load import train_tokenizer


def watched(text: list[int], count: int = 1) -> Lookup:
    """A Lookup of so many rows of this text."""
    made = Lookup()
    made.join([Row(text) for _ in range(count)])
    return made


def texts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5000) for _ in range(60)] for _ in range(count)]


def fed(made: Lookup, rows: list[list[int]]) -> list[bool]:
    """``hot`` before each token of rows that draw these."""
    found = []
    for step in range(len(rows[0])):
        found.append(made.hot)
        for row, text in enumerate(rows):
            made.take(row, [text[step]])
    return found


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], 3, [3, 4, 9]),
        ([1, 2, 7, 1, 2, 8, 1, 2], 2, [8, 1]),  # the latest place
        ([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 1, [7]),  # the longest match
        ([3, 4, 3, 4], 5, [3, 4, 3, 4, 3]),  # past the end, into what it gives itself
        ([6, 6, 6], 4, [6, 6, 6, 6]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
    ],
)
def test_a_draft_goes_on_as_the_text_did(text: list[int], count: int, expected: list[int]) -> None:
    made = watched(text)
    assert made._rows[0].draft(count) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60))
def test_a_match_is_the_longest_and_latest_or_goes_on(text: list[int]) -> None:
    place, length = 0, 0
    for end in range(1, len(text) + 1):
        if length and text[place] == text[end - 1]:
            place, length = place + 1, length + 1
            continue
        length = 0
        for size in lookup.SIZES:
            found = (
                [at for at in range(size, end) if text[at - size : at] == text[end - size : end]] if size < end else []
            )
            if found and not length:
                place, length = found[-1], size
    row = watched(text)._rows[0]
    assert row.length == length
    assert row.draft(1) == ([text[place]] if length else [])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "LATEST", 50)
    rng = random.Random(0)
    made = watched([rng.randrange(10_000) for _ in range(1000)])._rows[0]
    assert all(len(index) <= 50 for half in (made._old, made._new) for index in half)
    assert sum(map(len, made._old)) > 100  # what is older than half of it is forgotten, not all


def test_it_is_cold_where_nothing_repeats_and_hot_where_a_text_is_copied() -> None:
    (text,) = texts(1, 0)
    assert not any(fed(watched(text), texts(1, 1)))
    hot = fed(watched(text), [text])
    assert not any(hot[:3])  # the first words may come by chance
    assert all(hot[8:])


def test_what_it_learned_turns_it_off() -> None:
    """A text that begins each copy and never goes on with it: prior belief is hot, experience is cold."""
    rng, phrase = random.Random(0), [1, 2, 3, 4, 5, 6]
    made = watched([*phrase, 7])
    turns = []
    for _ in range(30):
        turns.append(any(fed(made, [[*phrase, rng.randrange(10, 5000), rng.randrange(10, 5000)]])[6:7]))
    assert turns[0]
    assert not any(turns[-10:])


@pytest.mark.parametrize(("copying", "hot"), [(8, True), (1, False), (0, False)])
def test_one_row_that_copies_does_not_slow_seven(copying: int, hot: bool) -> None:
    rows, made = texts(8, 2), Lookup()
    made.join([Row(row) for row in rows])
    found = fed(made, rows[:copying] + texts(8 - copying, 3))
    assert all(found[12:]) if hot else not any(found)


def test_rows_leave_and_join() -> None:
    one, two, three = texts(3, 4)
    made = Lookup()
    made.join([Row(one), Row(two)])
    made.keep([1])
    made.join([Row(three)])
    for row, text in enumerate((two, three)):
        made.take(row, text[:20])
    rows: list[Any] = [Row(two + two[:20]), Row(three + three[:20])]
    assert made.hot
    drafts = made.propose(rows, [50, 2])
    assert drafts[0] == two[20 : 20 + len(drafts[0])]
    assert len(drafts[0]) > 4
    assert drafts[1] == three[20:22]


def test_a_pass_is_worth_what_its_rows_gain() -> None:
    assert worth.drawn([0.5, 0.5]) == [1, 1.5, 1.75]
    sure = worth.drawn([1.0] * 16)
    assert worth.best([sure], 1) == (16, 17 / worth.cost(1, 16))
    assert worth.best([worth.drawn([0.05] * 16)], 1) == (0, 1.0)
    assert worth.best([sure], 8) == (0, 1.0)
    assert worth.best([sure], 1, 1.0) == (0, 1.0)  # a draft model as slow as the model
    assert worth.cost(1, 0) == worth.cost(8, 0) == 1
    assert worth.cost(1, 4) < worth.cost(2, 4) < worth.cost(8, 4)


# ---- the same tokens

MODELS = {
    "llama": make_config("llama", block_size=48),
    "window": make_config("mistral", window=7, block_size=48),
    "alibi": make_config("llama", position="alibi", block_size=48),
}


@cache
def model_of(backend: str, name: str) -> Any:
    return make_model(backend, MODELS[name])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_tokens_are_those_of_generate(backend: str, data: st.DataObject) -> None:
    model = model_of(backend, data.draw(st.sampled_from(sorted(MODELS))))
    prompts, sample = data.draw(ragged()), data.draw(st.sampled_from(SETTINGS))
    bias = data.draw(st.sampled_from([{}, {1: 6.0, 2: 6.0, 3: 5.0}]))  # a model that repeats itself
    drawn = SampleConfig(max_tokens=data.draw(st.integers(1, 40)), seed=data.draw(st.integers(0, 9)), **sample)
    more = {"bias": bias, "ends": (4,), "top": 2}
    rows = data.draw(st.integers(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        always(patch)
        patch.setattr(lookup, "SURE", 0.0)
        found, _ = drafted(backend, model, None, prompts, drawn, Lookup, rows, **more)
    same(found, plain(backend, model, None, prompts, drawn, **more))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_string_may_end_inside_a_draft(backend: str) -> None:
    tokenizer = train_tokenizer("char", ["abcdef "], 310)
    model = make_model(backend, make_config("llama", vocab=tokenizer.n_vocab, block_size=256))
    ids = tokenizer.encode("ab")
    sample = SampleConfig(temperature=1.0, max_tokens=80, seed=2)
    bias = {ids[0]: 30.0, ids[1]: 31.0}
    for stop in ((), ("bbbab", "zz")):
        prompts = ["abba" * 9, "ab"]
        found, counts = drafted(backend, model, tokenizer, prompts, sample, Lookup, 2, bias=bias, stop=stop)
        same(found, plain(backend, model, tokenizer, prompts, sample, bias=bias, stop=stop))
        if not stop:
            assert counts.accepted_tokens > 10
        assert counts.generated_tokens >= counts.steps


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_repeats_itself_draws_many_tokens_a_step(backend: str) -> None:
    model = model_of(backend, "llama")
    sample = SampleConfig(temperature=0.0, max_tokens=44)
    found, counts = drafted(backend, model, None, [[1, 2, 3]], sample, Lookup, 1, bias={7: 1000.0})
    assert found[0].tokens == [7] * 44
    assert counts.steps < 20
    assert counts.accepted_tokens == counts.generated_tokens - counts.steps
