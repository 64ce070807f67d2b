# ruff: noqa: E501, RUF001  (templates are written as they are)
"""The structure of published chat templates, in words of our own, each with the assistant's turns marked.

``MARKED`` encloses in {% generation %} what the model writes: the turn behind the generation prompt, its end tokens with
it, without the newline that follows. ``plain`` is the same template as it is published, without marks. Every tag strips
the white space around it.
"""

from typing import NamedTuple

from published_chatml import CHATML, HERMES3, LFM2, QWEN3, QWEN3_THINKING, QWEN25, QWQ, SMOLLM2, SMOLLM3
from published_chatml import LAST as _LAST


class Published(NamedTuple):
    """A template, the tokens it writes, and its tokenizer's names."""

    marked: str
    special: tuple[str, ...]
    eos: str = "</s>"
    bos: str = "<s>"

    @property
    def plain(self) -> str:
        """Without marks."""
        return self.marked.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


LLAMA2 = r"""
{%- if messages[0].role == 'system' -%}{%- set rest = messages[1:] -%}{%- set system = messages[0].content -%}
{%- else -%}{%- set rest = messages -%}{%- set system = false -%}{%- endif -%}
{%- for m in rest -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
{%- set said = m.content -%}
{%- if loop.index0 == 0 and system is not false -%}{%- set said = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + said -%}{%- endif -%}
{%- if m.role == 'user' -%}{{- bos_token + '[INST] ' + said.strip() + ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}{%- generation -%}{{- ' ' + said.strip() + ' ' + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""
LLAMA3 = r"""
{%- for m in messages -%}
{%- if loop.first -%}{{- bos_token -}}{%- endif -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- (m.content | trim) + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}{{- (m.content | trim) + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
# Llama 3.1, 3.2, 3.3: a date, tools before the first question, one call a turn
LLAMA31 = r"""
{{- bos_token -}}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' -%}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{%- if tools -%}{{- 'Environment: ipython\n' -}}{%- endif -%}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' -}}
{%- if tools -%}
  {%- set first = rest[0].content | trim -%}{%- set rest = rest[1:] -%}
  {{- '<|start_header_id|>user<|end_header_id|>\n\nAnswer with a call.\n\n' -}}
  {%- for tool in tools -%}{{- tool | tojson(indent=4) -}}{{- '\n\n' -}}{%- endfor -%}
  {{- first + '<|eot_id|>' -}}
{%- endif -%}
{%- for m in rest -%}
{%- if m.role == 'tool' -%}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' -}}{{- m.content | tojson -}}{{- '<|eot_id|>' -}}
{%- elif m.role == 'assistant' -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- generation -%}
  {%- if m.tool_calls -%}
    {%- if m.tool_calls | length != 1 -%}{{- raise_exception('Only single calls') -}}{%- endif -%}
    {{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' -}}
    {{- m.tool_calls[0].function.arguments | tojson -}}{{- '}<|eot_id|>' -}}
  {%- else -%}{{- (m.content | trim) + '<|eot_id|>' -}}{%- endif -%}{%- endgeneration -%}
{%- else -%}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

MISTRAL1 = r"""
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}
{%- else -%}{%- generation -%}{{- ' ' + m.content + eos_token -}}{%- endgeneration -%}{%- endif -%}
{%- endfor -%}
"""


def _mistral(system: str, before_tools: str, call: str, asked: str) -> str:
    """v3 and later: tools before the last question, calls and results between special tokens."""
    return (
        r"{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}"
        r"{%- set asks = rest | selectattr('role', 'equalto', 'user') | list -%}{{- bos_token -}}"
        + system
        + r"""
{%- set at = namespace(n=0) -%}
{%- for m in rest -%}{%- if m.role != 'tool' and not m.tool_calls -%}
  {%- if (m.role == 'user') != (at.n % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
  {%- set at.n = at.n + 1 -%}{%- endif -%}{%- endfor -%}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
  {%- if tools and m == asks[-1] -%}{{- '[AVAILABLE_TOOLS]"""
        + before_tools
        + r"""' -}}{{- tools | tojson -}}{{- '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
"""
        + asked
        + r"""
{%- elif m.tool_calls -%}{%- generation -%}{{- '[TOOL_CALLS]"""
        + call
        + r"""' -}}{{- m.tool_calls | tojson -}}{{- eos_token -}}{%- endgeneration -%}
{%- elif m.role == 'assistant' -%}{%- generation -%}{{- SAID + eos_token -}}{%- endgeneration -%}
{%- elif m.role == 'tool' -%}
  {%- if not m.tool_call_id is defined or m.tool_call_id | length != 9 -%}{{- raise_exception('IDs of 9 characters') -}}{%- endif -%}
  {{- '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- else -%}{{- raise_exception('Only user and assistant roles') -}}{%- endif -%}
{%- endfor -%}
"""
    )


MISTRAL3 = _mistral(
    "", " ", " ", "{{- '[INST] ' + ((messages[0].content + '\\n\\n') if rest != messages and loop.first else '') + "
    "m.content + '[/INST]' -}}",
).replace("SAID", "' ' + m.content")  # fmt: skip
# the system prompt stands before the last question, and only if no answer follows it
NEMO = _mistral(
    "", "", "", "{{- '[INST]' + ((messages[0].content + '\\n\\n') if rest != messages and loop.last else '') + "
    "m.content + '[/INST]' -}}",
).replace("SAID", "m.content")  # fmt: skip
SMALL = _mistral(
    "{{- '[SYSTEM_PROMPT]' + (messages[0].content if rest != messages else 'Today is ' + strftime_now('%Y-%m-%d')) + "
    "'[/SYSTEM_PROMPT]' -}}", "", "", "{{- '[INST]' + m.content + '[/INST]' -}}",
).replace("SAID", "m.content")  # fmt: skip

_GEMMA_TURNS = r"""
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- (m.content | trim) + '<end_of_turn>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- else -%}{{- (m.content | trim) + '<end_of_turn>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
_ALTERNATE = r"""
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Roles must alternate') -}}{%- endif -%}
"""
GEMMA2 = (
    "{{- bos_token -}}{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}"
    "{%- endif -%}{%- set prefix = '' -%}{%- for m in messages -%}" + _ALTERNATE + _GEMMA_TURNS
)
GEMMA3 = (
    "{{- bos_token -}}{%- set own = messages[0].role == 'system' -%}"
    "{%- set prefix = messages[0].content + '\\n\\n' if own else '' -%}"
    "{%- for m in (messages[1:] if own else messages) -%}" + _ALTERNATE + _GEMMA_TURNS
)

PHI3 = r"""
{%- for m in messages -%}
{{- '<|' + m.role + '|>\n' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + '<|end|>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- else -%}{{- m.content + '<|end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""
PHI4 = r"""
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '<|im_sep|>' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}
"""
PHI4_MINI = r"""
{%- set own = messages[0].role == 'system' -%}
{%- if own or tools -%}{{- '<|system|>' + (messages[0].content if own else '') -}}
  {%- for tool in tools or [] -%}{{- '<|tool|>' -}}{{- tool.function | tojson -}}{{- '<|/tool|>' -}}{%- endfor -%}
  {{- '<|end|>' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{- '<|tool_response|>' -}}{{- m.content | tojson -}}{{- '<|end|>' -}}
{%- elif m.role == 'assistant' -%}{{- '<|assistant|>' -}}{%- generation -%}{{- m.content -}}
  {%- for call in m.tool_calls or [] -%}{{- '<|tool_call|>' -}}{{- call.function | tojson -}}{{- '<|/tool_call|>' -}}{%- endfor -%}
  {{- '<|end|>' -}}{%- endgeneration -%}
{%- elif m.role != 'system' -%}{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""

_EOS = "<｜end▁of▁sentence｜>"
_BOS = "<｜begin▁of▁sentence｜>"
DEEPSEEK2 = r"""
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- 'User: ' + m.content + '\n\n' -}}
{%- elif m.role == 'assistant' -%}{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + m.content + eos_token -}}{%- endgeneration -%}
{%- elif m.role == 'system' -%}{{- m.content + '\n\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
_DEEPSEEK_CALLS = r"""
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in m.tool_calls -%}
  {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' -}}{{- call.function.arguments | tojson -}}{{- '<｜tool▁call▁end｜>' -}}
{%- endfor -%}{{- '<｜tool▁calls▁end｜>' + eos_token -}}
"""
_DEEPSEEK_SYSTEM = r"""
{%- set system = namespace(text='') -%}
{%- for m in messages -%}{%- if m.role == 'system' -%}{%- set system.text = m.content -%}{%- endif -%}{%- endfor -%}
{{- bos_token + system.text -}}
"""
DEEPSEEK31 = (
    _DEEPSEEK_SYSTEM
    + r"""
{%- set ns = namespace(asked=false) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<｜User｜>' + m.content -}}{%- set ns.asked = true -%}
{%- elif m.role == 'tool' -%}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}{%- set ns.asked = false -%}
{%- elif m.role == 'assistant' -%}
  {%- if ns.asked -%}{{- '<｜Assistant｜></think>' -}}{%- endif -%}{%- set ns.asked = false -%}
  {%- generation -%}
  {%- if m.tool_calls -%}{{- m.content -}}"""
    + _DEEPSEEK_CALLS
    + r"""
  {%- else -%}{{- (m.content.split('</think>', 1)[1] if '</think>' in m.content else m.content) + eos_token -}}{%- endif -%}
  {%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.asked -%}{{- '<｜Assistant｜>' -}}
  {{- '<think>' if thinking is defined and thinking else '</think>' -}}{%- endif -%}
"""
)
# the generation prompt opens the reasoning that past answers lack
R1 = (
    _DEEPSEEK_SYSTEM
    + r"""
{%- set ns = namespace(tool=false) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<｜User｜>' + m.content -}}{%- set ns.tool = false -%}
{%- elif m.role == 'tool' -%}
  {{- '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}{%- set ns.tool = true -%}
{%- elif m.role == 'assistant' and m.tool_calls -%}{{- '<｜Assistant｜>' -}}{%- generation -%}"""
    + _DEEPSEEK_CALLS
    + r"""{%- endgeneration -%}
{%- elif m.role == 'assistant' -%}
  {{- '<｜tool▁outputs▁end｜>' if ns.tool else '<｜Assistant｜>' -}}{%- set ns.tool = false -%}
  {%- generation -%}{{- m.content.split('</think>')[-1] + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if ns.tool -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- if add_generation_prompt and not ns.tool -%}{{- '<｜Assistant｜><think>\n' -}}{%- endif -%}
"""
)

COMMAND_R = (
    r"""
{{- bos_token -}}
{%- set own = messages[0].role == 'system' -%}
{%- if own -%}{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0].content + '<|END_OF_TURN_TOKEN|>' -}}{%- endif -%}
{%- for m in (messages[1:] if own else messages) -%}"""
    + _ALTERNATE
    + r"""
{%- if m.role == 'user' -%}{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' -}}
{%- else -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- generation -%}{{- m.content.strip() + '<|END_OF_TURN_TOKEN|>' -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}
"""
)
# Command R7B: two tokens end an answer, and the generation prompt is written asked or not
COHERE2 = r"""
{{- bos_token + '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble' -}}
{%- if messages[0].role == 'system' -%}{{- '\n' + messages[0].content -}}{%- endif -%}
{%- if tools -%}{{- tools | tojson -}}{%- endif -%}{{- '<|END_OF_TURN_TOKEN|>' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' -}}
{%- elif m.role == 'assistant' -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- generation -%}
  {%- if m.tool_calls -%}
    {{- '<|START_THINKING|>' + (m.reasoning_content or '') + '<|END_THINKING|><|START_ACTION|>' -}}
    {{- m.tool_calls | tojson -}}{{- '<|END_ACTION|><|END_OF_TURN_TOKEN|>' -}}
  {%- else -%}{{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}{%- endif -%}{%- endgeneration -%}
{%- elif m.role == 'tool' -%}
  {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>' + m.content + '<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>' -}}
{%- endif -%}
{%- endfor -%}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}
"""

_PIPED = r"""
{%- for m in messages -%}
{{- '<|' + m.role + '|>\n' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + eos_token -}}{%- endgeneration -%}AFTER
{%- else -%}{{- m.content + USER -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""
ZEPHYR = _PIPED.replace("AFTER", "{{- '\\n' -}}").replace("USER", "eos_token + '\\n'")  # StableLM 2, TinyLlama
TULU = _PIPED.replace("AFTER", "{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}").replace("USER", "'\\n'")
OLMO2 = "{{- bos_token -}}" + TULU  # Falcon 3 without the first token
GRANITE = r"""
{%- set own = messages[0].role == 'system' -%}
{{- '<|start_of_role|>system<|end_of_role|>' -}}
{{- messages[0].content if own else "Today's Date: " + strftime_now('%B %d, %Y') + '. You are a model.' -}}{{- '<|end_of_text|>\n' -}}
{%- if tools -%}{{- '<|start_of_role|>available_tools<|end_of_role|>' -}}{{- tools | tojson(indent=4) -}}{{- '<|end_of_text|>\n' -}}{%- endif -%}
{%- for m in (messages[1:] if own else messages) -%}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content -}}
  {%- if m.tool_calls -%}{{- '<|tool_call|>' -}}{{- m.tool_calls | tojson -}}{%- endif -%}
  {{- '<|end_of_text|>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- else -%}{{- m.content + '<|end_of_text|>\n' -}}{%- endif -%}
{%- if loop.last and add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}
{%- endfor -%}
"""
EXAONE = r"""
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}{{- '[|system|][|endofturn|]\n' -}}{%- endif -%}
{{- '[|' + m.role + '|]' -}}
{%- if m.role == 'user' -%}{{- m.content + '\n' -}}
{%- elif m.role == 'assistant' -%}{%- generation -%}{{- m.content + '[|endofturn|]' -}}{%- endgeneration -%}{{- '\n' -}}
{%- else -%}{{- m.content + '[|endofturn|]\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}
"""
# nothing ends an answer but the token that begins the next turn, which transformers' mask leaves out
_GLM = r"""
{{- '[gMASK]<sop>' -}}
{%- if tools -%}{{- '<|system|>\n# Tools\n' -}}{{- tools | tojson -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{- '<|observation|>\n' + m.content -}}
{%- elif m.role == 'assistant' -%}{{- '<|assistant|>' -}}{%- generation -%}SAID
  {%- for call in m.tool_calls or [] -%}{{- '\n<tool_call>' + call.function.name -}}{{- call.function.arguments | tojson -}}{{- '</tool_call>' -}}{%- endfor -%}
  {%- endgeneration -%}
{%- else -%}{{- '<|' + m.role + '|>\n' + m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
GLM4 = _GLM.replace("SAID", "{{- '\\n' + m.content.strip() -}}")
GLM46 = _LAST + _GLM.replace(
    "SAID",
    "{%- set thought = m.reasoning_content or '' if loop.index0 > at.last else '' -%}"
    "{{- '\\n<think>' + thought + '</think>' -}}{%- if m.content.strip() -%}{{- '\\n' + m.content.strip() -}}{%- endif -%}",
)
# an answer ends with another token when more follows, and its reasoning is gone
GPT_OSS = r"""
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' -}}
{%- set own = messages[0].role == 'system' -%}
{%- if own or tools -%}{{- '<|start|>developer<|message|>' -}}{%- if own -%}{{- '# Instructions\n\n' + messages[0].content -}}{%- endif -%}
{%- if tools -%}{{- '# Tools\n\n' -}}{{- tools | tojson -}}{%- endif -%}{{- '<|end|>' -}}{%- endif -%}
{%- for m in (messages[1:] if own else messages) -%}
{%- if m.role == 'user' -%}{{- '<|start|>user<|message|>' + m.content + '<|end|>' -}}
{%- elif m.role == 'tool' -%}
  {{- '<|start|>functions.add to=assistant<|channel|>commentary<|message|>' -}}{{- m.content | tojson -}}{{- '<|end|>' -}}
{%- elif m.tool_calls -%}{{- '<|start|>assistant' -}}{%- generation -%}
  {{- ' to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' -}}
  {{- m.tool_calls[0].function.arguments | tojson -}}{{- '<|call|>' -}}{%- endgeneration -%}
{%- else -%}{{- '<|start|>assistant' -}}{%- generation -%}
  {%- if loop.last and m.thinking -%}{{- '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' -}}{%- endif -%}
  {{- '<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""
VICUNA = r"""
{{- messages[0].content if messages[0].role == 'system' else 'A chat.' -}}{{- ' ' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- 'USER: ' + m.content + ' ' -}}
{%- elif m.role == 'assistant' -%}{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + m.content + eos_token -}}{%- endgeneration -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
OPENCHAT = r"""
{{- bos_token -}}
{%- for m in messages -%}
{{- 'GPT4 Correct ' + m.role.title() + ':' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- ' ' + m.content + '<|end_of_turn|>' -}}{%- endgeneration -%}
{%- else -%}{{- ' ' + m.content + '<|end_of_turn|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'GPT4 Correct Assistant:' -}}{%- endif -%}
"""
KIMI = r"""
{%- if tools -%}{{- '<|im_system|>tool_declare<|im_middle|>' -}}{{- tools | tojson -}}{{- '<|im_end|>' -}}{%- endif -%}
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}{{- '<|im_system|>system<|im_middle|>You are a model<|im_end|>' -}}{%- endif -%}
{%- if m.role == 'assistant' -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- '<|im_' + ('user' if m.role == 'user' else 'system') + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}
"""

_INST = (
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_COHERE = (
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>",
    "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>",
)  # fmt: skip
_SEEK = (
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
_TEXT = "<|endoftext|>"

_IM = ("<|im_start|>", "<|im_end|>")

PUBLISHED: dict[str, Published] = {
    "ChatML (Yi, OpenHermes)": Published(CHATML, _IM, "<|im_end|>"),
    "SmolLM2": Published(SMOLLM2, _IM, "<|im_end|>"),
    "Qwen2.5": Published(QWEN25, _IM, "<|im_end|>"),
    "Hermes 3": Published(HERMES3, _IM, "<|im_end|>"),
    "QwQ": Published(QWQ, _IM, "<|im_end|>"),
    "Qwen3": Published(QWEN3, _IM, "<|im_end|>"),
    "Qwen3 Thinking 2507": Published(QWEN3_THINKING, _IM, "<|im_end|>"),
    "SmolLM3": Published(SMOLLM3, _IM, "<|im_end|>"),
    "LFM2": Published(LFM2, _IM, "<|im_end|>"),
    "Llama 2": Published(LLAMA2, ()),
    "Llama 3": Published(LLAMA3, _HEADER, "<|eot_id|>"),
    "Llama 3.1, 3.2, 3.3": Published(LLAMA31, _HEADER, "<|eot_id|>"),
    "Mistral v1": Published(MISTRAL1, ()),
    "Mistral v3": Published(MISTRAL3, _INST),
    "Mistral Nemo": Published(NEMO, _INST),
    "Mistral Small 3.1": Published(SMALL, (*_INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    "Gemma 1, 2": Published(GEMMA2, ("<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
    "Gemma 3": Published(GEMMA3, ("<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
    "Phi-3": Published(PHI3, _ROLES, _TEXT),
    "Phi-3, eos <|end|>": Published(PHI3, _ROLES, "<|end|>"),
    "Phi-4": Published(PHI4, (*_IM, "<|im_sep|>"), "<|im_end|>"),
    "Phi-4 mini": Published(PHI4_MINI, (*_ROLES, "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"), _TEXT),
    "DeepSeek V2": Published(DEEPSEEK2, (), _EOS, _BOS),
    "DeepSeek V3.1": Published(DEEPSEEK31, _SEEK, _EOS, _BOS),
    "DeepSeek R1 distilled": Published(R1, _SEEK, _EOS, _BOS),
    "Command R": Published(COMMAND_R, _COHERE, "<|END_OF_TURN_TOKEN|>"),
    "Command R7B": Published(COHERE2, _COHERE, "<|END_OF_TURN_TOKEN|>"),
    "Zephyr, TinyLlama": Published(ZEPHYR, ()),
    "StableLM 2": Published(ZEPHYR, (), _TEXT),
    "OLMo 2": Published(OLMO2, (), _TEXT, _TEXT),
    "Falcon 3": Published(TULU, _ROLES, _TEXT),
    "Granite 3": Published(GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"), "<|end_of_text|>"),
    "EXAONE 3.5": Published(EXAONE, ("[|endofturn|]",), "[|endofturn|]"),
    "GLM-4": Published(GLM4, ("[gMASK]", "<sop>", "<|observation|>", *_ROLES[:3]), _TEXT),
    "GLM-4.6": Published(GLM46, ("[gMASK]", "<sop>", "<|observation|>", *_ROLES[:3]), _TEXT),
    "gpt-oss": Published(GPT_OSS, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"), "<|return|>"),
    "Vicuna 1.1": Published(VICUNA, ()),
    "OpenChat 3.5": Published(OPENCHAT, ("<|end_of_turn|>",), "<|end_of_turn|>"),
    "Kimi K2": Published(
        KIMI, ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"), "<|im_end|>"
    ),
}
