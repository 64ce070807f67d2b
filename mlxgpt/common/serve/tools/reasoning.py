"""What encloses an answer's reasoning, as its template has it."""

from dataclasses import dataclass

from mlxgpt.common.chat import jinja
from mlxgpt.common.chat.turns import THOUGHTS
from mlxgpt.common.sft.template import Template


@dataclass(frozen=True)
class Reasoning:
    """The tags around an answer's reasoning."""

    opens: str
    closes: str

    @classmethod
    def of(cls, template: Template) -> "Reasoning | None":
        """Those that the template writes or looks for; None where it knows no reasoning."""
        written = "\0".join(map(jinja.literals, template.sources.values()))
        for opens, closes in THOUGHTS:
            if opens in written or closes in written:
                return cls(opens, closes)
        return None

    def opened(self, prompt: str) -> bool:
        """Whether the text of a prompt ends inside a reasoning."""
        return prompt.rstrip().endswith(self.opens)
