"""A proposal in the making, and what is asked of a state dict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from convert.adopt.rules import Choice, Rule
from convert.formats.opened import Tensor


class State(Protocol):
    """What is asked of source.State."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def under(self) -> tuple[str, ...]: ...
    @property
    def prefix(self) -> str: ...
    @property
    def extras(self) -> Mapping[str, Any]: ...
    @property
    def tied(self) -> tuple[tuple[str, ...], ...]: ...


@dataclass
class Draft:
    """A proposal in the making."""

    rules: dict[str, Rule] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)  # what buffers say
    pairing: str = ""  # of rope, as a table has it
    bare_qk: list[str] = field(default_factory=list)  # norms of queries and keys without bias
    without: list[str] = field(default_factory=list)  # modules without the bias that others of their kind have

    def add(self, choice: Choice | None) -> None:
        """Appends a choice and takes its first option."""
        if choice is None:
            return
        first = choice.options[0]
        self.rules |= first.rules
        self.model |= first.model
        if len(choice.options) > 1:
            self.choices.append(choice)
