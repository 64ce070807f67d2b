"""What encloses an answer's reasoning and its content, as its template has it."""

from dataclasses import dataclass

from mlxgpt.common.chat import jinja
from mlxgpt.common.chat.turns import THOUGHTS
from mlxgpt.common.errors import UserError
from mlxgpt.common.sft.template import Template


@dataclass(frozen=True)
class Reasoning:
    """The tags around an answer's reasoning, and around its content."""

    opens: str  # "" for a template that knows no reasoning
    closes: str
    around: tuple[str, ...] = ()  # what is written before and behind content: Cohere's <|START_RESPONSE|>

    @classmethod
    def of(cls, template: Template) -> "Reasoning | None":
        """Those that the template writes or looks for; None where it has neither."""
        written = "\0".join(map(jinja.literals, template.sources.values()))
        found = next((tags for tags in THOUGHTS if tags[0] in written or tags[1] in written), ("", ""))
        around = _around(template)
        return cls(*found, around) if found[0] or around else None

    def opened(self, prompt: str) -> bool:
        """Whether the text of a prompt ends inside a reasoning."""
        return bool(self.opens) and prompt.rstrip().endswith(self.opens)


def _around(template: Template) -> tuple[str, ...]:
    """The control tokens between the generation prompt and content, and those behind content before the last."""
    try:
        form = template.form
    except UserError:  # nothing ends its turns
        return ()
    lead = form.lead.strip()
    before = (lead,) if template.control.all(lead) and not any(lead in tags for tags in THOUGHTS) else ()
    return *before, *(template.tokenizer.decode([token]) for token in form.ends[:-1])
