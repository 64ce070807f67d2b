"""Chat templates beside transformers', and which tokens are an assistant's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
from templates import FAMILIES, made, tokenizer_folder
from transformers import AutoTokenizer

from mlxgpt.common.chat import locate
from mlxgpt.common.errors import UserError
from mlxgpt.common.sft import template as sft_template
from mlxgpt.common.sft.template import Template, template_of, with_chatml
from mlxgpt.common.tokenizers.load import from_files, load_tokenizer, train_tokenizer

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
TALK = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is a barometer.\n\n  Really."},
    {"role": "user", "content": "Really? 12 \u00fc \U0001f600"},
    {"role": "assistant", "content": "He goes to the park, <b>every</b> day"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [
    {"role": "user", "content": "Add 1 and 2"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "\u00e9"]}}}],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "3, then."},
]


def talks(system: bool) -> list[list[dict[str, Any]]]:
    return [TALK, TALK[:2], TALK[:3], *([[SYSTEM, *TALK]] if system else [])]


def trained(template: Template, messages: list[dict[str, Any]], tools: Any = (), **more: Any) -> list[str]:
    """The texts of the runs of tokens that are the assistant's."""
    (found,) = template.encode_turns([("f row 1", messages, tools)], **more)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.mask.astype(int), [0]])))
    return [template.tokenizer.decode(found.ids[a:b].tolist()) for a, b in edges.reshape(-1, 2).tolist()]


def found_template(folder: Path, name: str) -> Template:
    source, special, _, _ = FAMILIES[name]
    template = template_of(made(folder, source, special))
    assert template
    return template


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3"])
def test_text_and_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    source, special, _, system = FAMILIES.get(name, (templates.QWEN3, templates._IM, "<|im_end|>", True))
    folder = tokenizer_folder(tmp_path, source, special)
    theirs = AutoTokenizer.from_pretrained(folder)
    template = template_of(load_tokenizer(folder))
    assert template
    cases = [(talk, None) for talk in talks(system)] + ([(CALLS, TOOLS)] if name == "qwen2.5" else [])
    for talk, tools in cases:
        for generation in (False, True):
            text = theirs.apply_chat_template(talk, tools=tools, tokenize=False, add_generation_prompt=generation)
            assert template.render(talk, tools or (), generation) == text
            ids = theirs.apply_chat_template(talk, tools=tools, add_generation_prompt=generation, return_dict=False)
            assert template.encode(talk, tools or (), generation) == ids
    if name != "qwen3":
        (found,) = template.encode_turns([("f row 1", TALK, ())])
        assert found.ids.tolist() == theirs.apply_chat_template(TALK, return_dict=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_and_its_end_token_are_trained_and_nothing_else(name: str, tmp_path: Path) -> None:
    _, _, end, system = FAMILIES[name]
    template = found_template(tmp_path, name)
    assert template.end == end
    space = " " if name == "mistral" else ""
    answers = [space + TALK[1]["content"] + end, space + TALK[3]["content"] + end]
    for talk in talks(system):
        assert trained(template, talk) == answers[: sum(m["role"] == "assistant" for m in talk)]
    assert trained(template, TALK, last_only=True) == answers[1:]


def test_marked_turns_are_those_of_transformers(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, templates.MARKED, templates._IM)
    theirs = AutoTokenizer.from_pretrained(folder)
    template = template_of(load_tokenizer(folder))
    assert template
    (found,) = template.encode_turns([("f row 1", TALK, ())])
    masks = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert found.mask.astype(int).tolist() == masks


def test_tool_calls_are_trained(tmp_path: Path) -> None:
    template = found_template(tmp_path, "qwen2.5")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "\u00e9"]}}\n</tool_call><|im_end|>'
    assert trained(template, CALLS, TOOLS) == [call, "3, then.<|im_end|>"]


def test_an_answer_that_spells_the_end_token_is_trained_to_its_own_end(tmp_path: Path) -> None:
    template = found_template(tmp_path, "smollm2")
    talk = [TALK[0], {"role": "assistant", "content": "say <|im_end|> and go on"}, *TALK[2:]]
    assert trained(template, talk)[0] == "say <|im_end|> and go on<|im_end|>"


def test_qwen3_rewrites_history_and_is_refused_unless_unrolled(tmp_path: Path) -> None:
    template = template_of(made(tmp_path, templates.QWEN3, templates._IM))
    assert template
    with pytest.raises(UserError, match="^f row 1: chat template changes an answer when more follows"):
        template.encode_turns([("f row 1", TALK, ())])
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is."}
    assert trained(template, [TALK[0], thought]) == ["<think>\nhm\n</think>\n\nIt is.<|im_end|>"]
    expected = "<think>\n\n</think>\n\n" + TALK[3]["content"] + "<|im_end|>"
    assert trained(template, TALK, last_only=True) == [expected]
    assert trained(template, TALK[:2]) == ["<think>\n\n</think>\n\n" + TALK[1]["content"] + "<|im_end|>"]


def test_templates_that_rewrite_what_was_asked_are_refused(tmp_path: Path) -> None:
    rewriting = "{% for m in messages %}{{ loop.length ~ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    template = template_of(made(tmp_path, rewriting, []))
    assert template
    with pytest.raises(
        UserError,
        match="f row 1: chat template writes the prompt of an answer otherwise when the answer follows.* tune.unroll",
    ):
        template.encode_turns([("f row 1", TALK, ())])


@pytest.mark.parametrize("split", ["", templates.LLAMA3_SPLIT])
def test_tokens_before_an_answer_are_those_of_the_prompt_alone(split: str, tmp_path: Path) -> None:
    source = templates.LLAMA3.replace(" | trim", "")
    template = template_of(made(tmp_path, source, FAMILIES["llama3"][1], split))
    assert template
    talk = [TALK[0], {"role": "assistant", "content": "\n\nIt is"}, TALK[2], {"role": "assistant", "content": "\n a"}]
    (found,) = template.encode_turns([("f row 1", talk, ())])
    for k in (1, 3):
        prompt = template.encode(talk[:k], generation=True)
        if k == 1:
            assert found.ids[: len(prompt)].tolist() == prompt
    assert trained(template, talk) == ["\n\nIt is<|eot_id|>", "\n a<|eot_id|>"]
    assert template.tokenizer.decode(found.ids.tolist()) == template.render(talk)


def test_a_template_without_an_end_is_refused(tmp_path: Path) -> None:
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match=r"chat template: an answer is followed by '\\n': expected a special token"):
        getattr(template_of(made(tmp_path, endless, [])), "end_id")  # noqa: B009


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "not a template: .*endfor.* [(]line 1[)]"),
        ("{{ raise_exception('no ' + messages[0]['role']) }}", "chat template: no user"),
        ("{{ messages[0].nothing.more }}", "no attribute 'nothing'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_templates_that_fail_say_why(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        template_of(made(tmp_path, source, []))


def test_rows_are_named_where_a_template_refuses_them(tmp_path: Path) -> None:
    template = found_template(tmp_path, "gemma")
    with pytest.raises(UserError, match="^f row 7: chat template: System role not supported$"):
        template.encode_turns([("f row 6", TALK, ()), ("f row 7", [SYSTEM, *TALK], ())])


def test_named_templates_and_a_file_are_found(tmp_path: Path) -> None:
    named = [{"name": "default", "template": templates.SMOLLM2}, {"name": "tool_use", "template": templates.QWEN25}]
    folder = tokenizer_folder(tmp_path, named, templates._IM)
    theirs = AutoTokenizer.from_pretrained(folder)
    template = template_of(load_tokenizer(folder))
    assert template
    assert template.render(TALK) == theirs.apply_chat_template(TALK, tokenize=False)
    assert template.render(CALLS, TOOLS) == theirs.apply_chat_template(CALLS, tools=TOOLS, tokenize=False)
    (folder / "chat_template.jinja").write_text(templates.ZEPHYR)
    found = template_of(load_tokenizer(folder))
    assert found and found.sources["default"] == templates.ZEPHYR
    assert found.render(TALK) == AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, tokenize=False)
    assert template_of(made(tmp_path / "none", None, [])) is None


def test_the_date_of_a_template_is_the_recipes(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + templates.SMOLLM2
    template = template_of(made(tmp_path, dated, templates._IM), date="2026-02-03")
    assert template and template.render(TALK).startswith("03 Feb 2026<|im_start|>")


def test_bos_is_there_once(tmp_path: Path) -> None:
    template = found_template(tmp_path, "llama3")
    (found,) = template.encode_turns([("f row 1", TALK, ())])
    assert found.ids.tolist().count(template.tokenizer.encode("<s>")[0]) == 1


@pytest.mark.parametrize("kind", ["char", "bpe", "sp-unigram"])
def test_chatml_is_added_and_transformers_reads_the_same(kind: str, tmp_path: Path) -> None:
    text = templates.TEXT + " ".join(message["content"] for message in TALK)
    base = train_tokenizer(kind, [text], 320)
    ours = with_chatml(base)
    assert ours.n_vocab == base.n_vocab + 2
    assert ours.encode("<|im_start|><|im_end|>") == [base.n_vocab, base.n_vocab + 1]
    assert ours.eos_id == base.n_vocab + 1 and set(ours.encode("<|im_start|><|im_end|>")) <= ours.special
    assert ours.encode("He goes to") == base.encode("He goes to")
    ours.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.digest, loaded.n_vocab, loaded.eos_id) == (ours.digest, ours.n_vocab, ours.eos_id)
    template = template_of(loaded)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert template and theirs.eos_token == "<|im_end|>"
    talk = [{**message, "content": message["content"].replace("<b>", "")} for message in TALK]
    for generation in (False, True):
        ids = theirs.apply_chat_template(talk, add_generation_prompt=generation, return_dict=False)
        assert template.encode(talk, generation=generation) == ids
    assert trained(template, talk) == [talk[k]["content"] + "<|im_end|>" for k in (1, 3)]
    assert (
        with_chatml(ours).encode("<|im_end|>") == ours.encode("<|im_end|>")
        and with_chatml(ours).n_vocab == ours.n_vocab
    )


def test_chatml_on_a_sentencepiece_model_of_no_class_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "a.txt").write_text(templates.TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "a.txt"), model_prefix=str(tmp_path / "a"), vocab_size=60, minloglevel=3
    )
    with pytest.raises(UserError, match=r"<\|im_end\|>: more tokens than a tokenizer.model that no class"):
        with_chatml(load_tokenizer(tmp_path / "a.model"))


def test_chatml_takes_the_place_of_another_template(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, templates.ZEPHYR, [])
    (folder / "chat_template.jinja").write_text(templates.ZEPHYR)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    ours = with_chatml(load_tokenizer(folder))
    template = template_of(ours)
    assert template and template.sources == {"default": sft_template.CHATML} and template.end == "<|im_end|>"
    assert from_files(ours.files, tmp_path).eos_id == ours.encode("<|im_end|>")[0]


MUTATIONS = {
    "mask begins one token late": (
        sft_template,
        "mask[_reached(whole, before) :",
        "mask[_reached(whole, before) + 1 :",
    ),
    "mask begins one token early": (
        sft_template,
        "mask[_reached(whole, before) :",
        "mask[_reached(whole, before) - 1 :",
    ),
    "no end token": (sft_template, "_reached(whole, upto)] = True", "_reached(whole, upto) - 1] = True"),
    "the newline after the end too": (
        sft_template,
        "_reached(whole, upto)] = True",
        "_reached(whole, upto) + 1] = True",
    ),
    "the last turn alone": (sft_template, "in enumerate(pairs):", "in list(enumerate(pairs))[-1:]:"),
    "a prompt's tokens not compared": (sft_template, "if start in begins and not np", "if False and not np"),
    "rewritten history accepted": (locate, "if not text.startswith(upto[:stop])", "if False"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_mask_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new = MUTATIONS[name]
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1
    space: dict[str, Any] = {"__name__": "mutant"}
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), space)
    changed = "_masked" if module is sft_template else "Locator"
    monkeypatch.setattr(sft_template, changed, space[changed])
    with pytest.raises((AssertionError, UserError, pytest.fail.Exception)):
        test_every_answer_and_its_end_token_are_trained_and_nothing_else("smollm2", tmp_path / "a")
        test_qwen3_rewrites_history_and_is_refused_unless_unrolled(tmp_path / "b")
        test_tokens_before_an_answer_are_those_of_the_prompt_alone("", tmp_path / "c")
