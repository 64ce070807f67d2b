# ruff: noqa: E501, RUF001  (templates are written as they are)
"""Small chat templates of our own, one for each form in which published ones write tool calls.

Only the form of a call, of its tags and of what ends a turn is that of a family; all words are ours.
"""

from dataclasses import dataclass

_TOOLS = "{%- for tool in tools or [] -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}"
_JSON = "{{- '{\"name\": \"' + f.name + '\", \"arguments\": ' -}}{{- f.arguments | tojson -}}{{- '}' -}}"


@dataclass(frozen=True)
class Form:
    """A template that writes tools and calls.

    Args:
        calls: jinja behind an answer's content, with its tool_calls in ``calls``.
        tokens: of the tokenizer, beside those of the turns.
        end, stops: what ends an answer, and one of calls, if that is another token.
        opens: what the generation prompt opens.
        single: one call a turn.
        contentless: content beside calls is left out.
        results, plain, close: jinja of a tool's message, of other content, and behind a turn of calls.
    """

    calls: str
    tokens: tuple[str, ...] = ()
    end: str = "<|im_end|>"
    stops: str = ""
    opens: str = ""
    single: bool = False
    contentless: bool = False
    results: str = "{{- '<|im_start|>tool\\n' + m.content + '<|im_end|>\\n' -}}"
    plain: str = "{{- m.content -}}"
    close: str = ""

    @property
    def template(self) -> str:
        """The whole of it."""
        said = "" if self.contentless else "{{- m.content or '' -}}"
        end = self.close or "{{- '" + (self.stops or self.end) + "\\n' -}}"
        prompt = (
            "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n"
            + self.opens.replace("\n", "\\n")
            + "' -}}{%- endif -%}"
        )
        return (
            "{%- if tools -%}{{- '<|im_start|>system\\n' -}}" + _TOOLS + "{{- '<|im_end|>\\n' -}}{%- endif -%}"
            "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}"
            "{%- if m.tool_calls -%}{%- set calls = m.tool_calls -%}" + said + self.calls + end + "{%- else -%}"
            + self.plain + "{{- '" + self.end + "\\n' -}}{%- endif -%}"
            "{%- elif m.role == 'tool' -%}" + self.results + "{%- else -%}"
            "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}" + prompt
        )  # fmt: skip


def _each(call: str, between: str = "") -> str:
    """Each call, its function in ``f``."""
    apart = "{{- '" + between + "' if not loop.first -}}" if between else ""
    return "{%- for c in calls -%}{%- set f = c.function -%}" + apart + call + "{%- endfor -%}"


def _tagged(before: str, call: str, after: str) -> str:
    return _each("{{- '" + before + "' -}}" + call + "{{- '" + after + "' -}}")


def _arguments(each: str, between: str = "") -> str:
    """Each argument, ``k`` and ``v``."""
    apart = "{{- '" + between + "' if not loop.first -}}" if between else ""
    return "{%- for k, v in f.arguments.items() -%}" + apart + each + "{%- endfor -%}"


_VALUE = "{{- v if v is string else v | tojson -}}"
_PYTHON = "{{- v | tojson if v is mapping or v is sequence and v is not string else v | string -}}"
_ESCAPED = (
    "{%- macro value(v) -%}{%- if v is string -%}{{- 'Q' + v + 'Q' -}}{%- elif v is mapping -%}{{- '{' -}}"
    "{%- for k, w in v.items() -%}{{- ',' if not loop.first -}}{{- k + ':' -}}{{- value(w) -}}{%- endfor -%}{{- '}' -}}"
    "{%- elif v is sequence -%}{{- '[' -}}{%- for w in v -%}{{- ',' if not loop.first -}}{{- value(w) -}}{%- endfor -%}"
    "{{- ']' -}}{%- else -%}{{- v | tojson -}}{%- endif -%}{%- endmacro -%}"
)


def _escaped(quote: str, before: str, after: str) -> str:
    call = "{{- 'call:' + f.name + '{' -}}" + _arguments("{{- k + ':' -}}{{- value(v) -}}", ",") + "{{- '}' -}}"
    return _ESCAPED.replace("Q", quote) + _tagged(before, call, after)


_XML = "{{- '<function=' + f.name + '>\\n' -}}" + _arguments(
    "{{- '<parameter=' + k + '>\\n' -}}" + _VALUE + "{{- '\\n</parameter>\\n' -}}"
) + "{{- '</function>' -}}"  # fmt: skip
_INVOKE = "{{- '<invoke name=\"' + f.name + '\">\\n' -}}" + _arguments(
    "{{- '<parameter name=\"' + k + '\">' -}}" + _VALUE + "{{- '</parameter>\\n' -}}"
) + "{{- '</invoke>\\n' -}}"  # fmt: skip
_TYPED = "{{- '<｜D｜invoke name=\"' + f.name + '\">\\n' -}}" + _arguments(
    "{{- '<｜D｜parameter name=\"' + k + '\" string=\"' + ('true' if v is string else 'false') + '\">' -}}"
    + _VALUE + "{{- '</｜D｜parameter>\\n' -}}"
) + "{{- '</｜D｜invoke>\\n' -}}"  # fmt: skip
_KEYS = "{{- '<tool_call>' + f.name + '\\n' -}}" + _arguments(
    "{{- '<arg_key>' + k + '</arg_key>\\n<arg_value>' -}}" + _VALUE + "{{- '</arg_value>\\n' -}}"
) + "{{- '</tool_call>' -}}"  # fmt: skip
_CALLED = "{{- f.name + '(' -}}" + _arguments(
    "{{- k + '=' -}}{%- if v is string -%}{{- '\"' + v | replace('\\\\', '\\\\\\\\') | replace('\"', '\\\\\"') | replace('\\n', '\\\\n') + '\"' -}}"
    "{%- else -%}" + _PYTHON + "{%- endif -%}", ", "
) + "{{- ')' -}}"  # fmt: skip
_NINE = (
    "{%- for c in calls -%}{%- if c.id | length != 9 -%}{{- raise_exception('ids of nine characters') -}}{%- endif -%}"
    "{%- endfor -%}"
)
_LISTED = "{{- '[' -}}" + _each(_JSON, ", ") + "{{- ']' -}}"
_THOUGHT = (
    "{%- if m.reasoning_content -%}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- m.content -}}"
)
_SEEK = ("<｜calls▁begin｜>", "<｜calls▁end｜>", "<｜call▁begin｜>", "<｜call▁end｜>", "<｜sep｜>")

FORMS: dict[str, Form] = {
    "tags around JSON": Form(_tagged("\\n<tool_call>\\n", _JSON, "\\n</tool_call>"), ("<tool_call>", "</tool_call>")),
    "tags that are no tokens": Form(_tagged("\\n<tool_call>\\n", _JSON, "\\n</tool_call>")),
    "tags one behind the other": Form(_tagged("<tool_call>", _JSON, "</tool_call>"), ("<tool_call>",)),
    "the whole call as it was given": Form(_tagged("<tool_call>", "{{- c | tojson -}}", "</tool_call>")),
    "arguments first": Form(_tagged("<call>", "{{- {'parameters': f.arguments, 'tool': f.name} | tojson -}}", "</call>")),
    "a list between tags": Form("{{- '<tool_calls>' -}}" + _LISTED + "{{- '</tool_calls>' -}}", ("<tool_calls>", "</tool_calls>")),
    "a list behind a token": Form("{{- '<|tool_call|>' -}}" + _LISTED, ("<|tool_call|>",)),
    "a list with ids": Form(
        _NINE + "{{- '[TOOL_CALLS] [' -}}" + _each("{{- {'name': f.name, 'arguments': f.arguments, 'id': c.id} | tojson -}}", ", ") + "{{- ']' -}}",
        ("[TOOL_CALLS]",), contentless=True,
    ),
    "name, id and arguments": Form(
        _NINE + _each("{{- '[TOOL_CALLS]' + f.name + '[CALL_ID]' + c.id + '[ARGS]' -}}{{- f.arguments | tojson -}}"),
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ),
    "name and arguments": Form(_each("{{- '[TOOL_CALLS]' + f.name + '[ARGS]' -}}{{- f.arguments | tojson -}}"), ("[TOOL_CALLS]", "[ARGS]")),
    "an object alone": Form(
        "{%- if calls | length > 1 -%}{{- raise_exception('one call') -}}{%- endif -%}" + _each(_JSON.replace("arguments\"", "parameters\"")),
        single=True, contentless=True,
    ),
    "objects in lines": Form("{{- '<tool_calls>\\n' -}}" + _each(_JSON + "{{- '\\n' -}}") + "{{- '</tool_calls>' -}}"),
    "numbered actions": Form(
        "{{- '<|START_ACTION|>[\\n' -}}" + _each(
            "{{- '    {\"tool_call_id\": \"' + loop.index0 | string + '\", \"tool_name\": \"' + f.name + '\", \"parameters\": ' -}}{{- f.arguments | tojson -}}{{- '}' -}}", ",\\n"
        ) + "{{- '\\n]<|END_ACTION|>' -}}",
        ("<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"), contentless=True,
        plain="{{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' -}}",
    ),
    "tokens around each and all": Form(
        "{{- '<｜calls▁begin｜>' -}}" + _each(
            "{{- '<｜call▁begin｜>' + f.name + '<｜sep｜>' -}}{{- f.arguments | tojson -}}{{- '<｜call▁end｜>' -}}"
        ) + "{{- '<｜calls▁end｜>' -}}", _SEEK,
    ),
    "fenced JSON": Form(
        "{{- '<｜calls▁begin｜>' -}}" + _each(
            "{{- '<｜call▁begin｜>function<｜sep｜>' + f.name + '\\n```json\\n' -}}{{- f.arguments | tojson -}}{{- '\\n```<｜call▁end｜>' -}}", "\\n"
        ) + "{{- '<｜calls▁end｜>' -}}", _SEEK, contentless=True,
    ),
    "counted functions": Form(
        "{{- '<|calls|>' -}}" + _each(
            "{{- '<|call|>functions.' + f.name + ':' + loop.index0 | string + '<|args|>' -}}{{- f.arguments | tojson -}}{{- '<|done|>' -}}"
        ) + "{{- '<|calls_end|>' -}}", ("<|calls|>", "<|call|>", "<|args|>", "<|done|>", "<|calls_end|>"),
    ),
    "ids before names": Form(
        "{{- '<|calls|>' -}}" + _each(
            "{{- '<|call|>' + c.id + '<|name|>' + f.name + '<|args|>' -}}{{- f.arguments | tojson -}}{{- '<|done|>' -}}"
        ), ("<|calls|>", "<|call|>", "<|name|>", "<|args|>", "<|done|>", "<|over|>"), stops="<|over|>",
    ),
    "a function's tag": Form(_tagged("", "{{- '<function=' + f.name + '>' -}}{{- f.arguments | tojson -}}", "</function>"), ("<|eom|>",), stops="<|eom|>"),
    "a name as the key": Form(
        "{{- '<|prefix|>[' -}}" + _each("{{- '{\"' + f.name + '\": ' -}}{{- f.arguments | tojson -}}{{- '}' -}}", ", ") + "{{- ']' -}}",
        ("<|prefix|>", "<|suffix|>"), close="{{- '<|suffix|>' -}}", stops="<|suffix|>", results="{{- '[' + m.content + ']' -}}",
    ),
    "XML": Form(_tagged("\\n<tool_call>\\n", _XML, "\\n</tool_call>"), ("<tool_call>", "</tool_call>")),
    "XML of Python's values": Form(_tagged("\\n<tool_call>\\n", _XML.replace(_VALUE, _PYTHON), "\\n</tool_call>")),
    "XML with names in quotes": Form("{{- '<calls>\\n' -}}" + _each(_INVOKE) + "{{- '</calls>' -}}"),
    "XML that tells strings": Form("{{- '\\n\\n<｜D｜calls>\\n' -}}" + _each(_TYPED) + "{{- '</｜D｜calls>' -}}", ("<｜D｜",)),
    "keys and values": Form(_each(_KEYS, "\\n"), ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")),
    "keys and values in a line": Form(_each(_KEYS.replace("\\n", ""))),
    "nothing ends a turn but the next": Form(
        _each(_KEYS, "\\n"), ("<tool_call>", "</tool_call>", "<|observation|>"), close="{{- '' -}}", stops="<|observation|>",
        results="{{- '<|observation|>' + m.content -}}",
    ),
    "Python's calls": Form(
        "{{- '<|call_start|>[' -}}" + _each(_CALLED, ", ") + "{{- ']<|call_end|>' -}}", ("<|call_start|>", "<|call_end|>")
    ),
    "escaped strings": Form(_escaped("<escape>", "<start_function_call>", "<end_function_call>"), ("<escape>", "<start_function_call>", "<end_function_call>")),
    "strings between tokens": Form(_escaped("<|\"|>", "<|tool_call>", "<tool_call|>"), ("<|\"|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"), stops="<|tool_response>"),
    "a channel": Form(
        "{%- set calls = calls[:1] -%}" + _each("{{- ' to=functions.' + f.name + '<|channel|>json<|message|>' -}}{{- f.arguments | tojson -}}"),
        ("<|channel|>", "<|message|>", "<|call|>"), stops="<|call|>", single=True, contentless=True,
    ),
    "reasoning": Form(_tagged("\\n<tool_call>\\n", _JSON, "\\n</tool_call>"), ("<think>", "</think>"), plain=_THOUGHT),
    "reasoning that the prompt opens": Form(
        _tagged("\\n<tool_call>\\n", _JSON, "\\n</tool_call>"), ("<think>", "</think>"), plain=_THOUGHT, opens="<think>\n"
    ),
}  # fmt: skip
