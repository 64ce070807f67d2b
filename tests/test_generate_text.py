"""Where generated text begins and ends: streaming, end tokens and stop strings."""

import json
from pathlib import Path
from typing import Any

import pytest
from decoding import BACKENDS, GENERATE, make_config, make_model, make_weights
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxgpt.load as mlx_load
import torch_ref.load as torch_load
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.inference import generation
from mlxgpt.common.tokenizers.load import load_tokenizer, train_tokenizer

TEXT = "naive na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600 the cat sat on the mat, the end. " * 20


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: train_tokenizer(kind, [TEXT], 310) for kind in ("char", "bpe", "sp-bpe")}


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-bpe"])  # SentencePiece drops a space at the start of a text
@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_text_is_the_decoded_text(backend: str, kind: str, tokenizers: dict) -> None:
    tokenizer = tokenizers[kind]
    model = make_model(backend, make_config("llama", vocab=tokenizer.n_vocab + 30), scale=2.0)
    prompts = ["the c", "na\u00efve", "\U0001f600"]
    pieces: dict[int, str] = {index: "" for index in range(len(prompts))}

    def on_text(index: int, text: str) -> None:
        assert text
        pieces[index] += text

    results = GENERATE[backend].generate(model, tokenizer, prompts, SampleConfig(max_tokens=30), on_text=on_text)
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        assert max(result.tokens) < tokenizer.n_vocab  # rows that the tokenizer does not know are never drawn
        ids = tokenizer.encode(prompt)
        assert tokenizer.decode(ids + result.tokens) == prompt + result.text
        assert pieces[index] == result.text
    drawn = GENERATE[backend].sample_text(model, tokenizer, SampleConfig(prompt=prompts[0], max_tokens=30))
    assert drawn == prompts[0] + results[0].text


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-bpe"])
def test_text_goes_on_where_its_prompt_ends(kind: str, tokenizers: dict) -> None:
    tokenizer = tokenizers[kind]
    text = "the cat na\u00efve \u65e5\u672c \U0001f600 the end."
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        if prompt.endswith("\ufffd"):
            continue  # half a character is no prompt
        row = generation.Row(0, ids[:cut], 0, tokenizer, ())
        streamed = [row.add(token, len(ids) - cut, 10**6) for token in ids[cut:]]
        assert "".join(streamed) == row.result().text == text[len(prompt) :]


def test_a_character_that_the_tokenizer_lacks_is_named_with_its_prompt(tokenizers: dict) -> None:
    with pytest.raises(UserError, match=r"prompt 2: character 'Q'"):
        generation.start_rows(make_config("llama"), tokenizers["char"], ["the", "cat Q"], ())


@pytest.mark.parametrize("backend", BACKENDS)
def test_end_of_text_ends_a_row_and_is_not_part_of_it(
    backend: str, tokenizers: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["char"]
    model = make_model(backend, make_config("llama", vocab=tokenizer.n_vocab))
    sample, generate = SampleConfig(max_tokens=20), GENERATE[backend].generate
    free = generate(model, tokenizer, ["the", "mat"], sample)
    eos = free[0].tokens[4]
    monkeypatch.setattr(tokenizer, "eos_id", eos)
    ended = generate(model, tokenizer, ["the", "mat"], sample)
    at = free[0].tokens.index(eos)
    assert ended[0].tokens == free[0].tokens[:at] and ended[0].finish_reason == "eos"
    if eos in free[1].tokens:
        assert ended[1].tokens == free[1].tokens[: free[1].tokens.index(eos)]
    else:
        assert ended[1] == free[1]
    # an empty prompt starts from the end-of-text token
    assert generate(model, tokenizer, [""], sample)[0].prompt_tokens == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_any_of_several_ends_that_a_folder_lists_ends_a_row(
    backend: str, file: str, tokenizers: dict, tmp_path: Path
) -> None:
    """Chat models end a turn and a text with different tokens; a run that starts from one keeps them."""
    sizes = make_config("llama", vocab=tokenizers["bpe"].n_vocab)
    write_model(tmp_path / "a", sizes, make_weights(sizes), tokenizer=tokenizers["bpe"])
    load = {"mlx": mlx_load, "torch": torch_load}[backend].load
    model, tokenizer = load(tmp_path / "a", device="cpu")
    assert tokenizer is not None and not tokenizer.ends
    sample, generate = SampleConfig(max_tokens=20), GENERATE[backend].generate
    free = generate(model, tokenizer, ["the"], sample)[0].tokens
    chosen = [free[9], tokenizer.eos_id, free[5]]
    if file == "config.json":
        (tmp_path / "a" / "generation_config.json").unlink()
    said = json.loads((tmp_path / "a" / file).read_text()) | {"eos_token_id": chosen}
    (tmp_path / "a" / file).write_text(json.dumps(said))
    model, tokenizer = load(tmp_path / "a", device="cpu")
    result = generate(model, tokenizer, ["the"], sample)[0]
    at = min(free.index(token) for token in chosen if token in free)
    assert (result.tokens, result.finish_reason) == (free[:at], "eos")
    write_model(tmp_path / "b", sizes, make_weights(sizes), tokenizer=tokenizer)
    again = load_tokenizer(tmp_path / "b")
    assert again.ends == tokenizer.ends and again.eos_id == tokenizer.eos_id


@pytest.mark.parametrize("said", ["2", [2, "3"], {"a": 1}, True, 2.0])
def test_ends_that_are_no_ids_are_refused(said: object, tokenizers: dict, tmp_path: Path) -> None:
    tokenizers["bpe"].save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id .*: expected a token id or a list"):
        load_tokenizer(tmp_path)


class Pieces:
    """A tokenizer whose token i is the text ``words[i]``."""

    eos_id, ends = None, frozenset()

    def __init__(self, words: list[str]):
        self.words, self.n_vocab = words, len(words)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids)


class Stripping(Pieces):
    """As Llama's SentencePiece decodes: without the space at the start of a text."""

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).removeprefix(" ")


def test_a_space_after_the_prompt_is_kept() -> None:
    tokenizer: Any = Stripping([" once", " upon", " a"])
    row = generation.Row(0, [0], 0, tokenizer, ())
    assert [row.add(1, 2, 9), row.add(2, 2, 9)] == [" upon", " a"]


def feed(words: list[str], stop: tuple[str, ...]) -> tuple[generation.Row, list[str]]:
    """A row that draws the words one after the other, and what it streamed."""
    tokenizer: Any = Pieces(["^", *words])
    row = generation.Row(0, [0], 0, tokenizer, stop)
    streamed = []
    for token in range(1, len(words) + 1):
        if not row.reason:
            streamed.append(row.add(token, len(words), 10**6))
    return row, streamed


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string_wherever_the_tokens_break(words: list[str], stop: list[str]) -> None:
    row, streamed = feed(words, tuple(stop))
    text, count, reason = "".join(words), len(words), "length"
    for n in range(1, len(words) + 1):
        so_far = "".join(words[:n])
        starts = [so_far.find(s) for s in stop if s in so_far]
        if starts:
            text, count, reason = so_far[: min(starts)], n, "stop"
            break
    assert (row.result().text, len(row.tokens), row.reason) == (text, count, reason)
    assert "".join(streamed) == text


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    assert feed(["ab", "c", "d", "a", "b"], ("cde",))[1] == ["ab", "", "", "cda", "b"]
    assert feed(["x", "c", "d", "e", "z"], ("cde",))[1] == ["x", "", "", ""]


@pytest.mark.parametrize("backend", BACKENDS)
def test_stop_strings_end_a_row(backend: str, tokenizers: dict) -> None:
    tokenizer = tokenizers["bpe"]
    model = make_model(backend, make_config("gpt2", vocab=tokenizer.n_vocab), scale=2.0)
    sample, generate = SampleConfig(max_tokens=30), GENERATE[backend].generate
    free = generate(model, tokenizer, ["the cat"], sample)[0]
    stop = free.text[6:9]
    result = generate(model, tokenizer, ["the cat"], sample, stop=("never to be seen", stop))[0]
    assert result.finish_reason == "stop" and result.text == free.text[: free.text.index(stop)]
    assert result.tokens == free.tokens[: len(result.tokens)] and len(result.tokens) < 30
