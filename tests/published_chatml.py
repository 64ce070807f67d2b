# ruff: noqa: E501  (templates are written as they are)
"""ChatML and what grew out of it: the structure of published templates, their turns marked (see published.py)."""

_PROMPT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
# tool calls and their results, as the ChatML models after Hermes write them
_CALLS = r"""
{%- for call in m.tool_calls or [] -%}
  {{- '\n' if m.content or not loop.first -}}{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}{{- call.function.arguments | tojson -}}
  {{- '}\n</tool_call>' -}}
{%- endfor -%}
"""
_RESULT = r"""
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
"""
_TOOLS = r"""{{- '\n\n# Tools\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' -}}{{- tool | tojson -}}{%- endfor -%}{{- '\n</tools>' -}}"""


def _im_system(default: str) -> str:
    """A system turn: of the messages, or ``default``; with the tools."""
    return (
        "{%- set own = messages[0].role == 'system' -%}"
        "{%- if own or tools or " + repr(default) + " -%}{{- '<|im_start|>system\\n' -}}"
        "{{- messages[0].content if own else " + repr(default) + " -}}"
        "{%- if tools -%}" + _TOOLS + "{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endif -%}"
    )


def _im_turns(assistant: str) -> str:
    return (
        "{%- for m in messages -%}{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}"
        "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}"
        "{%- elif m.role == 'tool' -%}" + _RESULT + "{%- elif m.role == 'assistant' -%}" + assistant + "{%- endif -%}"
        "{%- endfor -%}"
    )


_IM_ASSISTANT = (
    "{{- '<|im_start|>assistant\\n' -}}{%- generation -%}{{- m.content -}}" + _CALLS + "{{- '<|im_end|>' -}}"
    "{%- endgeneration -%}{{- '\\n' -}}"
)

CHATML = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}{%- generation -%}"
    "{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}{%- else -%}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}" + _PROMPT
)
SMOLLM2 = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nYou are a small model.<|im_end|>\\n' -}}"
    "{%- endif -%}" + CHATML
)
QWEN25 = _im_system("You are a model.") + _im_turns(_IM_ASSISTANT) + _PROMPT
HERMES3 = _im_system("You call functions.") + _im_turns(_IM_ASSISTANT) + _PROMPT
QWQ = (
    _im_system("")
    + _im_turns(
        "{%- set said = m.content -%}{%- if not loop.last -%}{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}"
        "{%- endif -%}{{- '<|im_start|>assistant\\n' -}}{%- generation -%}{{- said -}}"
        + _CALLS
        + "{{- '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
    )
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
LAST = (
    "{%- set at = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set at.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
# the reasoning of answers behind the last question, an empty one where there is none
_QWEN3_ASSISTANT = (
    r"""
{%- set said = m.content -%}{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in said -%}
  {%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
  {%- set said = said.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
OPENED
{%- if loop.index0 > at.last and (loop.last or thought) -%}
  {{- '<think>\n' -}}BEGUN{{- thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') -}}
{%- else -%}{{- said -}}{%- endif -%}
"""
    + _CALLS
    + "{{- '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
)
QWEN3 = (
    _im_system("")
    + LAST
    + _im_turns(_QWEN3_ASSISTANT.replace("OPENED", "{%- generation -%}").replace("BEGUN", ""))
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- if enable_thinking is defined and not "
    "enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}"
)
# the generation prompt opens the reasoning, so that the model writes what follows
_THINKING = (
    r"""
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > at.last -%}{{- '<think>\n' -}}{%- generation -%}
{{- thought.strip('\n') + '\n</think>\n\n' + m.content.lstrip('\n') -}}"""
    + _CALLS
    + r"""
{{- '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{%- generation -%}{{- m.content -}}"""
    + _CALLS
    + r"""{{- '<|im_end|>' -}}{%- endgeneration -%}{%- endif -%}
{{- '\n' -}}"""
)
QWEN3_THINKING = (
    _im_system("")
    + LAST
    + _im_turns(_THINKING)
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
SMOLLM3 = (
    r"""
{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: /think\n\n' -}}
{{- messages[0].content if messages[0].role == 'system' else 'You are a small model.' -}}
{%- if tools -%}"""
    + _TOOLS
    + r"""{%- endif -%}{{- '\n<|im_end|>\n' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' -}}
{%- elif m.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}
  {%- generation -%}{{- m.content.lstrip('\n') + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- elif m.role == 'tool' -%}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
"""
    + _PROMPT
)
LFM2 = (
    r"""
{{- bos_token -}}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}{%- set system = system + '\nList of tools: <|tool_list_start|>' + (tools | tojson) + '<|tool_list_end|>' -%}
{%- endif -%}
{%- if system -%}{{- '<|im_start|>system\n' + system + '<|im_end|>\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}{%- generation -%}
  {%- if m.tool_calls -%}{{- '<|tool_call_start|>' + (m.tool_calls | tojson) + '<|tool_call_end|>' -}}{%- endif -%}
  {{- m.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- elif m.role != 'system' -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
"""
    + _PROMPT
)
