"""Examples longer than the window: dropped, refused, or shortened in a conversation's form."""

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
from models import tiny
from small_rows import LONG, WORDS, chat_rows, only, opened, small_tokenizer

from mlxgpt.common.chat import shorten
from mlxgpt.common.config import TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.sft import encode
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft import template as sft_template
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.protocol import Tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def shortened(folder: Path, tokenizer: Tokenizer, rows: list[Any], size: int, **tune: Any) -> SftSource:
    return opened(folder, tokenizer, rows, block_size=size, overflow="truncate", **tune)


def test_a_long_question_loses_its_middle(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (whole,) = opened(tmp_path, tokenizer, [LONG]).rows("train")
    source = shortened(tmp_path, tokenizer, [LONG], 50)
    (row,) = source.rows("train")
    text, trained = only(source)
    head, tail = re.fullmatch(
        r"<\|im_start\|>user\n(.+) \.\.\. (.+)<\|im_end\|>\n<\|im_start\|>assistant\n"
        r"He goes to the park\.<\|im_end\|>\n",
        text,
    ).groups()  # type: ignore[union-attr]
    assert LONG["instruction"].startswith(head) and LONG["instruction"].endswith(tail) and len(row) <= 50
    assert trained == "He goes to the park.<|im_end|>"
    counts = source.counts["train"]
    assert (counts.truncated, counts.cut, counts.dropped, counts.lost) == (1, 0, 0, len(whole) - len(row))


def test_a_long_answer_loses_its_end_and_keeps_the_question(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = shortened(tmp_path, tokenizer, [{"instruction": "What?", "output": LONG["instruction"]}], 40)
    text, trained = only(source)
    assert (
        len(source.rows("train")[0]) == 40
        and text == f"<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{trained}"
    )
    assert LONG["instruction"].startswith(trained) and len(trained) > 20
    assert (source.counts["train"].truncated, source.counts["train"].cut) == (0, 1)
    both = shortened(tmp_path, tokenizer, [LONG | {"output": LONG["instruction"]}], 60)
    text, trained = only(both)
    assert " ... " in text and LONG["instruction"].startswith(trained) and len(trained) > 20
    assert (both.counts["train"].truncated, both.counts["train"].cut) == (1, 1)


def test_text_keeps_its_beginning_and_a_completion_both_ends_of_its_prompt(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = shortened(tmp_path, tokenizer, [{"text": LONG["instruction"]}], 32)
    assert only(text)[0] == tokenizer.decode(tokenizer.encode(LONG["instruction"])[:33])
    row = {"prompt": LONG["instruction"], "completion": " He goes."}
    source = shortened(tmp_path, tokenizer, [row], 32)
    whole, trained = only(source)
    assert trained == " He goes.<|endoftext|>" and len(source.rows("train")[0]) == 32
    prompt = whole.removesuffix(trained)
    assert LONG["instruction"].startswith(prompt[:10]) and LONG["instruction"].endswith(prompt[-10:])
    source = shortened(tmp_path, tokenizer, [{"prompt": "What?", "completion": LONG["instruction"]}], 32)
    assert only(source)[0].startswith("What?" + only(source)[1]) and source.counts["train"].cut == 1


def test_the_beginning_of_text_stays(tmp_path: Path) -> None:
    chat = templates.made(tmp_path / "t", templates.LLAMA3, templates.FAMILIES["llama3"][1])
    source = shortened(tmp_path, chat, [LONG], 50)
    assert only(source)[0].startswith("<s><|start_header_id|>user<|end_header_id|>\n\nThe device")
    assert only(source)[1] == "He goes to the park.<|eot_id|>"


def test_a_row_whose_answer_would_lose_its_question_is_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    talk = [
        {"role": "system", "content": LONG["instruction"]},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "He goes to the park."},
    ]
    source = shortened(tmp_path, tokenizer, [{"messages": talk}, *chat_rows(3, longest=4)], 70)
    counts = source.counts["train"] if source.counts["train"].dropped else source.counts["valid"]
    assert (counts.dropped, counts.unanswerable, counts.truncated) == (1, 1, 0)
    lines: list[str] = []
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    tune = TuneConfig(source=str(tmp_path / "rows.jsonl"), block_size=70, overflow="truncate")
    config = tiny(family="llama", block_size=256, vocab_size=400)
    with pytest.raises(
        UserError, match="shortened, their answers would lose their questions: expected a larger tune.block"
    ):
        sft_source.open_source(tune, TrainConfig(), tokenizer, config, lines.append)


TURN = re.compile(r"<\|im_start\|>(system|user|tool|assistant)\n(.*?)(<\|im_end\|>\n|$)", re.DOTALL)


def test_a_shortened_conversation_has_the_form_of_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    draw, seen = random.Random(3), Counter()
    chat = sft_template.with_chatml(tokenizer)
    for number in range(60):
        said = lambda size: " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, size)))  # noqa: E731
        talk = [{"role": "system", "content": said(6)}] * draw.randint(0, 1)
        for _ in range(draw.randint(1, 4)):
            talk.append({"role": "user", "content": said(60)})
            if draw.random() < 0.3:
                talk += [{"role": "assistant", "content": said(4)}, {"role": "tool", "content": said(80)}]
            talk.append({"role": "assistant", "content": said(50)})
        source_of = lambda **more: opened(tmp_path, chat, [{"messages": talk}], **more)  # noqa: B023, E731
        size = draw.randint(60, 160)
        try:
            source = source_of(block_size=size, overflow="truncate")
        except UserError as error:
            assert "would lose their questions" in str(error), number
            seen["dropped"] += 1
            continue
        (row,) = source.rows("train")
        text, _ = only(source)
        turns = [(match[1], match[2], match[3]) for match in TURN.finditer(text)]
        assert "".join(match[0] for match in TURN.finditer(text)) == text and len(row) <= size
        assert all(end for _, _, end in turns[:-1]) and turns[-1][0] == "assistant"
        assert [turns[0]] * (talk[0]["role"] == "system") == [
            ("system", message["content"], "<|im_end|>\n") for message in talk[:1] if message["role"] == "system"
        ]
        kept = talk[len(talk) - len(turns) + (talk[0]["role"] == "system") :]  # the newest, behind the system prompt
        rest = turns[talk[0]["role"] == "system" :]
        assert [role for role, _, _ in rest] == [message["role"] for message in kept] and rest[0][0] == "user"
        for (role, content, _), message in zip(rest, kept, strict=True):
            if role == "assistant":
                assert message["content"].startswith(content)
            else:
                head, gap, tail = content.partition(" ... ")
                assert message["content"].startswith(head) and message["content"].endswith(tail if gap else head)
        answers = [content + end.strip() for role, content, end in turns if role == "assistant"]
        ids, mask = np.append(row.tokens, row.targets[-1]), np.append(False, row.weights > 0)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))).reshape(-1, 2)
        assert [chat.decode(ids[a:b].tolist()) for a, b in edges] == answers
        count = source.counts["train"]
        seen[f"{count.truncated} {count.cut}"] += 1
    assert min(seen[name] for name in ("0 0", "0 1", "1 0", "1 1", "dropped")) > 0, seen


def test_long_rows_are_dropped_or_refused_by_choice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [LONG, *({"instruction": f"{n}?", "output": "He goes."} for n in range(12))]
    source = opened(tmp_path, tokenizer, rows, block_size=40)
    assert sum(count.dropped for count in source.counts.values()) == 1
    assert sum(len(source.rows(split)) for split in ("train", "valid")) == 12
    with pytest.raises(UserError, match=r"rows.jsonl row 1: \d+ tokens: expected at most 40 [(]tune.block_size"):
        opened(tmp_path, tokenizer, rows, block_size=40, overflow="refuse")
    with pytest.raises(
        UserError, match="all 1 training examples are longer than 40 .* expected tune.block_size = 160 or"
    ):
        opened(tmp_path, tokenizer, [LONG], block_size=40)
    assert len(opened(tmp_path, tokenizer, [LONG], block_size=160).rows("train")) == 1
    with pytest.raises(UserError, match="tune.block_size = 1000: the model's context holds 256"):
        opened(tmp_path, tokenizer, rows, block_size=1000)


def test_a_wider_window_is_named_with_what_it_keeps(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = tiny(family="llama", block_size=256, vocab_size=400)
    longer = [LONG | {"instruction": f"{n} {LONG['instruction']}"} for n in range(9)]
    rows = [*longer, LONG | {"instruction": " ".join(WORDS[:40] * 3)}, {"instruction": "What?", "output": "He goes."}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.jsonl").write_text(json.dumps(rows[-1]) + "\n")
    for size, cure in (
        (40, "tune.block_size = 160 keeps all but 1"),
        (256, "the model's context of 256 holds none of them; tune.overflow = truncate shortens them"),
    ):
        lines: list[str] = []
        source = sft_source.open_source(
            TuneConfig(source=str(tmp_path), block_size=size), TrainConfig(), tokenizer, config, lines.append
        )
        count = source.counts["train"]
        assert count.dropped == (10 if size == 40 else 1)
        assert (
            f"train: dropped {count.dropped} of 11 examples longer than {size} tokens ({count.lost:,} tokens); {cure}"
            in lines
        )


MUTATIONS = {
    "the newest turns given up": ("rest = _without(talk, first, starts[low])", "rest = talk"),
    "the end of a long question lost": (
        "return head.rstrip() + GAP + tail.lstrip()",
        "return head + tail[:0]",
    ),
    "no room for the question": ("least = most // 4\n    ids", "least = 0\n    ids"),
    "a prompt's end lost": ("head = before + (kept + 1) // 2", "head = before + kept"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_row_cut_wrongly_is_seen(
    name: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = MUTATIONS[name]
    source = Path(shorten.__file__).read_text()
    assert source.count(old) == 1
    mutant = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(old, new), shorten.__file__, "exec"), vars(mutant))
    monkeypatch.setattr(encode, "shorten", mutant)
    with pytest.raises((AssertionError, AttributeError)):
        test_text_keeps_its_beginning_and_a_completion_both_ends_of_its_prompt(tmp_path, tokenizer)
        test_a_long_question_loses_its_middle(tmp_path, tokenizer)
        test_a_long_answer_loses_its_end_and_keeps_the_question(tmp_path, tokenizer)
        test_a_shortened_conversation_has_the_form_of_one(tmp_path, tokenizer)
