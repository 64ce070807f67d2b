"""What is trained by setting: parts of answers, control tokens as text, prompts as chat gives them; what is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
from models import tiny
from published import PUBLISHED, Published

from mlxgpt.common.config import TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate import rows as evaluation_rows
from mlxgpt.common.sft import settings as sft_settings
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer


def tokenizer_of(folder: Path, one: Published) -> Tokenizer:
    place = templates.tokenizer_folder(folder, one.plain, [*one.special, one.eos, one.bos])
    config = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": one.eos, "bos_token": one.bos}))
    return load_tokenizer(place)


def opened(folder: Path, tokenizer: Tokenizer, rows: list[Any], **tune: Any) -> tuple[SftSource, list[str]]:
    """A source without a validation split, and the lines it says."""
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[str] = []
    config = tiny(family="llama", block_size=256, vocab_size=500)
    settings = TuneConfig(source=str(folder), **tune)
    return sft_source.open_source(settings, TrainConfig(), tokenizer, config, lines.append), lines


def trained(source: SftSource) -> list[str]:
    """The trained text of each example."""
    ids = [np.append(False, row.weights > 0) for row in source.rows("train")]
    rows = zip(source.rows("train"), ids, strict=True)
    return [source.tokenizer.decode(np.append(row.tokens, row.targets[-1])[mask].tolist()) for row, mask in rows]


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    """A row of user and assistant in turns; ``more`` for the last message."""
    messages = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return {"messages": [*messages[:-1], messages[-1] | more]}


def test_a_prompt_that_opens_a_thought_is_said_and_the_cure_works(tmp_path: Path) -> None:
    one = PUBLISHED["DeepSeek R1 distilled"]
    tokenizer = tokenizer_of(tmp_path / "t", one)
    rows = [chat("What is it?", "It is.", reasoning_content="hm"), chat("Really?", "Yes.")]
    source, lines = opened(tmp_path, tokenizer, rows)
    assert trained(source) == [f"It is.{one.eos}", f"Yes.{one.eos}"] and source.counts["train"].unopened == 2
    unopened = [line for line in lines if "prompt ends in '<think>" in line]
    assert len(unopened) == 1 and "which 4 examples lack: tune.unroll = true" in unopened[0]
    assert any("reasoning:" in line and "tune.unroll = true trains it" in line for line in lines)
    source, lines = opened(tmp_path, tokenizer, rows, unroll=True)
    assert trained(source) == [f"hm\n</think>\n\nIt is.{one.eos}", f"\n</think>\n\nYes.{one.eos}"]
    assert not any("unroll" in line or "reasoning:" in line for line in lines)
    prompt, answer = source.rows("train")[0].last_answer
    assert source.template and prompt.tolist() == source.template.encode(rows[0]["messages"][:1], generation=True)
    assert tokenizer.decode(answer.tolist()) == trained(source)[0]


def test_parts_of_answers_are_trained_by_choice(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", PUBLISHED["Qwen3"])
    rows = [chat("What is it?", "It is.", reasoning_content="hm"), chat("Really?", "Yes.", reasoning_content="oh")]
    parts = {"thinking": "<think>\nhm\n</think>\n\n", "answer": "It is.<|im_end|>"}
    for part, text in (parts | {"both": "".join(parts.values())}).items():
        assert trained(opened(tmp_path, tokenizer, rows, train_on=part)[0])[0] == text
    with pytest.raises(UserError, match=r"train.jsonl row 2: no reasoning in its answers: .* tune.train_on = both"):
        opened(tmp_path, tokenizer, [rows[0], chat("Really?", "Yes.")], train_on="thinking")
    with pytest.raises(UserError, match="tune.train_on = answer: examples without a chat template"):
        opened(tmp_path, tokenizer, [{"text": "He goes."}], train_on="answer")
    for wrong in ({"train_on": "all"}, {"train_on": "answer", "train_on_prompt": True}):
        with pytest.raises(UserError, match=r"tune.train_on = "):
            TuneConfig(**wrong)  # type: ignore[arg-type]


def test_control_tokens_in_messages_are_counted_and_text_by_choice(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", PUBLISHED["Qwen3"])
    rows = [chat("What is it?", "It is."), chat("<|im_end|> is what?", "An end."), chat("a", "<tool_call>")]
    plain, lines = opened(tmp_path, tokenizer, rows)
    said = [line for line in lines if line.startswith("control tokens:")]
    assert len(said) == 1 and "messages of 2 of 6 rows" in said[0] and "train.jsonl row 2 (user)" in said[0]
    assert said[0].endswith("tune.sanitize = true makes them text")
    safe, lines = opened(tmp_path, tokenizer, rows, sanitize=True)
    assert next(line for line in lines if line.startswith("control tokens:")).endswith("they are text (tune.sanitize)")
    end = tokenizer.encode("<|im_end|>")[0]
    for source, counts in ((plain, [2, 3, 2]), (safe, [2, 2, 2])):
        assert [int((row.tokens == end).sum()) for row in source.rows("train")] == counts
    assert trained(plain) == trained(safe) and np.array_equal(
        plain.rows("train")[0].tokens, safe.rows("train")[0].tokens
    )
    assert not any(line.startswith("control tokens:") for line in opened(tmp_path, tokenizer, rows[:1])[1])


def test_control_tokens_of_a_text_are_text_by_choice(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", PUBLISHED["Qwen3"])
    rows = [{"text": "He goes <|im_start|> on"}]
    start = tokenizer.encode("<|im_start|>")[0]
    for sanitize in (False, True):
        (row,) = opened(tmp_path, tokenizer, rows, sanitize=sanitize)[0].rows("train")
        assert (start in row.tokens) != sanitize


@pytest.mark.parametrize("name", ["Qwen3", "gpt-oss", "Mistral Nemo"])
def test_the_cure_of_a_refusal_works(name: str, tmp_path: Path) -> None:
    one = PUBLISHED[name]
    tokenizer = tokenizer_of(tmp_path / "t", one)
    row = chat("What is it?", "It is.", "Really?", "Yes.")
    row["messages"].insert(0, {"role": "system", "content": "Be kind."})
    with pytest.raises(UserError, match=r"train.jsonl row 1: .* tune.unroll = true makes an example of each answer"):
        opened(tmp_path, tokenizer, [row])
    source, _ = opened(tmp_path, tokenizer, [row], unroll=True)
    assert len(source.rows("train")) == 2 and all(
        "Be kind." in tokenizer.decode(r.tokens.tolist()) for r in source.rows("train")
    )
    assert [
        text.endswith(end) for text, end in zip(trained(source), (f"It is.{one.eos}", f"Yes.{one.eos}"), strict=True)
    ] == [True] * 2


def test_eval_scores_the_answers_of_rewritten_history_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_of(tmp_path / "t", PUBLISHED["Qwen3"])
    config = tiny(family="llama", block_size=64, vocab_size=500)
    path = tmp_path / "rows.jsonl"
    rows = [chat("What is it?", "It is.", "Really?", "Yes."), chat("x " * 200, "Yes.")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluation_rows.examples(evaluation_rows.settings(str(path), []), "val", tokenizer, config)
    assert len(found) == 3 and all(len(row) <= 64 for row in found) and not capsys.readouterr().err
    rows[1]["messages"].insert(0, {"role": "system", "content": "x " * 200})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(evaluation_rows.examples(evaluation_rows.settings(str(path), []), "val", tokenizer, config)) == 2
    assert "1 of 2 rows are not scored: longer than 64 tokens" in capsys.readouterr().err
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match="no row fits into the model's context of 64 tokens with its question"):
        evaluation_rows.examples(evaluation_rows.settings(str(path), []), "val", tokenizer, config)


def test_a_template_without_ends_is_cured_by_chatml_or_a_file(tmp_path: Path) -> None:
    endless = "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    tokenizer = tokenizer_of(tmp_path / "t", Published(endless, ()))
    rows = [chat("What is it?", "It is.")]
    with pytest.raises(
        UserError, match=r"is followed by '\\n\\n': .* tune.template = chatml adds one, or names a jinja"
    ):
        opened(tmp_path, tokenizer, rows)
    assert trained(opened(tmp_path, tokenizer, rows, template="chatml")[0]) == ["It is.<|im_end|>"]
    (tmp_path / "own.jinja").write_text(endless.replace("m['content']", "m['content'] + eos_token"))
    source, _ = opened(tmp_path, tokenizer, rows, template=str(tmp_path / "own.jinja"))
    assert trained(source)[0].endswith("It is.</s>")


def test_a_folder_does_not_hide_the_template_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chatml", "auto", "m", "own.jinja"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for given, expected in (("chatml", "chatml"), ("auto", "auto"), ("own.jinja", str(tmp_path / "own.jinja"))):
        made = sft_settings.recipe({"tune": {"model": "m", "source": "m", "template": given}}, "test")
        assert made.tune and made.tune.template == expected and made.tune.model == str(tmp_path / "m")


def test_eval_takes_a_parquet_file_without_the_text_column_as_rows(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), path)
    assert evaluation_rows.is_rows(str(path), "text")
    assert not evaluation_rows.is_rows(str(path), "prompt")
