"""From rows to examples: templates, fitting, what is trained, and what is said."""

import json
import random
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import templates
from models import tiny
from small_rows import LONG, chat_rows, only, opened, small_tokenizer

from mlxgpt import cli
from mlxgpt.common.config import TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params
from mlxgpt.common.sft import encode
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return small_tokenizer()


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
    "mask off by one": ("ids[1:], mask[1:]", "ids[1:], mask[:-1]"),
    "missing end token": ("beginning.end(self.tokenizer, begin(whole))", "begin(whole)"),
    "the prompt trained on": ("self.tune.train_on_prompt else prompt", "True else prompt"),
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
        (("--set", "optim.lr=1"), "--set optim: expected a key of tune, train or prefer"),
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
