"""Tool calls in the forms of templates: learned, read as they come, and forced."""

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import templates
from tool_templates import FORMS, Form

from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.guided.guide import Guide
from mlxgpt.common.serve.tools.format import ToolFormat, check_results
from mlxgpt.common.serve.tools.reasoning import Reasoning
from mlxgpt.common.serve.tools.split import Delta, Splitter
from mlxgpt.common.serve.work import Served
from mlxgpt.common.sft.template import Template

ASKED = {"role": "user", "content": "Well?"}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Zürich", 'it\'s "x"']},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "near": {"type": "array", "items": {"enum": [1, "a", None]}, "maxItems": 2},
        "text": {"type": "string", "maxLength": 3},
        "deep": {"$ref": "#/$defs/deep"},
    },
    "required": ["city", "days"],
    "$defs": {"deep": {"type": "object", "properties": {"on": {"type": "boolean"}}, "additionalProperties": False}},
}
SEARCH = {"type": "object", "properties": {"query": {"type": "string", "maxLength": 4}, "exact": {"type": "boolean"}}}
SCHEMAS = {"get_weather": WEATHER, "search-2": SEARCH, "stop": {}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
# what a reader may stumble over: quotes, braces, tags, backslashes, other scripts, a closing tag
HARD = 'a "b" {c} [d] \\n \\\\ é 漢 🎈 </tool_call> <|im_end| }]}" \n\n x\'y, z=1)'
ANSWERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "one": [("get_weather", {"city": "Zürich", "days": 3, "near": [1, "a", None], "deep": {"on": True}})],
    "hard": [("search-2", {"query": HARD, "exact": False})],
    "two": [("search-2", {"query": "x"}), ("get_weather", {"city": 'it\'s "x"', "days": 0, "text": " y "})],
    "three, of which one without arguments": [("stop", {}), ("search-2", {"query": "7"}), ("stop", {})],
}


@functools.cache
def learned(name: str) -> tuple[Template, ToolFormat]:
    return made(FORMS[name], name)


def made(form: Form, name: str = "template") -> tuple[Template, ToolFormat]:
    template = template_of(form, name)
    return template, ToolFormat.learn(template)


def template_of(form: Form, name: str = "template") -> Template:
    tokens = list(dict.fromkeys(["<|im_start|>", "<|im_end|>", *form.tokens]))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = templates.made(Path(folder), None, tokens)
    return Template({"default": form.template}, tokenizer, tokenizer.named, name)


def message(calls: Sequence[tuple[str, dict[str, Any]]], content: str = "") -> dict[str, Any]:
    made = [
        {"id": f"abcdefg{n:02}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def written(template: Template, form: Form, calls: Sequence[tuple[str, dict[str, Any]]], content: str = "") -> str:
    """What a model would write: the template's text of the answer, up to the token that ends it."""
    before = template.render([ASKED], TOOLS, True).removesuffix(form.opens)
    text = template.render([ASKED, message(calls, content)], TOOLS)
    assert text.startswith(before)
    return text[len(before) :].rstrip().removesuffix(form.stops or form.end).rstrip()


def parts(deltas: Sequence[Delta]) -> tuple[str, str, list[tuple[str, Any]]]:
    called = [(one.call.name, json.loads(one.call.arguments)) for one in deltas if one.call]
    return "".join(one.content for one in deltas), "".join(one.reasoning for one in deltas), called


def split(format: ToolFormat, pieces: Sequence[str], cut: bool = False, opened: bool = False, **more: Any) -> Any:
    splitter = Splitter(format.shape, Reasoning.of(format.template), opened, tools=TOOLS, **more)
    return parts([delta for piece in pieces for delta in splitter.feed(piece)] + splitter.end(cut))


@pytest.mark.parametrize("name", FORMS)
def test_what_a_template_writes_is_read_back_in_whole_and_in_pieces(name: str) -> None:
    form, (template, format) = FORMS[name], learned(name)
    for calls in ANSWERS.values():
        if form.single and len(calls) > 1:
            continue
        for content in ("", "Let me see < that."):
            text = written(template, form, calls, content)
            expected = ("" if form.contentless else content, "", calls)
            assert split(format, [text]) == expected
            assert split(format, list(text)) == expected
            assert split(format, [text[n : n + 7] for n in range(0, len(text), 7)]) == expected


@pytest.mark.parametrize("name", FORMS)
def test_no_markup_leaves_before_it_is_told_apart(name: str) -> None:
    form, (template, format) = FORMS[name], learned(name)
    text = written(template, form, ANSWERS["one"], "Let me see.")
    expected = "" if form.contentless else "Let me see."
    splitter, content = Splitter(format.shape, Reasoning.of(template), tools=TOOLS), ""
    for piece in text:
        content += "".join(one.content for one in splitter.feed(piece))
        assert expected.startswith(content)
    assert content == expected


@pytest.mark.parametrize("name", FORMS)
def test_a_forced_call_is_read_and_fits_its_schema(name: str) -> None:
    template, format = learned(name)
    ends = frozenset({template.end_id, *format.ends})
    served = Served("m", None, template.tokenizer, template, ends, template.tokenizer.n_vocab, "")
    guide, reasoning, random = Guide(served), Reasoning.of(template), np.random.default_rng(7)
    grammars = [(None, True), (None, False), ("get_weather", True)]
    for named, parallel in grammars:
        make = guide.grammar(format.grammar(TOOLS, named, parallel))
        text = walk(make(), template, ends, random)
        splitter = Splitter(format.shape, reasoning, tools=TOOLS)
        content, _, calls = parts([*splitter.feed(text), *splitter.end()])
        assert content == "", text
        assert calls, text
        assert len(calls) == 1 or (parallel and not named), text
        for called, arguments in calls:
            assert named in (None, called)
            jsonschema.validate(arguments, SCHEMAS[called])


def follows(constraint: Any, template: Template, text: str) -> bool:
    """Whether the text may be written and may end there."""
    for token in template.tokenizer.encode(text):
        if not constraint.allowed()[token]:
            return False
        constraint.take(token)
    return bool(constraint.allowed()[template.end_id])


@pytest.mark.parametrize("name", FORMS)
def test_a_strict_function_is_called_by_its_schema_or_not_at_all(name: str) -> None:
    form, (template, format) = FORMS[name], learned(name)
    ends = frozenset({template.end_id, *format.ends})
    served = Served("m", None, template.tokenizer, template, ends, template.tokenizer.n_vocab, "")
    tools = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS[:2]]
    make = Guide(served).grammar(format.strict_grammar([*tools, TOOLS[2]], True, Reasoning.of(template)))
    assert follows(make(), template, "Just text, with < and {.\n\nMore.")
    assert follows(make(), template, "")
    right = {"city": "Zürich", "days": 3, "near": [1, None]}
    three = [("search-2", {"query": "x", "exact": True}), ("get_weather", right), ("stop", {})]
    for calls in (three[1:2], three):
        for content in ("", "Let me see."):
            if not form.single or len(calls) == 1:
                assert follows(make(), template, written(template, form, calls, content)), calls
    for wrong in ({"city": "Paris", "days": 3}, {"city": "Zürich", "days": "x"}, {"city": "Zürich", "days": 10}):
        assert not follows(make(), template, written(template, form, [("get_weather", wrong)], "Well:"))
    assert not follows(make(), template, written(template, form, [("search-2", {"query": "12345"})]))


def test_only_a_strict_function_is_held_to_its_schema_where_calls_are_free() -> None:
    template, format = learned("tags around JSON")
    served = Served(
        "m", None, template.tokenizer, template, frozenset({template.end_id}), template.tokenizer.n_vocab, ""
    )
    make = Guide(served).grammar(format.strict_grammar(TOOLS))
    form = FORMS["tags around JSON"]
    assert follows(make(), template, written(template, form, [("get_weather", {"x": 1})]))
    assert not follows(make(), template, written(template, form, [("other", {})]))


def test_a_pattern_holds_for_a_string_without_quotes() -> None:
    template, format = learned("XML")
    served = Served(
        "m", None, template.tokenizer, template, frozenset({template.end_id}), template.tokenizer.n_vocab, ""
    )
    for pattern, right, wrong in (("^[a-c]+/$", "abc/", "abd/"), ("b", "abc", "acc")):
        schema = {"type": "object", "properties": {"at": {"type": "string", "pattern": pattern, "maxLength": 4}}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        make = Guide(served).grammar(format.grammar(tools))
        for value, fits in ((right, True), (wrong, False), (right * 4, False)):
            text = f"<tool_call>\n<function=f>\n<parameter=at>\n{value}\n</parameter>\n</function>\n</tool_call>"
            assert follows(make(), template, text) is fits, (pattern, value)


def walk(constraint: Any, template: Template, ends: frozenset[int], random: np.random.Generator) -> str:
    """A text of tokens drawn evenly among those that are allowed, ended as soon as it may end every other time."""
    ids: list[int] = []
    while len(ids) < 600:
        allowed = np.flatnonzero(constraint.allowed())
        if ends.intersection(allowed.tolist()) and (random.random() < 0.5 or set(allowed) <= ends):
            return template.tokenizer.decode(ids)
        ids.append(int(random.choice([token for token in allowed if token not in ends])))
        constraint.take(ids[-1])
    raise AssertionError(template.tokenizer.decode(ids))


def test_control_tokens_are_forced_as_tokens() -> None:
    template, format = learned("tags around JSON")
    tokenizer = template.tokenizer
    opens, closes = (tokenizer.id_of(tag) for tag in ("<tool_call>", "</tool_call>"))
    grammar = format.grammar(TOOLS)
    assert f"<[{opens}]>" in grammar
    assert f"<[{closes}]>" in grammar
    assert "tool_call" not in grammar


def test_a_reasoning_that_the_prompt_opened_comes_first() -> None:
    template, format = learned("reasoning that the prompt opens")
    reasoning = Reasoning.of(template)
    assert reasoning is not None
    assert reasoning.opened(template.render([ASKED], TOOLS, True))
    assert not reasoning.opened(template.render([ASKED, {"role": "assistant", "content": "x"}], TOOLS))
    end = template.end_id
    served = Served("m", None, template.tokenizer, template, frozenset({end}), template.tokenizer.n_vocab, "")
    constraint = Guide(served).grammar(format.grammar(TOOLS, "stop", opened=reasoning))()
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    for token in template.tokenizer.encode(f"Hm, <tool_call> ...</think>\n\n{call}"):
        assert constraint.allowed()[token]
        constraint.take(token)
    assert np.flatnonzero(constraint.allowed()).tolist() == [end]
    text = f"Hm {{\n</think>\n\n{call}"
    assert split(format, list(text), opened=True) == ("", "Hm {", [("stop", {})])


def test_reasoning_and_content_are_told_apart_with_and_without_tools() -> None:
    template, format = learned("reasoning")
    reasoning = Reasoning.of(template)
    text = "<think>\nso < so\n\n</think>\n\n  Yes.\n\n<tool_call> is a tag\n"
    for shape in (None, format.shape):
        for pieces in ([text], list(text)):
            splitter = Splitter(shape, reasoning)
            found = parts([delta for piece in pieces for delta in splitter.feed(piece)] + splitter.end())
            assert found == ("Yes.\n\n<tool_call> is a tag\n", "so < so", [])
    unclosed = Splitter(None, reasoning, opened=True)
    assert parts([*unclosed.feed("on and on</thi"), *unclosed.end(True)]) == ("", "on and on</thi", [])
    plain = Splitter(None, reasoning)
    assert parts([*plain.feed("  no <think> here "), *plain.end()]) == ("  no <think> here ", "", [])


def test_marks_around_content_are_no_content() -> None:
    _, format = learned("numbered actions")
    text = "<|START_RESPONSE|>Well <|START of it.<|END_RESPONSE|>"
    assert split(format, [text]) == split(format, list(text)) == ("Well <|START of it.", "", [])


@pytest.mark.parametrize(
    "text",
    [
        "a <tool_call> b",
        "<tool_call>\n{}\n</tool_call>",
        '<tool_call>\n{"name": 7, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "x", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "x", "arguments": {"a": 1e999}}\n</tool_call>',
        '<tool_call>\n{"name": "x", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "x", "arguments": {"a" 1}}\n</tool_call>',
        '<tool_call>\n{"name": "x", "arguments": ' + '{"a": ' * 200 + "1" + "}" * 201 + "\n</tool_call>",
        "<tool_call>\n[1, 2]\n</tool_call>",
        "the end is <tool",
        "<tool_call>",
        '<tool_call>\n{"name": "x", "argu',
        " \n spaces \n ",
    ],
)
def test_what_only_looks_like_a_call_is_content(text: str) -> None:
    _, format = learned("tags around JSON")
    assert split(format, [text]) == split(format, list(text)) == (text, "", [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('<tool_call>{"name":"x","arguments":{"a":[1]}}</tool_call>', "x"),
        ('<tool_call>\n{"arguments": {"a": [1]}, "name": "x"}\n</tool_call>', "x"),
        ('<tool_call>\n{"name": "x", "parameters": {"a": [1]}}\n</tool_call>', "x"),
        ('<tool_call>\n{"name": "x", "arguments": "{\\"a\\": [1]}"}\n</tool_call>', "x"),
        ('<tool_call>\n[{"name": "x", "arguments": {"a": [1]}}]\n</tool_call>', "x"),
        ('<tool_call>\n{"type": "function", "function": {"name": "x", "arguments": {"a": [1]}}}\n</tool_call>', "x"),
        ('<tool_call>\n{"name": "x", "arguments": {"a": [1]}}', "x"),
        ('  <tool_call>\n{"name": "not one of them", "arguments": {"a": [1]}}\n</tool_call>\n', "not one of them"),
    ],
)
def test_a_call_in_another_spacing_or_order_is_a_call(text: str, name: str) -> None:
    _, format = learned("tags around JSON")
    for pieces in ([text], list(text)):
        content, _, calls = split(format, pieces)
        assert (content.strip(), calls) == ("", [(name, {"a": [1]})])


def test_text_behind_a_call_is_content() -> None:
    _, format = learned("tags around JSON")
    text = 'So:\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>\nDone.'
    assert split(format, [text]) == split(format, list(text)) == ("So:\nDone.", "", [("stop", {})])


def test_a_call_that_was_cut_is_given_as_far_as_it_came() -> None:
    def cut(name: str, text: str) -> tuple[str, list[tuple[str, str]]]:
        splitter = Splitter(learned(name)[1].shape, tools=TOOLS)
        made = [*splitter.feed(text), *splitter.end(cut=True)]
        return parts([one for one in made if not one.call])[0], [
            (one.call.name, one.call.arguments) for one in made if one.call
        ]

    begun = '<tool_call>\n{"name": "stop", "arguments": {"why": "no'
    assert cut("tags around JSON", begun) == ("", [("stop", '{"why": "no')])
    assert cut("tags around JSON", '<tool_call>\n{"name": "sto') == ("", [])
    two = '[TOOL_CALLS] [{"name": "stop", "arguments": {}, "id": "abcdefghi"}, {"name": "get_weather", "arguments": {"c'
    assert cut("a list with ids", two) == ("", [("stop", "{}"), ("get_weather", '{"c')])
    assert cut("name and arguments", '[TOOL_CALLS]stop[ARGS]{"a": ') == ("", [("stop", '{"a":')])
    assert cut("XML", "Hm.\n<tool_call>\n<function=stop>\n<parameter=a>\nx") == ("Hm.", [("stop", "")])
    assert cut("an object alone", '{"name": "stop", "param') == ("", [("stop", "")])


def test_a_json_object_that_nothing_announces_is_a_call_of_the_tools_alone() -> None:
    _, format = learned("an object alone")
    call = '{"name": "stop", "parameters": {}}'
    assert split(format, list(call)) == ("", "", [("stop", {})])
    assert split(format, [f"<|python_tag|>{call}"]) == ("", "", [("stop", {})])
    assert split(format, [f"\n{call}; {call}"]) == ("", "", [("stop", {}), ("stop", {})])
    for other in ('{"name": "other", "parameters": {}}', '{"name": "stop"}', '{"a": 1}', "{x", f"Call {call}"):
        assert split(format, [other]) == split(format, list(other)) == (other, "", [])
    splitter = Splitter(format.shape, tools=TOOLS)
    assert parts(splitter.feed('{"a": '))[0] == '{"a": '  # told apart by its first key


def test_only_the_first_call_counts_where_one_is_allowed() -> None:
    template, format = learned("tags around JSON")
    text = written(template, FORMS["tags around JSON"], ANSWERS["two"])
    assert split(format, list(text), parallel=False)[2] == ANSWERS["two"][:1]


def test_a_text_stands_for_what_its_schema_says() -> None:
    _, format = learned("XML of Python's values")
    kinds: dict[str, Any] = {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "b": {"type": "boolean"},
        "n": {"type": ["string", "null"]},
        "a": {"anyOf": [{"type": "array"}, {"type": "object"}]},
        "e": {"enum": [1, 2]},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": kinds}}}]
    values = {
        "s": "7",
        "i": "7",
        "b": "True",
        "n": "None",
        "a": "{'x': [1, None]}",
        "e": "2",
        "u": '{"y": 1}',
        "w": "w",
    }
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    splitter = Splitter(format.shape, tools=tools)
    text = f"<tool_call>\n<function=f>\n{inside}</function>\n</tool_call>"
    expected = {"s": "7", "i": 7, "b": True, "n": None, "a": {"x": [1, None]}, "e": 2, "u": {"y": 1}, "w": "w"}
    assert parts([*splitter.feed(text), *splitter.end()])[2] == [("f", expected)]


def test_a_value_may_hold_what_closes_it() -> None:
    _, format = learned("XML")
    value = "<parameter=x>\n1\n</parameter>\n and more"
    text = f"<tool_call>\n<function=search-2>\n<parameter=query>\n{value}\n</parameter>\n</function>\n</tool_call>"
    assert split(format, [text]) == split(format, list(text)) == ("", "", [("search-2", {"query": value})])


def test_escapes_in_a_python_string_are_characters() -> None:
    _, format = learned("Python's calls")
    text = r"<|call_start|>[search-2(query='\ud83c\udf88 it\'s \x41\n')]<|call_end|>"
    assert split(format, [text]) == split(format, list(text)) == ("", "", [("search-2", {"query": "🎈 it's A\n"})])


def test_a_long_call_is_not_read_again_with_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxgpt.common.serve.tools import split as module

    count = 0

    class Counted(module.Reader):
        def read(self) -> int:
            nonlocal count
            count += 1
            return super().read()

    monkeypatch.setattr(module, "Reader", Counted)
    _, format = learned("tags around JSON")
    long = "word " * 4000
    text = f'<tool_call>\n{{"name": "search-2", "arguments": {{"query": "{long}"}}}}\n</tool_call>'
    assert split(format, list(text)) == ("", "", [("search-2", {"query": long})])
    assert count < 300


def test_ids_are_those_of_the_request() -> None:
    _, format = learned("tags around JSON")
    first, again, other = (format.id_of(7, [1, 2]), format.id_of(7, [1, 2]), format.id_of(7, [1, 3]))
    assert first(0, "") == again(0, "")
    assert len({first(0, ""), first(1, ""), other(0, ""), format.id_of(7, [1, 2], 1)(0, "")}) == 4
    assert first(0, "as the model wrote it").startswith("call_")
    assert len(first(0, "")) == 29


def test_a_template_that_wants_short_ids_gets_them() -> None:
    template, format = learned("a list with ids")
    id_of = format.id_of(7, [1])
    assert id_of(0, "aB3aB3aB3") == "aB3aB3aB3"
    assert id_of(1, "aB3aB3aB3") != "aB3aB3aB3"  # an id twice
    assert len(id_of(2, "")) == 9
    call = {"id": "call_of_another_server", "type": "function", "function": {"name": "stop", "arguments": {}}}
    talk = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "call_of_another_server"},
    ]
    with pytest.raises(UserError, match="nine"):
        template.render(talk, TOOLS)
    fitted = format.fitted(talk)
    template.render(fitted, TOOLS)
    assert fitted[1]["tool_calls"][0]["id"] == fitted[2]["tool_call_id"]


DESCRIBED = (
    "{%- if tools -%}{{- '<|im_start|>system\\n' -}}{%- for tool in tools -%}{{- tool | string -}}{%- endfor -%}"
    '{{- \'Write <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>.<|im_end|>\\n\' -}}{%- endif -%}'
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LISTED = DESCRIBED.replace(
    'Write <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>', "Write <|tool_call|> and a JSON list"
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (DESCRIBED, '<tool_call>\n{"name": "stop", "arguments": {"a": 1}}\n</tool_call>'),
        (LISTED, '<|tool_call|>[{"name": "stop", "arguments": {"a": 1}}]'),
    ],
)
def test_calls_that_are_described_are_read_and_written_into_the_content(source: str, expected: str) -> None:
    template = template_of(Form(""))
    template = Template({"default": source}, template.tokenizer, {}, "described")
    format = ToolFormat.learn(template)
    text = template.render(format.fitted([ASKED, message([("stop", {"a": 1})], "So:")]), TOOLS)
    assert f"So:\n{expected}<|im_end|>" in text
    for pieces in ([expected], list(expected)):
        assert split(format, pieces) == ("", "", [("stop", {"a": 1})])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (templates.GEMMA.replace("{{ bos_token }}", ""), "does not write the tools of a request"),
        (DESCRIBED.replace("tool_call", "x"), "writes tools and no tool calls"),
        (Form("{%- for c in calls -%}{{- c.function.name + '!' -}}{%- endfor -%}").template, "is not known here"),
        (
            Form(
                "{%- for c in calls -%}{{- '<call name=\"' + c.function.name + '\">' -}}{%- for k, v in "
                "c.function.arguments.items() -%}{{- '<' + k + '>' + v | string + '</' + k + '>' -}}{%- endfor -%}"
                "{{- '</call>' -}}{%- endfor -%}"
            ).template,
            "is not known here",
        ),
        (
            Form("{{- '<|im_end|>\\n<|im_start|>call\\n' + (calls[0].function | tojson) -}}").template,
            "is not known here",
        ),
    ],
)
def test_tools_of_a_template_that_does_not_write_them_are_refused(source: str, said: str) -> None:
    tokens = template_of(Form("", ("<start_of_turn>", "<end_of_turn>"))).tokenizer
    with pytest.raises(UserError, match=f"^some template .*{said}"):
        ToolFormat.learn(Template({"default": source}, tokens, {}, "some template"))


def test_what_ends_an_answer_of_calls_is_found() -> None:
    for name, form in FORMS.items():
        template, format = learned(name)
        token = template.tokenizer.id_of(form.stops or form.end)
        assert token in (template.end_id, *format.ends), name


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([ASKED, {"role": "tool", "content": "1", "tool_call_id": "a"}], r"messages\[1\] has role tool"),
        (
            [ASKED, message([("stop", {})]), {"role": "tool", "tool_call_id": "a"}],
            r"messages\[2\]\.tool_call_id is 'a'",
        ),
        (
            [ASKED, message([("stop", {})]), ASKED, {"role": "tool", "tool_call_id": "abcdefg00"}],
            r"messages\[3\] has role tool",
        ),
    ],
)
def test_a_result_without_its_call_is_refused(messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_results(messages)


def test_results_of_calls_are_taken() -> None:
    check_results([
        ASKED, message([("stop", {}), ("stop", {})]), {"role": "tool", "tool_call_id": "abcdefg01"},
        {"role": "tool", "tool_call_id": "abcdefg00"}, {"role": "assistant", "content": "x"}, ASKED,
    ])  # fmt: skip
