"""What a scorer makes of texts, against AutoTokenizer and what lm-evaluation-harness does with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from compare import agree
from decoding import make_model
from models import tiny
from test_beginnings import folder_of
from test_scoring import plain

from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.tasks.reading import Group
from mlxgpt.common.tasks.scorer import ModelScorer
from mlxgpt.common.tokenizers.char import CharTokenizer
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

PAIRS = [
    ("He goes to the park", " every day."), ("He goes to the park ", "every day."), ("A\n\n", "B"), ("", " it was"),
    ("What is it?\nAnswer:", " A"), ("What is it?\nAnswer:  ", " B"), (" ", "x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def torch_half() -> backends.Backend:
    return backends.load("torch")


def scorer(half: backends.Backend, tokenizer: Tokenizer, block_size: int = 64, **given: Any) -> ModelScorer:
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab, block_size=block_size)
    return ModelScorer(half, make_model("torch", config), tokenizer, **given)


@pytest.mark.parametrize("bos", ["auto", "yes", "no"])
@pytest.mark.parametrize("shape", ["gpt2", "llama2", "llama3", "gemma"])
def test_ids_are_those_of_the_harness(shape: str, bos: str, tmp_path: Path, torch_half: backends.Backend) -> None:
    folder = folder_of(tmp_path / "t", shape)
    theirs, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    if bos == "yes" and theirs.bos_token_id is None:
        with pytest.raises(UserError, match="--bos yes: the tokenizer names no BOS: expected auto or no"):
            scorer(torch_half, tokenizer, bos=bos)
        return
    ours = scorer(torch_half, tokenizer, bos=bos)
    before = [theirs.bos_token_id] if bos == "yes" and not tokenizer.before else []
    prefix = theirs.bos_token_id if theirs.bos_token_id is not None else theirs.eos_token_id

    def encode(text: str) -> list[int]:
        return before + theirs.encode(text, add_special_tokens=bos != "no")

    for context, continuation in PAIRS:
        whole, start = encode(context + continuation), encode(context.rstrip()) if context else []
        if not context:
            whole = theirs.encode(continuation, add_special_tokens=False)
        expected = (start, whole[len(start) :]) if start else ([prefix], whole)
        assert ours.encode(context, continuation) == expected, (context, continuation)


def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path: Path, torch_half: backends.Backend) -> None:
    ours = scorer(torch_half, load_tokenizer(folder_of(tmp_path / "t", "llama2")), render=lambda text: f"<s>{text}!")
    before, _ = ours.encode("He goes", " to")
    assert ours.chat and before.count(before[0]) == 1
    assert ours._tokenizer.decode(before) == "<s>He goes!"


def test_rows_longer_than_the_context_lose_their_first_tokens(torch_half: backends.Backend) -> None:
    ours, draw = scorer(torch_half, CharTokenizer("abcdefgh"), 16), np.random.default_rng(0)
    ids = draw.integers(0, 8, 40).tolist()
    found = ours.continuations([(ids[:12], ids[12:17]), (ids[:20], ids[20:24]), (ids[:13], ids[13:17])])
    assert ours.cut == 1
    groups = [Group(ids[:12], [ids[12:17]]), Group(ids[7:20], [ids[20:24]]), Group(ids[:13], [ids[13:17]])]
    expected = [plain("torch", ours._model, each, each.continuations[0]) for each in groups]
    agree("cut", np.array([each.logprob for each in found]), np.array([value for value, _ in expected]), 1e-6)
    with pytest.raises(UserError, match="an answer of 17 tokens: the model's context holds 16"):
        ours.continuations([(ids[:2], ids[2:19])])
    with pytest.raises(UserError, match=r"token id 8: expected below 8, the model's vocabulary"):
        ours.continuations([([1], [8])])
    with pytest.raises(
        UserError, match="an answer of 17 tokens: the model's context holds 16"
    ):  # the row is known there
        ours.encode("a", "b" * 17)


def rolling(ids: list[int], prefix: int, size: int) -> list[Group]:
    """Every token once; each window but the first as long as the context, its last input just before the last token."""
    whole, made = [prefix, *ids], []
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        first = max(0, end - size)
        made.append(Group(whole[first : start + 1], [ids[start:end]]))
    return made


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 41])
def test_texts_are_scored_in_windows(length: int, tmp_path: Path, torch_half: backends.Backend) -> None:
    ours = scorer(torch_half, load_tokenizer(folder_of(tmp_path / "t", "llama2")), 16)
    text = "".join("abcdefgh "[n % 7] for n in range(length - 1))
    ids = ours._ids(text)
    expected = [plain("torch", ours._model, each, each.continuations[0])[0] for each in rolling(ids, ids[0], 16)]
    found = ours.texts([text, text + " more"])
    agree(f"{length}", np.array(found[:1]), np.array([sum(expected)]), 1e-6)


def test_without_a_prefix_the_first_token_is_given(torch_half: backends.Backend) -> None:
    ours = scorer(torch_half, CharTokenizer("abcdefgh"), 16)
    assert ours.prefix is None and ours.begins_with == []
    value, _ = plain("torch", ours._model, Group([1], [[2, 3]]), [2, 3])
    agree("text", np.array(ours.texts(["bcd"])), np.array([value]), 1e-6)
    assert ours.encode("", "bcd") == ([1], [2, 3])
    with pytest.raises(UserError, match=r"the answer has no token of its own: found \.\.\.'' and 'b'"):
        ours.encode("", "b")


def test_answers_are_what_each_prompt_gets_alone(torch_half: backends.Backend) -> None:
    ours = scorer(torch_half, CharTokenizer("abcdefgh"), 24, rows=2)
    contexts = ["abc", "hgfedcba", "abc", "c", "abcdefgh" * 3]
    for sample in (SampleConfig(temperature=0.0, max_tokens=6), SampleConfig(temperature=1.0, max_tokens=6, seed=3)):
        cut = ours.cut
        found = ours.answers(contexts, (), sample)
        encode, decode = ours._tokenizer.encode, ours._tokenizer.decode
        assert ours.cut - cut == 1
        expected = [decode(drawn(ours, encode(each)[-18:], sample)) for each in contexts]
        assert found == expected and found[0] == found[2]
    stopped = ours.answers(contexts, (found[1][2],), sample)
    assert stopped[1] == found[1].split(found[1][2])[0]
    with pytest.raises(UserError, match="max_tokens = 24: expected less than 24"):
        ours.answers(contexts, (), SampleConfig(max_tokens=24))


def drawn(ours: ModelScorer, prompt: list[int], sample: SampleConfig) -> list[int]:
    half = backends.load("torch")
    return half.generate.generate(ours._model, None, [prompt], sample)[0].tokens


def test_logits_that_are_not_finite_are_an_error(torch_half: backends.Backend) -> None:
    ours = scorer(torch_half, CharTokenizer("abcdefgh"), 16)
    ours._model.wte.weight.data[3] = float("nan")
    with pytest.raises(RunError, match="answer 1: the model's logits are not finite"):
        ours.continuations([([3], [1, 2])])
