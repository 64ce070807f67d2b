"""The tools of a template: learned once, then given to each request."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.tools import described
from mlxgpt.common.serve.tools.grammar import Grammar
from mlxgpt.common.serve.tools.learn import Learned, learn
from mlxgpt.common.serve.tools.reasoning import Reasoning
from mlxgpt.common.serve.tools.shape import Shape
from mlxgpt.common.sft.template import Template

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class ToolFormat:
    """How a template writes tool calls."""

    template: Template
    learned: Learned

    @classmethod
    def learn(cls, template: Template) -> "ToolFormat":
        """What the template writes.

        Raises:
            UserError: it writes no tools, or calls in a form that is not known.
        """
        return cls(template, learn(template))

    @property
    def shape(self) -> Shape:
        """How calls are written."""
        return self.learned.shape

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that may end an answer of calls, beside those that end any answer."""
        return self.learned.ends

    def grammar(
        self,
        tools: Sequence[dict[str, Any]],
        named: str | None = None,
        parallel: bool = True,
        opened: Reasoning | None = None,
    ) -> str:
        """The grammar, in llguidance's Lark, of an answer that calls tools: any, or the ``named`` one once.

        ``opened``: the reasoning that the prompt ends in; it comes to its end first.

        Raises:
            UserError: a schema that is not enforceable.
        """
        chosen = [tool for tool in tools if named in (None, tool["function"]["name"])]
        return Grammar(self.shape, self.template).calls(chosen, parallel and named is None, opened)

    def strict_grammar(
        self, tools: Sequence[dict[str, Any]], parallel: bool = True, reasoning: Reasoning | None = None
    ) -> str:
        """The grammar of any answer, whose calls, if any, are of these tools and fit the schema where that is strict.

        Raises:
            UserError: a schema that is not enforceable.
        """
        return Grammar(self.shape, self.template).free(tools, parallel, reasoning)

    def id_of(self, seed: int, prompt: Sequence[int], copy: int = 0) -> Callable[[int, str], str]:
        """What gives a call its id, by its index and the id that the model wrote: the same for the same request."""
        taken: set[str] = set()

        def made(index: int, written: str) -> str:
            if (
                self.learned.short_ids
                and len(written) == 9
                and written.isascii()
                and written.isalnum()
                and written not in taken
            ):
                taken.add(written)
                return written
            address = f"{seed} {copy} {index} {' '.join(map(str, prompt))}"
            return self._id(address)

        return made

    def _id(self, address: str) -> str:
        number = int.from_bytes(hashlib.sha256(address.encode()).digest())
        size = 9 if self.learned.short_ids else 24
        letters = "".join(_LETTERS[number // 62**n % 62] for n in range(size))
        return letters if self.learned.short_ids else f"call_{letters}"

    def fitted(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template takes them: it may refuse ids of calls, or leave calls out."""
        if self.learned.described:
            return [described.written(self.shape, message) for message in messages]
        if not self.learned.short_ids:
            return list(messages)
        return [self._renamed(message) for message in messages]

    def _short(self, given: Any) -> str:
        fits = isinstance(given, str) and len(given) == 9 and given.isascii() and given.isalnum()
        return given if fits else self._id(str(given))

    def _renamed(self, message: dict[str, Any]) -> dict[str, Any]:
        if "tool_call_id" in message:
            message = message | {"tool_call_id": self._short(message["tool_call_id"])}
        if calls := message.get("tool_calls"):
            message = message | {"tool_calls": [call | {"id": self._short(call.get("id"))} for call in calls]}
        return message


def check_results(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses results of tools that no call precedes, as OpenAI does.

    Raises:
        UserError: names the message.
    """
    open_ids: set[str] = set()
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message.get("role") == "tool":
            given = message.get("tool_call_id")
            if not open_ids:
                raise UserError(f"{where} has role tool: expected it behind an assistant's message with tool_calls")
            if given is not None and given not in open_ids:
                raise UserError(
                    f"{where}.tool_call_id is {given!r}: expected the id of a call before it: "
                    f"{', '.join(map(repr, sorted(open_ids)))}"
                )
        elif message.get("role") == "assistant":
            open_ids = {str(call.get("id")) for call in message.get("tool_calls") or ()}
        else:
            open_ids = set()
