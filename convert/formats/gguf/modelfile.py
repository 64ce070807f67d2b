"""A Modelfile, from which `ollama create` makes a model of a GGUF file.

Ollama does not run jinja: it knows some templates by their text, and else sends a prompt as it is. So a template of
turns is written as Ollama's own (Go's text/template) where it can be said there, and proven by rendering both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxgpt.common.errors import UserError
from mlxgpt.common.sft.template import Template, template_of
from mlxgpt.common.tokenizers.protocol import Tokenizer

_LARGEST = 8192  # Ollama reserves memory for as many tokens as num_ctx says
_Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Turns:
    """What a template puts before and after each role's text, before the first turn, and before an answer."""

    around: dict[str, tuple[str, str]]
    start: str
    prompt: str
    system: str  # what the system says where a conversation has no such turn; "" for nothing

    def render(self, messages: _Messages) -> str:
        """The text up to where an answer begins."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        said = [pair[0] + one["content"] + pair[1] for one in messages for pair in [self.around[one["role"]]]]
        return self.start + "".join(said) + self.prompt

    def go(self) -> str:
        """The same for Ollama."""
        roles = [
            f'{{{{ {"else " if n else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for n, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{self.start}{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def modelfile(tokenizer: Tokenizer, file: str, ends: Sequence[int], context: int) -> str:
    """The Modelfile of a GGUF file that lies beside it.

    Args:
        tokenizer: the model's.
        file: the GGUF file's name.
        ends: what ends a generated text.
        context: tokens that the model can see.
    """
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {min(context, _LARGEST)}"]
    texts = (tokenizer.decode([i]) for i in ends)
    lines += [f'PARAMETER stop "{text}"' for text in texts if text and text.isprintable() and '"' not in text]
    try:
        template = template_of(tokenizer)
    except UserError:
        template = None
    turns = _turns(template) if template else None
    if turns:
        start = "".join(tokenizer.decode([i]) for i in tokenizer.before)  # which Ollama puts there itself
        said = Turns(turns.around, turns.start.removeprefix(start), turns.prompt, turns.system).go()
        lines += [f'SYSTEM """{turns.system}"""'] if turns.system else []
        lines.append(f'TEMPLATE """{said}"""')
    elif template:
        lines.append("# The chat template cannot be said in Ollama's language; llama.cpp and LM Studio run the file's.")
    return "\n".join(lines) + "\n"


def _turns(template: Template) -> Turns | None:
    """The turns of a template that does nothing else; None where it does."""
    found = None
    for system in (True, False):
        try:
            found = found or _taken_apart(template, system)
        except UserError:
            continue  # a template that refuses a system turn
    if found is None or any(mark in found.go().replace("{{ ", "") for mark in ('"""', "{{")):
        return None
    probes: list[_Messages] = [
        _talk("user"),
        _talk("user", "assistant", "user"),
        _talk(*["user", "assistant"] * 2, "user"),
    ]
    if "system" in found.around:
        probes += [_talk("system", *(one["role"] for one in talk)) for talk in probes]
    try:
        same = all(template.render(talk, generation=True) == found.render(talk) for talk in probes)
    except UserError:
        return None
    return found if same else None


def _talk(*roles: str) -> _Messages:
    return [{"role": role, "content": f"What {role}  {n} says.\n\nAnd then?"} for n, role in enumerate(roles)]


def _taken_apart(template: Template, system: bool) -> Turns | None:
    """The pieces between texts that no template has."""
    names = {"system": "@0@", "user": "@1@", "assistant": "@2@"}

    def pieces(*roles: str, generation: bool = False) -> list[str] | None:
        messages = [{"role": role, "content": names[role]} for role in roles]
        text, made = template.render(messages, generation=generation), []
        for role in roles:
            before, found, text = text.partition(names[role])
            made.append(before)
            if not found:
                return None
        return [*made, text]

    asked, prompted = pieces("user"), pieces("user", generation=True)
    answered, again = pieces("user", "assistant"), pieces("user", "assistant", "user")
    told = pieces("system", "user") if system else None
    if not (asked and prompted and answered and again) or (system and not told):
        return None
    after_user, after_answer = asked[1], answered[2]
    user = again[2].removeprefix(after_answer)
    around = {"user": (user, after_user), "assistant": (answered[1].removeprefix(after_user), after_answer)}
    start, by_default = asked[0].removesuffix(user), ""
    if told:
        before, after = told[0], told[1].removesuffix(user)
        if before.startswith(start):
            before = before.removeprefix(start)
        elif asked[0].startswith(before) and start.endswith(after):  # something is said where nobody does
            by_default, start = start.removeprefix(before).removesuffix(after), ""
        else:
            return None
        around = {"system": (before, after)} | around
    return Turns(around, start, prompted[1].removeprefix(after_user), by_default)
