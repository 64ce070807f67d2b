"""From rows to examples: templates, fitting, what is trained, and what is said."""

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
from examples import WORDS, chat_rows, opened, small_tokenizer
from models import tiny

from mlxgpt import cli
from mlxgpt.common.chat import shorten
from mlxgpt.common.config import TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params
from mlxgpt.common.sft import encode
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft import template as sft_template
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return small_tokenizer()


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
    sft_source.open_source(TuneConfig(source=str(path)), TrainConfig(), tokenizer, config, lines.append)
    unsaid = "ChatML does not write them, so they are not trained on"
    assert [line for line in lines if "does not write" in line] == [
        f"{path} row 1: {key}: {unsaid}" for key in ("tools", "tool_calls")
    ]
    lines.clear()
    turn = "{{ m.role + m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ eos_token }}"
    held = "{{ tools and tools[0].function.name }}{% for m in messages %}" + turn + "{% endfor %}"
    held += "{% if add_generation_prompt %}assistant{% endif %}"
    (tmp_path / "held.jinja").write_text(held)
    tune = TuneConfig(source=str(path), template=str(tmp_path / "held.jinja"))
    sft_source.open_source(tune, TrainConfig(), tokenizer, config, lines.append)
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
    with pytest.raises(UserError, match=r"rows.jsonl row \d: chat template changes an answer .* tune.unroll"):
        opened(tmp_path, chat, rows)
    source = opened(tmp_path, chat, rows, unroll=True)
    assert sum(len(source.rows(split)) for split in ("train", "valid")) == 12


LONG = {"instruction": " ".join(WORDS[:40]), "output": "He goes to the park."}


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


def test_a_row_without_a_target_is_refused(tmp_path: Path) -> None:
    chars = train_tokenizer("char", ["abc"], 0)
    with pytest.raises(UserError, match=r"rows.jsonl row 1: all 1 tokens are masked"):
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
    source = sft_source.open_source(tune, TrainConfig(batch_size=4), tokenizer, config, lines.append)
    counts = source.counts["train"]
    assert not path.exists()
    assert lines == [
        f"examples: {tmp_path}: alpaca: 41 train, 1 valid; {counts.trained / counts.tokens:.1%} of {counts.tokens:,} "
        "tokens are trained on",
        f"train: dropped 1 of 42 examples longer than 40 tokens ({counts.lost} tokens); "
        "tune.block_size = 160 keeps all",
        "near-duplicates: 1 of 1 validation examples have a similar training example: "
        f"{tmp_path / 'valid.jsonl'} row 1 and {tmp_path / 'train.jsonl'} row 2",
        "template: ChatML, an answer ends with <|im_end|>, with the new tokens <|im_start|> and <|im_end|>",
        f"batches: packed into 40 tokens: {source.real_share:.1%} of the positions are tokens; "
        f"{source.steps_per_epoch} steps an epoch",
    ]


def test_a_validation_row_may_be_the_longest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "He goes."}))
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": LONG["instruction"]}))
    config = tiny(family="llama", block_size=256, vocab_size=400)
    tune = TuneConfig(source=str(tmp_path))
    source = sft_source.open_source(tune, TrainConfig(), tokenizer, config, lambda line: None)
    (batch,) = source.validation()
    assert batch.weight == len(source.rows("valid")[0])


ROWS: list[list[dict[str, Any]]] = [
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}]}] * 4,
    [{"instruction": "a", "input": "b", "output": "c"}] * 4,
    [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}] * 4,
    [{"prompt": "a b", "completion": "c"}, {"prompt": "b", "completion": "d"}],
    [{"prompt": [{"role": "user", "content": "a"}],
      "completion": [{"role": "assistant", "content": "b", "weight": 1}]}] * 4,
    [{"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": '{"name": "f"}'},
                        {"from": "observation", "value": "y"}, {"from": "gpt", "value": "z", "train": True}]}] * 4,
    [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                   {"role": "model", "content": "b", "thinking": "c"}], "chat_template_kwargs": {}}] * 4,
]  # fmt: skip
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
    "mask off by one": (encode, "ids[1:], mask[1:]", "ids[1:], mask[:-1]"),
    "missing end token": (encode, "beginning.end(self.tokenizer, begin(whole))", "begin(whole)"),
    "the prompt trained on": (encode, "self.tune.train_on_prompt else prompt", "True else prompt"),
    "the newest turns given up": (shorten, "rest = _without(talk, first, starts[low])", "rest = talk"),
    "the end of a long question lost": (
        shorten,
        "return head.rstrip() + GAP + tail.lstrip()",
        "return head + tail[:0]",
    ),
    "no room for the question": (shorten, "least = most // 4\n    ids", "least = 0\n    ids"),
    "a prompt's end lost": (shorten, "head = before + (kept + 1) // 2", "head = before + kept"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_row_is_seen(name: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new = MUTATIONS[name]
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1
    mutant = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), vars(mutant))
    if module is encode:
        monkeypatch.setattr(sft_source, "Encoder", mutant.Encoder)
    else:
        monkeypatch.setattr(encode, "shorten", mutant)
    with pytest.raises((AssertionError, AttributeError)):
        test_a_completion_without_a_template_is_prompt_answer_and_end("What is it?", tmp_path, tokenizer)
        test_text_keeps_its_beginning_and_a_completion_both_ends_of_its_prompt(tmp_path, tokenizer)
        test_a_long_question_loses_its_middle(tmp_path, tokenizer)
        test_a_long_answer_loses_its_end_and_keeps_the_question(tmp_path, tokenizer)
        test_a_shortened_conversation_has_the_form_of_one(tmp_path, tokenizer)


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
    code, out, _ = inspected(capsys, path, "-m", model, "--rows", 2, "--set", "tune.overflow=truncate")
    assert code == 0 and out.count("[[He [goes].<|im_end|>]]") == 2 and "with the new tokens <|im_start|>" in out
    assert re.search(r"^train +\d+ +[\d,]+ +[\d,]+ +\d+ +1 +0 +0$", out, re.MULTILINE)
    code, out, _ = inspected(capsys, path, "-m", model, "--json")
    found = json.loads(out)
    assert code == 0 and found["splits"]["train"]["dropped"] + found["splits"]["valid"]["dropped"] == 1
    assert found["rows"][0]["pieces"][1] == {"trained": True, "text": "He [goes].<|im_end|>"}
    assert len(found["rows"]) == 3 and 0 < found["trained_share"] < 1 and found["added_tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "optim.lr=1"), "--set optim: expected a key of tune or train"),
        (("--set", "tune.block_size=65"), "tune.block_size = 65: the model's context holds 64"),
        (("--tokenizer", "x"), "--tokenizer: only for a corpus"),
    ],
)
def test_inspect_refuses(
    words: tuple[str, ...], message: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(LONG))
    code, _, error = inspected(capsys, tmp_path / "rows.jsonl", "--model", model, *words)
    assert code == 2 and message in error
    code, _, error = inspected(capsys, tmp_path / "rows.jsonl", "--rows", 2)
    assert code == 2 and "--set and --rows: only with --model" in error
