"""From rows to batches: fitting, packing equal to rows alone, order as a pure function, and what is said."""

import importlib
import json
import random
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
from compare import worst
from models import tiny, weights

from mlxgpt import cli
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, Recipe, TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params
from mlxgpt.common.sft import encode, pack
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

BACKENDS = ["mlxgpt", "torch_ref"]
WORDS = templates.TEXT.split()


def chat_rows(count: int, turns: int = 1, longest: int = 40) -> list[dict[str, Any]]:
    """Conversations of words, of many lengths."""
    made = []
    for n in range(count):
        messages = []
        for k in range(2 * turns):
            size = 1 + (7 * n + 5 * k) % longest
            content = " ".join(WORDS[(n + k + w) % len(WORDS)] for w in range(size))
            messages.append({"role": "assistant" if k % 2 else "user", "content": f"{n} {content}"})
        made.append({"messages": messages})
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer("bpe", [templates.TEXT + "0123456789"], 300)


def opened(
    folder: Path, tokenizer: Tokenizer, rows: list[Any], train: dict[str, Any] | None = None, **tune: Any
) -> SftSource:
    """A source of ``rows``, a tenth of which validates."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny(family="llama", block_size=256, vocab_size=400)
    settings: dict[str, Any] = {"batch_size": 4, "seed": 5} | (train or {})
    return sft_source.open(
        TuneConfig(source=str(path), **tune), TrainConfig(**settings), tokenizer, config, lambda line: None
    )


def epoch(source: SftSource, number: int = 0) -> list[Batch]:
    """The batches of an epoch."""
    first = source.steps(number) + 1 if number else 1
    return [source.batch(step) for step in range(first, source.steps(number + 1) + 1)]


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    """Each row's tokens, targets and weights, taken out of a packed batch."""
    assert batch.segments is not None and batch.positions is not None
    made = []
    for b in range(len(batch.tokens)):
        for number in range(1, int(batch.segments[b].max()) + 1):
            at = np.flatnonzero(batch.segments[b] == number)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
            assert np.array_equal(batch.positions[b, at], np.arange(len(at)))
            made.append(tuple(tuple(a[b, at].tolist()) for a in (batch.tokens, batch.targets, batch.weights)))
    return made


def expected_rows(source: SftSource, split: str = "train") -> list[tuple[Any, ...]]:
    return [tuple(tuple(a.tolist()) for a in (e.tokens, e.targets, e.weights)) for e in source.rows(split)]


def test_an_epoch_holds_every_row_once_whole_and_in_another_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = opened(tmp_path, tokenizer, chat_rows(200, longest=16))
    expected = Counter(expected_rows(source))
    orders = []
    for number in range(2):
        rows = [row for batch in epoch(source, number) for row in rows_of(batch)]
        assert Counter(rows) == expected
        orders.append(rows)
    assert orders[0] != orders[1]
    held = [row for batch in source.validation() for row in rows_of(batch)]
    assert Counter(held) == Counter(expected_rows(source, "valid"))
    assert source.real_share > 0.85
    for batch in source.validation():
        assert batch.segments is not None and not batch.weights[batch.segments == 0].any()


def test_batches_are_functions_of_seed_and_step(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source, again = (opened(tmp_path, tokenizer, chat_rows(60)) for _ in range(2))
    late = source.steps(3)
    for step in (late, 1, late - 1):
        assert np.array_equal(source.batch(step).tokens, again.batch(step).tokens)
        assert source.batch(step).row_ids == again.batch(step).row_ids
    assert source.digest == again.digest
    other = opened(tmp_path, tokenizer, chat_rows(60), {"seed": 6})
    assert other.digest["order"] != source.digest["order"] and other.digest["rows"] == source.digest["rows"]
    masked = opened(tmp_path, tokenizer, chat_rows(60), train_on_prompt=True)
    assert masked.digest["rows"] != source.digest["rows"]


def test_shapes_are_few(tmp_path: Path, tokenizer: Tokenizer) -> None:
    packed = opened(tmp_path, tokenizer, chat_rows(200))
    assert len({batch.tokens.shape[1] for batch in epoch(packed)}) == 1
    padded = opened(tmp_path, tokenizer, chat_rows(200), packing=False)
    widths = {batch.tokens.shape[1] for batch in epoch(padded)}
    assert len(widths) > 1 and widths <= {32, 48, 64, 96, 128, 192, 256}
    assert [pack.bucket(n, 2048) for n in (1, 32, 33, 49, 65, 97, 129)] == [32, 32, 48, 64, 96, 128, 192]
    assert pack.bucket(130, 160) == 160
    rows = [row for batch in epoch(padded) for row in batch.row_ids]
    assert Counter(rows) == Counter(example.where for example in padded.rows("train"))


def test_a_small_set_makes_small_batches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for count, packing in ((1, True), (1, False), (3, True), (3, False)):
        source = opened(tmp_path, tokenizer, chat_rows(count), {"batch_size": 16}, packing=packing)
        batch = source.batch(1)
        assert source.steps_per_epoch == 1 and batch.tokens.shape[0] <= count and batch.tokens.shape[1] <= 256
        assert batch.weight == sum(example.weights.sum() for example in source.rows("train"))
        assert len(list(source.validation())) == (1 if count > 1 else 0)
    assert source.steps(0.1) == 1 and source.steps(2.0) == 2


def test_eval_batches_are_evenly_spaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = chat_rows(200)
    every = list(opened(tmp_path, tokenizer, rows, {"batch_size": 1}, val_fraction=0.5).validation())
    some = list(opened(tmp_path, tokenizer, rows, {"batch_size": 1, "eval_batches": 3}, val_fraction=0.5).validation())
    places = [next(i for i, batch in enumerate(every) if batch.row_ids == one.row_ids) for one in some]
    assert places == [i * len(every) // 3 for i in range(3)]


# packing


def losses(backend: str, config: ModelConfig, batch: Batch) -> np.ndarray:
    """Weighted token losses (B, T)."""
    engine = importlib.import_module(f"{backend}.engine").Engine
    made = engine(Recipe(model=config, train=TrainConfig(batch_size=4)), weights(config, scale=4.0), "cpu")
    lm = importlib.import_module(f"{backend}.losses").lm
    found = lm(made.model, made._arrays(batch), made.recipe.train, plain=True)
    return (found.detach().numpy() if backend == "torch_ref" else np.array(found)) * batch.weights


def row_means(backend: str, config: ModelConfig, source: SftSource, packed: bool) -> np.ndarray:
    """The mean loss of each training row, packed or alone."""
    means: dict[str, float] = {}
    examples = source.rows("train")
    if packed:
        order = np.arange(len(examples))
        bins = pack.pack(np.array([len(e) for e in examples]), order, source.size)
        batch = pack.packed_batch(examples, bins, source.size)
        terms = losses(backend, config, batch)
        for b, rows in enumerate(bins):
            start = 0
            for row in rows:
                stop = start + len(examples[row])
                means[examples[row].where] = terms[b, start:stop].sum() / examples[row].weights.sum()
                start = stop
    else:
        for number in range(0, len(examples), 8):
            plan = [(row,) for row in range(number, min(number + 8, len(examples)))]
            batch = pack.padded_batch(examples, plan, source.size)
            terms = losses(backend, config, batch)
            for b, (row,) in enumerate(plan):
                means[examples[row].where] = terms[b].sum() / examples[row].weights.sum()
    return np.array([means[example.where] for example in examples])


def packing_gap(backend: str, family: str, folder: Path, tokenizer: Tokenizer) -> float:
    source = opened(folder, tokenizer, chat_rows(30, longest=12), block_size=96)
    assert max(len(rows) for rows in source._plan(0)[0]) > 1
    config = tiny(**{**BASE[family], "block_size": 96, "vocab_size": 400})
    packed, alone = (row_means(backend, config, source, way) for way in (True, False))
    return worst(f"{family}: per-row mean loss", packed, alone)


BASE: dict[str, dict[str, Any]] = {
    "gpt2": dict(family="gpt2"),
    "llama": dict(family="llama", n_kv_head=2),
    "mistral": dict(family="mistral", window=12),
}


@pytest.mark.parametrize("family", BASE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_have_the_losses_that_they_have_alone(
    backend: str, family: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    assert packing_gap(backend, family, tmp_path, tokenizer) <= 1e-5


def _no_segments(batch: Batch) -> Batch:
    assert batch.segments is not None
    return Batch(batch.tokens, batch.targets, batch.weights, batch.positions, np.ones_like(batch.segments))


def _running_positions(batch: Batch) -> Batch:
    running = np.tile(np.arange(batch.tokens.shape[1], dtype=np.int32), (len(batch.tokens), 1))
    return Batch(batch.tokens, batch.targets, batch.weights, running, batch.segments)


def _shifted_targets(batch: Batch) -> Batch:
    return Batch(batch.tokens, np.roll(batch.targets, 1, axis=1), batch.weights, batch.positions, batch.segments)


@pytest.mark.parametrize(
    ("broken", "family"),
    [
        (_no_segments, "gpt2"),
        (_no_segments, "llama"),
        (_running_positions, "gpt2"),  # rotary positions are relative: elsewhere it would not matter
        (_shifted_targets, "llama"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_done_wrongly_is_seen(
    backend: str, broken: Any, family: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pack.packed_batch
    monkeypatch.setattr(pack, "padded_batch", lambda *args: padded(right, *args))
    monkeypatch.setattr(pack, "packed_batch", lambda *args: broken(right(*args)))
    assert packing_gap(backend, family, tmp_path, tokenizer) > 1e-3


def padded(right: Any, examples: Any, plan: Any, most: int) -> Batch:
    batch = right(examples, plan, most)
    return Batch(batch.tokens, batch.targets, batch.weights, row_ids=batch.row_ids)


# what becomes of a row


def only(source: SftSource) -> tuple[str, str]:
    """The one training row: all its text, and what of it is trained."""
    (row,) = source.rows("train")
    ids, mask = np.append(row.tokens, row.targets[-1]), np.append(False, row.weights > 0)
    return source.tokenizer.decode(ids.tolist()), source.tokenizer.decode(ids[mask].tolist())


def test_text_ends_with_the_end_token_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for text in ("He goes", "He goes<|endoftext|>"):
        source = opened(tmp_path, tokenizer, [{"text": text}])
        assert only(source)[0] == "He goes<|endoftext|>" and source.template is None
        assert source.tokenizer is tokenizer


@pytest.mark.parametrize("prompt", ["What is it?", "What is it? ", ""])
def test_a_completion_without_a_template_is_prompt_answer_and_end(
    prompt: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = opened(tmp_path, tokenizer, [{"prompt": prompt, "completion": "He goes."}])
    (row,) = source.rows("train")
    asked = tokenizer.encode(prompt)
    assert row.tokens[: len(asked)].tolist() == asked
    assert only(source)[0] == prompt + "He goes.<|endoftext|>"
    if prompt:
        assert only(source)[1] == "He goes.<|endoftext|>"
    whole = opened(tmp_path, tokenizer, [{"prompt": "What", "completion": " is"}], train_on_prompt=True)
    assert whole.rows("train")[0].weights.all()


def test_a_completion_with_a_template_is_a_conversation(tmp_path: Path) -> None:
    chat = templates.made(tmp_path / "t", templates.SMOLLM2, templates._IM)
    source = opened(tmp_path, chat, [{"prompt": "What is it?", "completion": "He goes."}])
    head = "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n"
    assert only(source) == (
        f"{head}<|im_start|>assistant\nHe goes.<|im_end|>\n",
        "He goes.<|im_end|>",
    )
    assert source.added == () and source.template and source.template.end == "<|im_end|>"
    prompt, answer = source.rows("train")[0].last_answer
    assert source.tokenizer.decode(prompt.tolist()) == f"{head}<|im_start|>assistant\n"
    assert source.tokenizer.decode(answer.tolist()) == "He goes.<|im_end|>"


def test_chatml_where_there_is_no_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"instruction": "What is it?", "output": "He goes."}]
    source = opened(tmp_path, tokenizer, rows)
    text = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nHe goes.<|im_end|>\n"
    assert only(source) == (text, "He goes.<|im_end|>")
    assert source.added == ("<|im_start|>", "<|im_end|>") and source.tokenizer.n_vocab == tokenizer.n_vocab + 2
    again = opened(tmp_path, source.tokenizer, rows)
    assert again.added == () and again.tokenizer.digest == source.tokenizer.digest
    asked = opened(tmp_path, tokenizer, [{"prompt": "What is it?", "completion": "He goes."}], template="chatml")
    assert only(asked) == only(source)


def test_tools_that_a_template_leaves_out_are_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    talk = [{"role": "user", "content": "3?"}, call, {"role": "assistant", "content": "3"}]
    path, lines = tmp_path / "rows.jsonl", []
    config = tiny(family="llama", block_size=256, vocab_size=400)
    path.write_text(json.dumps({"messages": talk, "tools": [{"function": {"name": "add"}}]}) + "\n")
    sft_source.open(TuneConfig(source=str(path)), TrainConfig(), tokenizer, config, lines.append)
    unsaid = "ChatML does not write them: nothing of them is trained on"
    assert [line for line in lines if "does not write" in line] == [
        f"{path} row 1: {key}: {unsaid}" for key in ("tools", "tool_calls")
    ]
    lines.clear()
    turn = "{{ m.role + m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ eos_token }}"
    held = "{{ tools and tools[0].function.name }}{% for m in messages %}" + turn + "{% endfor %}"
    held += "{% if add_generation_prompt %}assistant{% endif %}"
    (tmp_path / "held.jinja").write_text(held)
    tune = TuneConfig(source=str(path), template=str(tmp_path / "held.jinja"))
    sft_source.open(tune, TrainConfig(), tokenizer, config, lines.append)
    assert lines and not any("does not write" in line for line in lines)


def test_a_template_of_ones_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + eos_token }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(turns + "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}")
    rows = [{"instruction": "What is it?", "output": "He goes."}]
    source = opened(tmp_path, tokenizer, rows, template=str(tmp_path / "own.jinja"))
    assert only(source) == ("u What is it?<|endoftext|>a He goes.<|endoftext|>", "He goes.<|endoftext|>")
    assert "chat_template.jinja" in source.tokenizer.files
    with pytest.raises(UserError, match="tune.template = none.jinja: no such file"):
        opened(tmp_path, tokenizer, rows, template="none.jinja")


def test_unrolled_conversations_are_a_row_an_answer(tmp_path: Path) -> None:
    chat = templates.made(tmp_path / "t", templates.QWEN3, templates._IM)
    rows = chat_rows(4, turns=3, longest=4)
    with pytest.raises(UserError, match=r"rows.jsonl row \d: chat template writes an answer otherwise .* tune.unroll"):
        opened(tmp_path, chat, rows)
    source = opened(tmp_path, chat, rows, unroll=True)
    assert sum(len(source.rows(split)) for split in ("train", "valid")) == 12


LONG = {"instruction": " ".join(WORDS[:40]), "output": "He goes to the park."}


def test_long_rows_lose_the_left_of_the_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (whole,) = opened(tmp_path, tokenizer, [LONG]).rows("train")
    source = opened(tmp_path, tokenizer, [LONG], block_size=40)
    (row,) = source.rows("train")
    assert len(row) == 40 and np.array_equal(row.tokens, whole.tokens[-40:])
    assert only(source)[1] == "He goes to the park.<|im_end|>"
    counts = source.counts["train"]
    assert (counts.truncated, counts.cut, counts.lost) == (1, 0, len(whole) - 40)


def test_an_answer_that_is_too_long_loses_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = opened(tmp_path, tokenizer, [{"instruction": "What?", "output": LONG["instruction"]}], block_size=40)
    (row,) = source.rows("train")
    assert len(row) == 40 and row.weights.all()
    assert only(source)[0].startswith("\nThe device") or only(source)[0].startswith("The device")
    assert (source.counts["train"].truncated, source.counts["train"].cut) == (1, 1)
    text = opened(tmp_path, tokenizer, [{"text": LONG["instruction"]}], block_size=32)
    assert only(text)[0] == tokenizer.decode(tokenizer.encode(LONG["instruction"])[:33])


def test_an_answer_that_lost_its_beginning_is_no_target(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = chat_rows(1, turns=2, longest=20)
    (whole,) = opened(tmp_path, tokenizer, rows).rows("train")
    first = int(np.flatnonzero(whole.weights)[0])
    size = len(whole) - first - 2  # the cut falls inside the first answer
    source = opened(tmp_path, tokenizer, rows, block_size=size)
    assert len(source.rows("train")[0]) == size
    assert only(source)[1] == rows[0]["messages"][3]["content"] + "<|im_end|>"


def test_the_beginning_of_text_stays(tmp_path: Path) -> None:
    chat = templates.made(tmp_path / "t", templates.LLAMA3, templates.FAMILIES["llama3"][1])
    source = opened(tmp_path, chat, [LONG], block_size=40)
    assert only(source)[0].startswith("<s>") and len(source.rows("train")[0]) == 40
    assert only(source)[1] == "He goes to the park.<|eot_id|>"


def test_long_rows_are_dropped_or_refused_by_choice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [LONG, *({"instruction": f"{n}?", "output": "He goes."} for n in range(12))]
    source = opened(tmp_path, tokenizer, rows, block_size=40, overflow="drop")
    assert sum(count.dropped for count in source.counts.values()) == 1
    assert sum(len(source.rows(split)) for split in ("train", "valid")) == 12
    with pytest.raises(UserError, match=r"rows.jsonl row 1: \d+ tokens: expected at most 40 [(]tune.block_size"):
        opened(tmp_path, tokenizer, rows, block_size=40, overflow="refuse")
    with pytest.raises(UserError, match="all 1 training rows are longer than 40 tokens"):
        opened(tmp_path, tokenizer, [LONG], block_size=40, overflow="drop")
    with pytest.raises(UserError, match="tune.block_size = 1000: the model's context holds 256"):
        opened(tmp_path, tokenizer, rows, block_size=1000)


def test_a_row_without_a_target_is_refused(tmp_path: Path) -> None:
    chars = train_tokenizer("char", ["abc"], 0)
    with pytest.raises(UserError, match=r"rows.jsonl row 1: all of its 1 tokens are masked"):
        opened(tmp_path, chars, [{"text": "a"}])
    with pytest.raises(UserError, match=r"rows.jsonl row 2: character 'x' [(]U[+]0078[)] at position 0"):
        opened(tmp_path, chars, [{"text": "ab"}, {"text": "xa"}])


def test_what_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    twice = [{"instruction": "What is IT", "output": "he goes"}, {"instruction": "What is it?", "output": "He goes."}]
    rows = [LONG, *twice, *({"instruction": f"{n}?", "output": "He goes."} for n in range(40))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:1], *rows[2:]]))
    (tmp_path / "valid.jsonl").write_text(json.dumps(rows[1]) + "\n")
    lines: list[str] = []
    config = tiny(family="llama", block_size=256, vocab_size=400)
    tune = TuneConfig(source=str(tmp_path), block_size=40)
    source = sft_source.open(tune, TrainConfig(batch_size=4), tokenizer, config, lines.append)
    counts = source.counts["train"]
    assert not path.exists()
    assert lines == [
        f"rows: {tmp_path}: alpaca: 42 train, 1 valid; {counts.trained / counts.tokens:.1%} of {counts.tokens:,} "
        "tokens are trained on",
        "train: 1 rows are longer than 40 tokens: what is asked loses its beginning",
        "near-duplicates: 1 of 1 validation rows have a training row like them: "
        f"{tmp_path / 'valid.jsonl'} row 1 and {tmp_path / 'train.jsonl'} row 2",
        "template: ChatML, an answer ends with <|im_end|>, with the new tokens <|im_start|> and <|im_end|>",
        f"batches: packed into rows of 40: {source.real_share:.1%} of the positions are tokens; "
        f"{source.steps_per_epoch} steps an epoch",
    ]


def test_a_validation_row_may_be_the_longest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "He goes."}))
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": LONG["instruction"]}))
    config = tiny(family="llama", block_size=256, vocab_size=400)
    source = sft_source.open(TuneConfig(source=str(tmp_path)), TrainConfig(), tokenizer, config, lambda line: None)
    (batch,) = source.validation()
    assert batch.weight == len(source.rows("valid")[0])


ROWS: list[list[dict[str, Any]]] = [
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}]}] * 4,
    [{"instruction": "a", "input": "b", "output": "c"}] * 4,
    [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}] * 4,
    [{"prompt": "a b", "completion": "c"}, {"prompt": "b", "completion": "d"}],
]
ODD = [None, 1, -1.5, True, "", " ", "\ud800", "x" * 300, [], {}, [None], {"a": None}, "<|im_end|>", float("nan")]


def damaged(value: Any, draw: random.Random) -> Any:
    """The value with things replaced, renamed and left out."""
    if draw.random() < 0.06:
        return draw.choice(ODD)
    if isinstance(value, dict):
        kept = {key: damaged(item, draw) for key, item in value.items() if draw.random() > 0.02}
        return {key if draw.random() > 0.02 else "role": item for key, item in kept.items()}
    return [damaged(item, draw) for item in value if draw.random() > 0.02] if isinstance(value, list) else value


def test_damaged_rows_are_batches_or_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = templates.made(tmp_path / "t", templates.QWEN25, templates._IM)
    draw, outcomes = random.Random(1), Counter()
    for _ in range(300):
        rows = damaged(json.loads(json.dumps(draw.choice(ROWS))), draw)
        tune = {"overflow": draw.choice(["truncate", "drop", "refuse"]), "packing": draw.random() < 0.5}
        try:
            source = opened(
                tmp_path, draw.choice([tokenizer, chat]), rows if isinstance(rows, list) else [rows], **tune
            )
        except UserError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        assert source.batch(2).weight > 0 and all(batch.weight > 0 for batch in source.validation())
        outcomes["taken"] += 1
    assert min(outcomes["refused"], outcomes["taken"]) > 40, outcomes


MUTATIONS = {
    "mask off by one": ("weights = mask[1:]", "weights = mask[:-1]"),
    "missing end token": ("whole = np.append(whole, np.int32(eos))", "pass"),
    "the prompt trained on": ("mask[: len(prompt)] = False", "pass"),
    "an answer without its beginning trained on": (
        "mask[keep + left : keep + left + int(following[0])] = False",
        "pass",
    ),
    "the right cut, not the left": ("left = min(excess, spare)", "left = 0"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_row_is_seen(name: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MUTATIONS[name]
    source = Path(encode.__file__).read_text()
    assert source.count(old) == 1
    mutant = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(old, new), encode.__file__, "exec"), vars(mutant))
    monkeypatch.setattr(sft_source, "Encoder", mutant.Encoder)
    with pytest.raises(AssertionError):
        test_a_completion_without_a_template_is_prompt_answer_and_end("What is it?", tmp_path, tokenizer)
        test_an_answer_that_lost_its_beginning_is_no_target(tmp_path, tokenizer)
        test_long_rows_lose_the_left_of_the_prompt(tmp_path, tokenizer)


# data inspect --model


@pytest.fixture
def model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    config = tiny(family="llama", block_size=64, vocab_size=tokenizer.n_vocab)
    model_folder.write_model(tmp_path / "model", config, params.init_params(config, 1), tokenizer=tokenizer)
    return tmp_path / "model"


def inspected(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["data", "inspect", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_marks_what_is_trained(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"{n}?", "output": "He [goes]."} for n in range(30)] + [LONG]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = inspected(capsys, path, "-m", model, "--rows", 2)
    assert code == 0 and out.count("[[He [goes].<|im_end|>]]") == 2 and "with the new tokens <|im_start|>" in out
    assert re.search(r"^train +\d+ +[\d,]+ +[\d,]+ +\d+ +1 +0 +0$", out, re.MULTILINE)
    code, out, _ = inspected(capsys, path, "-m", model, "--json", "--set", "tune.overflow=drop")
    found = json.loads(out)
    assert code == 0 and found["splits"]["train"]["dropped"] + found["splits"]["valid"]["dropped"] == 1
    assert found["rows"][0]["pieces"][1] == {"trained": True, "text": "He [goes].<|im_end|>"}
    assert len(found["rows"]) == 3 and 0 < found["trained_share"] < 1 and found["added_tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "optim.lr=1"), "--set optim: expected a key of tune or train"),
        (("--set", "tune.block_size=65"), "tune.block_size = 65: the model's context holds 64"),
        (("--tokenizer", "x"), "--tokenizer goes with a corpus"),
    ],
)
def test_inspect_refuses(
    words: tuple[str, ...], message: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(LONG))
    code, _, error = inspected(capsys, tmp_path / "rows.jsonl", "--model", model, *words)
    assert code == 2 and message in error
    code, _, error = inspected(capsys, tmp_path / "rows.jsonl", "--rows", 2)
    assert code == 2 and "--set and --rows go with --model" in error
