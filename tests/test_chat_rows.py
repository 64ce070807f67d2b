"""Chat rows as people have them: what reaches the template, which turns train, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import templates
from talks import (
    EITHER,
    IM,
    ITEMS,
    JOINED,
    OBJECTS,
    PARTS,
    PRINTED,
    opened,
    reasons,
    refused,
    said,
    template,
    trained,
    turns,
    write,
)
from templates import tokenizer_folder
from transformers import AutoTokenizer

from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate import rows as evaluation_rows
from mlxgpt.common.rows import arrow, messages
from mlxgpt.common.rows.formats import open_rows
from mlxgpt.common.sft import forms, written
from mlxgpt.common.sft.encode import Encoder
from mlxgpt.common.tokenizers.load import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), templates.SMOLLM2, IM)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


@pytest.mark.parametrize("read", messages.REASONING)
@pytest.mark.parametrize("written_as", messages.REASONING)
def test_reasoning_reaches_a_template_under_every_name(
    read: str, written_as: str, tokenizer: Any, theirs: Any, tmp_path: Path
) -> None:
    source = reasons(read)
    (row,) = opened(write(tmp_path / "rows.jsonl", {"messages": said("q", "a", **{written_as: "hm"})}))
    found = template(tokenizer, source)
    assert trained(found, row) == [["<think>hm</think>a<|im_end|>"]]
    assert not list(written.lines(found, [row]))
    if {read, written_as} <= {"reasoning_content", "thinking"}:  # those that transformers fills
        text = theirs.apply_chat_template(list(row.messages), chat_template=source, tokenize=False)
        assert found.render(row.messages) == text


def test_qwen3_trains_the_thought_of_a_row_that_calls_it_thinking(tokenizer: Any, theirs: Any, tmp_path: Path) -> None:
    talk = said("q", "a", thinking="hm")
    (row,) = opened(write(tmp_path / "rows.jsonl", {"messages": talk}))
    found = template(tokenizer, templates.QWEN3)
    assert trained(found, row) == [["<think>\nhm\n</think>\n\na<|im_end|>"]]
    ids = theirs.apply_chat_template(talk, chat_template=templates.QWEN3, return_dict=False)
    assert found.encode(row.messages) == ids


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"thinking": "a", "reasoning": "b"}, "message 2: thinking and reasoning differ: expected the reasoning once"),
        ({"thinking": ["a"]}, "message 2: thinking is list \"['a']\": expected a string"),
        ({"role": "user", "reasoning": "a"}, "message 2: reasoning of a user: expected it in the assistant's turns"),
        ({"weight": 0.5}, "message 2: weight is float '0.5': expected 0 or 1"),
        ({"weight": "0"}, "message 2: weight is str '0': expected 0 or 1"),
        ({"weight": True}, "message 2: weight is bool 'True': expected 0 or 1"),
        ({"train": 0}, "message 2: train is int '0': expected true or false"),
        ({"weight": 0, "train": True}, "message 2: weight and train contradict each other: expected one of them"),
        ({"role": "user", "weight": 1}, "message 2: weight = 1 of a user: only the assistant's turns are trained on"),
        ({"weight": 0}, "FILE row 1: every assistant turn has weight 0 or train false: expected one to train on"),
        ({"content": [{"type": "image_url", "image_url": "u"}]}, "message 2: content part 1: type 'image_url': e"),
        ({"content": [{"type": "text", "text": 3}]}, "message 2: content part 1: text is int '3': expected a string"),
        ({"content": [{"type": "thinking", "thinking": "a"}]}, "expected its text under the message's key reasoning_"),
        ({"content": [{"type": "text", "text": " "}]}, "message 2: content is empty: expected text"),
        ({"content": "", "tool_calls": []}, "message 2: content is empty: expected text"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{1"}}]},
         "message 2: tool_calls[0].function.arguments: not JSON: Expecting property name"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
         "message 2: tool_calls[0].function.arguments is list '[1]': expected a JSON object, as text or as it is"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "message 2: tool_calls[0] is dict"),
        ({"function_call": "f()"}, "message 2: function_call is str 'f()': expected an object with name and arguments"),
        ({"role": "bot"}, "message 2: unknown role 'bot': expected one of system, developer, user, assistant, tool, h"),
        ({"role": "function_call", "content": "f(1)"}, "message 2: function_call: not JSON"),
    ],
)  # fmt: skip
def test_a_message_that_means_nothing_here_is_named(message: dict[str, Any], expected: str, tmp_path: Path) -> None:
    talk = [*said("q", "a"), *said("q", "a")][:2]
    found = refused(write(tmp_path / "rows.jsonl", {"messages": [talk[0], talk[1] | message]}))
    assert found.startswith("FILE row 1: ") and expected in found


@pytest.mark.parametrize("source", [templates.SMOLLM2, templates.MARKED, templates.LLAMA3])
@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_turns_of_weight_0_are_context(source: str, key: str, folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    no, yes = (0, 1) if key == "weight" else (False, True)
    talk = said("q1", "a1", "q2", "a2", "q3", "a3")
    talk[0][key], talk[1][key], talk[3][key] = no, no, yes
    (row,) = opened(write(tmp_path / "rows.jsonl", {"messages": talk}))
    assert all(key not in message for message in row.messages)
    if source == templates.LLAMA3:
        tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "llama", source, ["<|eot_id|>"]))
    found = template(tokenizer, source)
    end = "<|eot_id|>" if source == templates.LLAMA3 else "<|im_end|>"
    assert trained(found, row) == [["a2" + end, "a3" + end]]
    assert trained(found, row, unroll=True) == [["a2" + end], ["a3" + end]]
    (plain,) = opened(write(tmp_path / "rows.jsonl", {"messages": said("q1", "a1", "q2", "a2", "q3", "a3")}))
    whole, same = (Encoder(TuneConfig(), tokenizer, found, 1024).examples([one])[0][0] for one in (row, plain))
    assert whole.tokens.tolist() == same.tokens.tolist() and row.hash != plain.hash


def test_turns_that_are_not_trained_need_not_be_located(tokenizer: Any, tmp_path: Path) -> None:
    forgets = turns("{{ m.content if loop.last else m.content.split('</think>')[-1] }}")  # as Qwen3 does
    talk = said("q1", "<think>x</think>a1", "q2", "<think>y</think>a2")
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="row 1: the template changes an answer"):
        trained(template(tokenizer, forgets), *opened(write(path, {"messages": talk})))
    talk[1]["weight"] = 0
    assert trained(template(tokenizer, forgets), *opened(write(path, {"messages": talk}))) == [
        ["<think>y</think>a2<|im_end|>"]
    ]


def test_weight_0_contradicts_training_on_everything(tmp_path: Path) -> None:
    talk = said("q1", "a1", "q2", "a2")
    talk[1]["weight"] = 0
    path = write(tmp_path / "rows.jsonl", {"messages": talk})
    assert "FILE row 1: message 2: weight 0 or train false, and tune.train_on_prompt" in refused(
        path, train_on_prompt=True
    )


@pytest.mark.parametrize("source", [PARTS, EITHER, templates.SMOLLM2])
def test_parts_of_text_reach_every_template(source: str, tokenizer: Any, theirs: Any, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "a barometer."}]
    talk = [*said("What?"), {"role": "assistant", "content": parts}]
    (row,) = opened(write(tmp_path / "rows.jsonl", {"messages": talk}))
    found = template(tokenizer, source)
    assert trained(found, row) == [["It is a barometer.<|im_end|>"]]
    if source == PARTS:  # it takes nothing else
        talk[0]["content"] = [{"type": "text", "text": "What?"}]
    if source == templates.SMOLLM2:
        talk[1]["content"] = "It is a barometer."
    assert found.render(row.messages) == theirs.apply_chat_template(talk, chat_template=source, tokenize=False)
    assert "barometer" in row.words


CALL = {"a": 1, "b": [None, "\u00e9"]}


@pytest.mark.parametrize("source", [OBJECTS, ITEMS, JOINED, PRINTED, templates.QWEN25])
@pytest.mark.parametrize("form", ["object", "text", "bare", "function_call", "sharegpt"])
def test_arguments_may_be_text_or_objects(source: str, form: str, tokenizer: Any, theirs: Any, tmp_path: Path) -> None:
    as_text = source in (JOINED, PRINTED)
    text = json.dumps(CALL, ensure_ascii=False)
    made: dict[str, Any] = {"role": "assistant", "content": ""}
    if form == "function_call":
        made["function_call"] = {"name": "add", "arguments": text}
    elif form == "sharegpt":
        made = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": CALL})}
    elif form == "bare":
        made["tool_calls"] = [{"name": "add", "arguments": text}]
    else:
        inner = {"name": "add", "arguments": CALL if form == "object" else text}
        made["tool_calls"] = [{"type": "function", "function": inner}]
    (row,) = opened(write(tmp_path / "rows.jsonl", {"messages": [*said("q"), made]}))
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": CALL}}]
    given = {"name": "add", "arguments": text if as_text else CALL}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": given}]}
    found = template(tokenizer, source)
    assert found.render(row.messages) == theirs.apply_chat_template(
        [*said("q"), call], chat_template=source, tokenize=False
    )
    form_of = "JSON text" if as_text else "objects"
    assert list(written.lines(found, [row])) == [
        f"tool_calls: the template takes arguments as {form_of}; rows may have either"
    ]


def test_what_a_template_leaves_out_is_said_once_with_its_row(tokenizer: Any, tmp_path: Path) -> None:
    silent = turns("{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}")
    talk = [
        {"role": "system", "content": "s"},
        *said("q", "a", reasoning="hm"),
        {"role": "tool", "content": "t"},
        *said("q", "b"),
    ]
    rows = opened(write(tmp_path / "rows.jsonl", {"messages": talk}, {"messages": talk, "tools": [{"name": "f"}]}))
    found = [line.replace(str(tmp_path), "") for line in written.lines(template(tokenizer, silent), rows)]
    assert found == [
        "/rows.jsonl row 2: tools: the template does not write them, so they are not trained on",
        "/rows.jsonl row 1: reasoning: the template does not write it, so it is not trained on; in content, as "
        "<think>...</think>, it would be",
        "/rows.jsonl row 1: role system: the template does not write it, so the model does not see it",
        "/rows.jsonl row 1: role tool: the template does not write it, so the model does not see it",
    ]


def test_a_developer_is_a_system_to_templates_that_know_none(tokenizer: Any) -> None:
    asked = [{"role": "developer", "content": "Be brief."}, *said("q", "a")]
    assert "<|im_start|>developer\nBe brief." in template(tokenizer, templates.MARKED).render(asked)
    assert "<|im_start|>system\nBe brief." in template(tokenizer, templates.QWEN25).render(asked)


def test_trls_prompts_and_completions_of_messages(tokenizer: Any, tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "s"}, *said("q1", "a1", "q2")]
    row = {"prompt": asked, "completion": [{"role": "assistant", "content": "a2"}]}
    path = write(tmp_path / "rows.jsonl", row)
    (found,) = opened(path)
    assert found.messages == (*asked, *row["completion"]) and open_rows(TuneConfig(source=str(path))).format == "chat"
    assert trained(template(tokenizer, templates.SMOLLM2), found) == [["a2<|im_end|>"]]
    row["completion"] += [{"role": "tool", "content": "t"}, {"role": "assistant", "content": "a3"}]
    (found,) = opened(write(path, row))
    assert trained(template(tokenizer, templates.SMOLLM2), found) == [["a2<|im_end|>", "a3<|im_end|>"]]


@pytest.mark.parametrize(
    ("row", "expected", "cure"),
    [
        ({"prompt": said("q"), "completion": "a"},
         'completion is str \'a\', and prompt a list of messages: expected [{"role": "assistant", "content": ...}', {}),
        ({"prompt": "q", "completion": said("q", "a")[1:]},
         'prompt is str \'q\', and completion a list of messages: expected [{"role": "user", "content": ...}]', {}),
        ({"prompt": said("q", "a"), "completion": said("q", "a")[1:]},
         "prompt ends with the assistant's message: expected it at the start of completion", {}),
        ({"prompt": said("q"), "completion": said("q")}, "no assistant turn: expected at least one to train on", {}),
        ({"prompt": "q", "completion": "a", "label": False}, "preference data (label is False)", {}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "--set tune.completion_key=chosen trains on the chosen",
         {"completion_key": "chosen"}),
        ({"prompt": said("q"), "chosen": said("q", "a")[1:], "rejected": said("q", "b")[1:]},
         "--set tune.completion_key=chosen trains on the chosen", {"completion_key": "chosen"}),
        ({"prompt": "q", "chosen": said("q", "a"), "rejected": said("q", "b")},
         "--set tune.messages_key=chosen trains on the chosen", {"messages_key": "chosen"}),
        ({"chosen": said("q", "a"), "rejected": said("q", "b")}, "--set tune.messages_key=chosen trains on the chosen",
         {"messages_key": "chosen"}),
        ({"chosen": "q a", "rejected": "q b"}, "--set tune.text_key=chosen trains on the chosen",
         {"text_key": "chosen"}),
    ],
)  # fmt: skip
def test_rows_of_other_methods_are_refused_with_a_cure_that_works(
    row: dict[str, Any], expected: str, cure: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    found = refused(path)
    assert found.startswith("FILE row 1: ") and expected in found
    if cure:
        (kept,) = opened(path, **cure)
        assert "b" not in kept.words.split("\n")


def test_conversations_of_every_tool(tmp_path: Path) -> None:
    expected = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    )
    named = [{"role": "system", "content": "s"}, {"role": "human", "content": "q"}, {"role": "model", "content": "a"}]
    valued = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 1}]
    path = tmp_path / "rows.jsonl"
    for row in (
        {"conversations": named},
        {"conversations": valued, "system": "s"},
        {"messages": [{"from": "system", "value": "s"}, *valued]},
        {"messages": json.dumps(named)},
        {"instruction": "q", "response": "a", "system": "s"},
    ):
        assert [one.messages for one in opened(write(path, row))] == [expected], row
    tool = {"name": "add", "parameters": {"type": "object"}}
    told = {"conversations": valued, "tools": [json.dumps(tool)]}  # as Parquet files often hold them
    assert opened(write(path, told))[0].tools == (tool,)
    call = {"from": "function_call", "value": '[{"name": "add", "arguments": {"a": 1}}]'}
    row = {
        "conversations": [valued[0], call, {"from": "observation", "value": "3"}, valued[1]],
        "tools": json.dumps([tool]),
    }
    (found,) = opened(write(path, row))
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.tools == (tool,) and found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    old = {
        "messages": [*said("q"), {"role": "function", "name": "add", "content": "3"}, *said("q", "a")[1:]],
        "functions": [tool],
    }
    (found,) = opened(write(path, old))
    assert found.messages[1]["role"] == "tool" and found.tools == ({"type": "function", "function": tool},)
    told = {"instruction": "q2", "context": "c", "output": "a2", "history": [["q1", "a1"]]}
    (found,) = opened(write(path, told))
    assert [message["content"] for message in found.messages] == ["q1", "a1", "q2\n\nc", "a2"]
    assert "history is list" in refused(write(path, told | {"history": ["q1"]}))


NULLED = {"messages": [*said("q"), {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}]}]}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
@pytest.mark.parametrize("asked", ["auto", "true", "false"])
def test_nulls_are_arrows_or_the_rows_own(suffix: str, asked: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".arrow":
        table = pyarrow.Table.from_pylist([NULLED])
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        write(path, NULLED)
    (row,) = opened(path, drop_nulls=asked)
    kept = asked == "false" or (asked == "auto" and suffix == ".jsonl")
    found = row.messages[1]
    assert "content" not in found
    assert found["tool_calls"][0]["function"]["arguments"] == ({"a": 1, "b": None} if kept else {"a": 1})


def test_keys_that_arrow_fills_in_do_not_reach_the_template(tokenizer: Any, theirs: Any, tmp_path: Path) -> None:
    calls = [{"function": {"name": name, "arguments": given}} for name, given in (("f", {"a": 1}), ("g", {"b": 2}))]
    talk = [*said("q"), {"role": "assistant", "content": "", "tool_calls": calls}]
    tools = [{"name": "f", "parameters": {"a": {"type": "int"}}}, {"name": "g", "parameters": {"b": {"type": "int"}}}]
    rows = [{"messages": talk, "tools": tools}, {"messages": said("q", "a"), "tools": None}]
    found = template(tokenizer, templates.QWEN25)
    for row, given in zip(opened(write(tmp_path / "rows.parquet", *rows)), rows, strict=True):
        more = {"chat_template": templates.QWEN25, "tokenize": False, "tools": given["tools"]}
        assert found.render(row.messages, row.tools) == theirs.apply_chat_template(given["messages"], **more)


def dataset(folder: Path, *shards: list[dict[str, Any]]) -> Path:
    """A folder as datasets' save_to_disk writes it: Arrow streams, and state.json that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(shards):05}.arrow" for n in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_folders_that_datasets_writes(tmp_path: Path) -> None:
    shards = [[{"messages": said(f"q{n}", f"a{n}")}] for n in range(3)]
    one = dataset(tmp_path / "one", *shards)
    assert [row.messages[1]["content"] for row in opened(one)] == ["a0", "a1", "a2"]
    dataset(tmp_path / "both/train", *shards)
    dataset(tmp_path / "both/validation", shards[0])
    (tmp_path / "both/dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    rows = open_rows(TuneConfig(source=str(tmp_path / "both")))
    assert (len(rows.splits["train"]), len(rows.splits["valid"]), len(rows.digest)) == (3, 1, 4)
    assert evaluation_rows.is_rows(str(one), "text") and evaluation_rows.is_rows(str(tmp_path / "both"), "text")
    assert refused(one / "state.json").endswith("expected a list of objects")
    (one / "data-00001-of-00003.arrow").write_bytes(b"no")
    assert "data-00001-of-00003.arrow: not an Arrow file that can be read" in refused(one)
    (one / "data-00001-of-00003.arrow").unlink()
    assert "state.json: data-00001-of-00003.arrow: no such file" in refused(one)
    (tmp_path / "both/dataset_dict.json").write_text(json.dumps({"splits": ["all"]}))
    assert "splits all: expected one called train" in refused(tmp_path / "both")
    assert arrow.without_nulls({"a": None, "b": [None, {"c": None}]}) == {"b": [None, {}]}


def test_a_template_is_asked_what_it_reads(tokenizer: Any) -> None:
    found = {}
    for source in (PARTS, EITHER, templates.QWEN25, JOINED, PRINTED, ITEMS, templates.PHI3, templates.LLAMA3):
        reads: forms.Reads = template(tokenizer, source).reads()
        found[source] = (reads.parts, reads.strings, reads.text_arguments, reads.developer)
    assert found == {
        PARTS: (True, False, False, False),
        EITHER: (True, True, False, True),
        templates.QWEN25: (False, True, False, False),
        JOINED: (False, True, True, True),
        PRINTED: (False, True, True, True),
        ITEMS: (False, True, False, True),
        templates.PHI3: (False, True, False, False),
        templates.LLAMA3: (False, True, False, True),
    }


MUTATIONS = {
    "reasoning under its own name alone": (
        "| dict.fromkeys(REASONING, reasoning) | own | {REASONING[0]: reasoning}",
        "",
    ),
    "parts joined for all": ("isinstance(content, list) and not self.parts", "isinstance(content, list)"),
    "text where parts are read": ("not self.strings", "False"),
    "objects where text is joined": ("calls and self.text_arguments", "False"),
    "text for all": ("calls and self.text_arguments", "calls"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_message_in_the_wrong_form_is_seen(
    name: str, tokenizer: Any, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = MUTATIONS[name]
    source = Path(forms.__file__).read_text()
    assert source.count(old) == 1
    space: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(source.replace(old, new), forms.__file__, "exec"), space)
    monkeypatch.setattr(forms.Reads, "_fitted", space["Reads"]._fitted)
    with pytest.raises((AssertionError, UserError)):
        test_reasoning_reaches_a_template_under_every_name("thinking", "reasoning", tokenizer, theirs, tmp_path)
        for each in (PARTS, EITHER, templates.SMOLLM2):
            test_parts_of_text_reach_every_template(each, tokenizer, theirs, tmp_path)
        for each in (OBJECTS, ITEMS, JOINED, PRINTED):
            test_arguments_may_be_text_or_objects(each, "object", tokenizer, theirs, tmp_path)
