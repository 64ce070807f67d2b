"""How a template writes tool calls: what stands before, in, between and behind them."""

from dataclasses import dataclass

NAME, ARGS, ID, INDEX = "name", "arguments", "id", "index"
"""What varies in a call; INDEX counts the calls of an answer."""

Keys = tuple[tuple[str, ...], tuple[str, ...]]  # the paths of a call's name and of its arguments in a JSON object


@dataclass(frozen=True)
class Slot:
    """A place in a call that differs from call to call."""

    kind: str  # NAME, ARGS, ID or INDEX
    first: int = 0  # of INDEX: the number of the first call


@dataclass(frozen=True)
class Parameters:
    """Arguments written one by one: ``before`` KEY ``between`` VALUE ``after``, with ``apart`` between two of them."""

    before: str
    between: tuple[tuple[str, str], ...]  # by the value's type in JSON Schema: most templates write the same for all
    after: str
    apart: str
    words: tuple[str, str, str]  # true, false and null, as JSON or Python has them
    quotes: tuple[str, ...]  # around strings; (): strings stand as they are, other values as JSON or Python has them

    def begins(self, kind: str) -> str:
        """What stands between the key and a value of this type."""
        return dict(self.between)[kind]


@dataclass(frozen=True)
class Shape:
    """Calls as they are written: ``opens``, the calls with ``between`` between two, ``closes``.

    A call is ``parts``, its slots filled; ``between`` reaches from the last slot of a call to the first of the next.
    """

    opens: str
    parts: tuple["str | Slot", ...]
    between: str  # of a template that writes one call only: ""
    closes: str
    mark: str  # what announces calls in a text; "": an answer that is a JSON object
    stop: str = ""  # behind a call that is a JSON object, or behind the list of them
    keys: Keys | None = None  # where a call is a JSON object
    listed: bool = False  # calls are a JSON list
    parameters: Parameters | None = None  # where arguments are written one by one

    @property
    def parallel(self) -> bool:
        """Whether the template writes several calls."""
        return bool(self.between)


@dataclass(frozen=True)
class Call:
    """A call as it was read."""

    name: str
    arguments: str  # JSON; its beginning, where the answer was cut
    id: str = ""  # as the model wrote it
