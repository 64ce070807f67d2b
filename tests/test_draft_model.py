"""Drafts from a smaller model: the same tokens whatever it guesses, and no drafts where they do not pay."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from decoding import BACKENDS, make_config, make_model, make_weights
from drafts import SETTINGS, Row, always, drafted, plain, ragged, same
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxgpt.api
import torch_ref.api
from mlxgpt import cli
from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.inference.drafts import draft_model, drafters
from mlxgpt.common.inference.drafts.draft_model import DraftModel
from mlxgpt.common.inference.drafts.lookup import Lookup
from mlxgpt.common.serve import models
from mlxgpt.common.sft.template import with_chatml
from mlxgpt.common.tokenizers.hf import made_of_bytes
from mlxgpt.common.tokenizers.load import train_tokenizer

CONFIG = make_config("llama", block_size=48)
DRAFTS = {
    "small": make_config("gpt2", n_layer=1, n_embd=16, n_head=2, block_size=48),
    "short": make_config("llama", n_layer=1, block_size=20),  # a shorter context
    "window": make_config("mistral", n_layer=1, window=7, block_size=48),
    "itself": CONFIG,
}


@cache
def model_of(backend: str, name: str = "itself") -> Any:
    return make_model(backend, DRAFTS[name]).eval()


def factory(backend: str, name: str) -> Any:
    return lambda: DraftModel(backends.load(backend), model_of(backend, name), 61, CONFIG)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_tokens_are_those_of_generate(backend: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(DRAFTS)))
    prompts, sample = data.draw(ragged()), data.draw(st.sampled_from(SETTINGS))
    drawn = SampleConfig(max_tokens=data.draw(st.integers(1, 40)), seed=data.draw(st.integers(0, 9)), **sample)
    more = {"bias": data.draw(st.sampled_from([{}, {1: 6.0, 2: 6.0}])), "ends": (4,), "top": 1}
    with pytest.MonkeyPatch.context() as patch:
        always(patch)
        rows = data.draw(st.integers(1, 4))
        found, counts = drafted(backend, model_of(backend), None, prompts, drawn, factory(backend, name), rows, **more)
    same(found, plain(backend, model_of(backend), None, prompts, drawn, **more))
    if name == "itself":  # whatever the settings: it draws with the row's own noise
        assert counts.accepted_tokens == counts.drafted_tokens


@pytest.mark.parametrize("more", SETTINGS, ids=["greedy", "penalty", "counts"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_itself_is_always_right(backend: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    prompts = [[1, 2, 3], [5] * 17, [7, 8]]
    sample = SampleConfig(max_tokens=16, seed=3, **more)
    _, counts = drafted(backend, model_of(backend), None, prompts, sample, factory(backend, "itself"), 2)
    assert counts.drafted_tokens == counts.accepted_tokens > counts.steps


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_cold_where_it_does_not_pay_and_tries_now_and_then(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess that is never right: some tries, then pauses that grow."""
    monkeypatch.setattr(draft_model, "LAYER", 1e4)
    monkeypatch.setattr(draft_model, "PAUSES", (4, 32))
    made, row, found = factory(backend, "small")(), Row([1, 2, 3]), []
    made._price = 0.01
    monkeypatch.setattr(row, "after", lambda tokens: _choice())
    made.join([row])
    for _ in range(120):
        made.take(0, [60])
        row.ids.append(60)
        row.ids[:] = row.ids[-3:] if len(row.ids) > 30 else row.ids  # stays inside the context
        found.append(made.hot)
        if made.hot:
            made._rows[0].draft = [1] * len(made.propose([row], [8])[0])
    tried = [n for n, hot in enumerate(found) if hot]
    assert tried[0] == 0
    assert 5 < len(tried) < 80
    assert sum(found[60:]) < sum(found[:60])


def _choice() -> Any:
    from mlxgpt.common.inference import choosing

    return choosing.Choice(choosing.settings(SampleConfig(temperature=0.0)), 1)


def test_a_draft_that_is_as_large_as_the_model_is_not_asked() -> None:
    sample = SampleConfig(temperature=0.0, max_tokens=30)
    _, counts = drafted("torch", model_of("torch"), None, [[1, 2, 3]], sample, factory("torch", "itself"), 1)
    assert counts.drafted_tokens == 0


def test_what_cannot_draft_is_refused_in_a_line(tmp_path: Path, capsys: Any) -> None:
    plain_bytes, chars = made_of_bytes(), train_tokenizer("char", ["abcdef "], 310)
    config = make_config("llama", vocab=plain_bytes.n_vocab)
    write_model(tmp_path / "model", config, make_weights(config), tokenizer=plain_bytes)
    write_model(tmp_path / "bare", config, make_weights(config))
    other = make_config("llama", vocab=chars.n_vocab)
    write_model(tmp_path / "chars", other, make_weights(other), tokenizer=chars)
    small = make_config("llama", vocab=plain_bytes.n_vocab, n_layer=1)
    write_model(tmp_path / "small", small, make_weights(small), tokenizer=plain_bytes)
    command = ["generate", "-m", str(tmp_path / "model"), "-p", "ab", "-n", "20", "--json", "--backend", "torch"]
    for name, message in (
        ("chars", f"tokenizer {chars.digest[:12]}; expected the model's own, tokenizer {plain_bytes.digest[:12]}"),
        ("bare", f"no tokenizer; expected the model's own, tokenizer {plain_bytes.digest[:12]}"),
        ("nowhere", "nowhere"),
    ):
        assert cli.main([*command, "--draft", str(tmp_path / name)]) == 2
        told = capsys.readouterr()
        assert message in told.err
        assert not told.out
        assert len(told.err.splitlines()) == 1
    assert cli.main([*command, "--draft", str(tmp_path / "small")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["drafts"]) == {"drafted", "accepted", "steps"}
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == answer["token_ids"]


def test_other_token_ids_are_refused() -> None:
    with pytest.raises(UserError, match="60 token ids; expected the model's 61"):
        drafters.check((make_config("llama", vocab=60), None), (CONFIG, None), "--draft x")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that chats, and a smaller one."""
    place, tokenizer = tmp_path_factory.mktemp("chatty"), with_chatml(made_of_bytes())
    for name, layers in (("model", 2), ("small", 1)):
        config = make_config("llama", vocab=tokenizer.n_vocab, block_size=512, n_layer=layers)
        write_model(place / name, config, make_weights(config), tokenizer=tokenizer)
    return place


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chat_says_the_same_with_drafts(
    backend: str, chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    always(monkeypatch)
    command = ["chat", "-m", str(chatty / "model"), "-n", "20", "--seed", "4", "--backend", backend]
    said = []
    for flags in ([], ["--lookup"], ["--draft", str(chatty / "small")]):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hi there\nabab\n"))
        assert cli.main([*command, *flags]) == 0
        said.append(capsys.readouterr().out)
    assert len(said[0]) > 20
    assert said == [said[0]] * 3


def test_a_server_drafts_for_every_model_it_has(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    backend, loaded = backends.load("torch"), []
    load = backend.load.load
    monkeypatch.setattr(backend.load, "load", lambda *args, **more: loaded.append(args[0]) or load(*args, **more))
    options = models.Options(str(chatty / "model"), draft=str(chatty / "small"))
    (served,) = models.load_all(backend, options)
    assert isinstance(served.drafter and served.drafter(), DraftModel)
    assert len(loaded) == 2
    (served,) = models.load_all(backend, models.Options(str(chatty / "model"), lookup=True))
    assert isinstance(served.drafter and served.drafter(), Lookup)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_python(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    api: Any = {"mlx": mlxgpt.api, "torch": torch_ref.api}[backend]
    model, small = model_of(backend), model_of(backend, "small")
    model.train()
    made = [
        api.generate(model, None, [[1, 2, 1, 2], [3]], max_tokens=20, seed=1, **more)
        for more in ({}, {"lookup": True}, {"draft": small})
    ]
    assert [each.tokens for each in made[0]] == [each.tokens for each in made[1]] == [each.tokens for each in made[2]]
    assert model.training
    assert not small.training
    model.eval()
    with pytest.raises(UserError, match="expected one of them"):
        api.generate(model, None, [1], lookup=True, draft=small)
    with pytest.raises(UserError, match="draft: 60 token ids"):
        api.generate(model, None, [1], draft=make_model(backend, make_config("llama", vocab=60)))

    def broken(_: int, text: str) -> None:
        raise ValueError(text)

    tokenizer = made_of_bytes()
    tall = make_model(backend, make_config("llama", vocab=tokenizer.n_vocab))
    with pytest.raises(ValueError, match="."):
        api.generate(tall, tokenizer, "ab", max_tokens=20, lookup=True, on_text=broken)
