"""An answer, as it comes, in its parts: content, reasoning, and calls of tools.

What may be the beginning of tool markup or of a reasoning's end is held back until that is certain. What looks like a
call and is none at its end is content; a call that is cut off (the answer's length ran out) is given as far as it came.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxgpt.common.serve.tools.literal import Partial
from mlxgpt.common.serve.tools.read import Reader
from mlxgpt.common.serve.tools.reasoning import Reasoning
from mlxgpt.common.serve.tools.shape import Call, Shape

_BARE = "<|python_tag|>"  # what Llama may write before a call that is a JSON object
_SHORT = 200  # characters, up to which a call is read again with each piece


@dataclass(frozen=True)
class Delta:
    """What became certain: one of the three."""

    content: str = ""
    reasoning: str = ""
    index: int = 0  # of the call
    call: Call | None = None  # whole, with its id


class Splitter:
    """Takes an answer's text piece by piece.

    Args:
        shape: of the template's calls; None: everything is content or reasoning.
        reasoning: what encloses it, and content; None: nothing does.
        opened: the prompt ends inside the reasoning.
        id_of: the id of the call of an index, given the one that the model wrote.
        tools: of the request: a JSON object that nothing announces is a call of these, and their schemas say what
            arguments that are written as text stand for.
        parallel: False: only the first call counts.
    """

    def __init__(
        self,
        shape: Shape | None = None,
        reasoning: Reasoning | None = None,
        opened: bool = False,
        id_of: Callable[[int, str], str] = lambda n, _: f"call_{n}",
        tools: Sequence[dict] = (),
        parallel: bool = True,
    ) -> None:
        self._shape, self._reasoning, self._id_of = shape, reasoning, id_of
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._parallel = parallel
        self._around = reasoning.around if reasoning is not None else ()
        self._tried = False  # the rest was read as a call, and more is needed
        self._closing = set("}])>\"'")
        if shape is not None:
            self._closing |= {part[-1] for part in (shape.stop, shape.closes.rstrip(), shape.between.rstrip()) if part}
        self._rest = ""
        self._state = "reasoning" if opened else "start"
        self._begun = False  # content or reasoning was given, so that white space counts
        self.calls: list[Call] = []

    def feed(self, text: str) -> list[Delta]:
        """What is certain with this piece."""
        self._rest += text
        if self._tried and len(self._rest) > _SHORT and not self._closing.intersection(text):
            return []  # a long call that cannot end here is not read again
        self._tried = False
        return self._run(False, False)

    def end(self, cut: bool = False) -> list[Delta]:
        """What is left; ``cut``: the answer did not end by itself."""
        return self._run(True, cut)

    def _run(self, last: bool, cut: bool) -> list[Delta]:
        made: list[Delta] = []
        while (step := getattr(self, f"_in_{self._state}")(last, cut)) is not None:
            made += step
        return _joined(made)

    def _in_start(self, last: bool, cut: bool) -> list[Delta] | None:
        """Before anything: an answer may begin with its reasoning, or be a bare call."""
        begins = self._rest.lstrip()
        if self._reasoning is not None and (opens := self._reasoning.opens):
            if begins.startswith(opens):
                self._rest = begins.removeprefix(opens)
                self._state = "reasoning"
                return []
            if not last and opens.startswith(begins):
                return None
        self._state = "bare" if self._shape is not None and not self._shape.mark else "content"
        return []

    def _in_reasoning(self, last: bool, cut: bool) -> list[Delta] | None:
        assert self._reasoning is not None
        closes = self._reasoning.closes
        if not self._begun:
            self._rest = self._rest.lstrip()
        place = self._rest.find(closes)
        if place >= 0:
            thought, self._rest = self._rest[:place].rstrip(), self._rest[place + len(closes) :]
            self._state = "behind"
            self._begun = False
            return [Delta(reasoning=thought)]
        if last:
            thought, self._rest = self._rest.rstrip(), ""
            return [Delta(reasoning=thought)] if thought else None
        thought = self._rest[: len(self._rest) - held(self._rest, (closes,))].rstrip()
        self._rest = self._rest[len(thought) :]
        self._begun = self._begun or bool(thought)
        return [Delta(reasoning=thought)] if thought else None

    def _in_behind(self, last: bool, cut: bool) -> list[Delta] | None:
        """Behind the reasoning: white space goes."""
        self._rest = self._rest.lstrip()
        if not self._rest and not last:
            return None
        self._state = "bare" if self._shape is not None and not self._shape.mark else "content"
        return []

    def _in_bare(self, last: bool, cut: bool) -> list[Delta] | None:
        """Where an answer may be a JSON object that is a call."""
        assert self._shape is not None
        begins = len(self._rest) - len(self._rest.lstrip())
        if not last and _BARE.startswith(self._rest[begins:]):
            return None
        begins += len(_BARE) * self._rest.startswith(_BARE, begins)
        reader = Reader(self._shape, self._schemas, self._rest, begins, last)
        try:
            if not reader.may_begin():
                raise ValueError
            stop = reader.read()
            if any(call.name not in self._schemas for call in reader.calls):
                raise ValueError
        except Partial:
            return self._partial(reader, last, cut)
        except ValueError:
            self._state = "content"
            return []
        self._rest = self._rest[stop:].lstrip("; \n")
        if not self._rest.startswith("{"):
            self._state = "content"
        return self._counted(reader.calls)

    def _in_content(self, last: bool, cut: bool) -> list[Delta] | None:
        """Where text stands, and what announces calls may come."""
        mark = self._shape.mark if self._shape is not None else ""
        marks = (mark, *self._around) if mark else self._around
        place, found = min(((at, each) for each in marks if (at := self._rest.find(each)) >= 0), default=(-1, ""))
        if place >= 0 and found != mark:
            text, self._rest = self._rest[:place], self._rest[place + len(found) :]
            return [Delta(content=text)]
        if place >= 0:
            self._state = "call"
            text = self._rest[:place].rstrip()
        elif last:
            text = self._rest.rstrip() if self.calls else self._rest
            self._rest = text
        else:
            text = self._rest[: len(self._rest) - held(self._rest, marks)]
            text = text.rstrip() if mark else text
        self._rest = self._rest[len(text) :]
        return [Delta(content=text)] if text or place >= 0 else None

    def _in_call(self, last: bool, cut: bool) -> list[Delta] | None:
        """Where what announces calls was read."""
        assert self._shape is not None
        begins = self._rest.find(self._shape.mark)
        reader = Reader(self._shape, self._schemas, self._rest, begins, last)
        try:
            stop = reader.read()
        except Partial:
            return self._partial(reader, last, cut)
        except ValueError:
            upto = begins + len(self._shape.mark)
            text, self._rest = self._rest[:upto], self._rest[upto:]
            self._state = "content"
            return [Delta(content=text)]
        self._rest = self._rest[stop:]
        self._state = "content"
        return self._counted(reader.calls)

    def _partial(self, reader: Reader, last: bool, cut: bool) -> list[Delta] | None:
        """A call whose end is not there."""
        if not last:
            self._tried = True
            return None
        text, self._rest = self._rest, ""
        self._state = "content"
        return self._counted(reader.cut()) if cut else [Delta(content=text)]

    def _counted(self, calls: Sequence[Call]) -> list[Delta]:
        """The calls with their ids."""
        made = []
        for call in calls:
            if self.calls and not self._parallel:
                break
            index = len(self.calls)
            found = Call(call.name, call.arguments, self._id_of(index, call.id))
            self.calls.append(found)
            made.append(Delta(index=index, call=found))
        return made


def held(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    sizes = (
        size for mark in marks for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark[:size] == text[-size:]
    )
    return max(sizes, default=0)


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbors of one kind as one."""
    made: list[Delta] = []
    for one in deltas:
        if made and one.call is None and made[-1].call is None and bool(one.content) == bool(made[-1].content):
            made[-1] = Delta(made[-1].content + one.content, made[-1].reasoning + one.reasoning)
        elif one.call is not None or one.content or one.reasoning:
            made.append(one)
    return made
