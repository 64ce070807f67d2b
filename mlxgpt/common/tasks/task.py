"""What a task asks, and what is said of a model that was asked: plain values, whoever reads or scores them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from mlxgpt.common.config import SampleConfig

KINDS = ("choice", "cloze", "text", "pair", "answer", "code")


@dataclass(frozen=True)
class Question:
    """One row of a task; which fields count is its kind's."""

    where: str  # file and row, for messages
    text: str = ""  # what the model sees before the answer, without examples
    choices: tuple[str, ...] = ()  # choice: what may follow; pair: more and less of a stereotype; answer: others right
    texts: tuple[str, ...] = ()  # choice: a text for each choice, where the texts differ and ``target`` follows all
    gold: tuple[int, ...] = ()  # choice: the right ones
    target: str = ""  # cloze: what follows; answer: the right answer; what an example of this row ends with
    program: str = ""  # code: what of the program stands before the answer, such as the head of a function
    tests: str = ""  # code: is run behind the program
    group: str = ""  # a subject, a kind of bias: scored apart as well; a/b: part of a
    before: str = ""  # stands before everything, in place of the task's description
    key: str = ""  # differs where rows differ, also in what is not read of them


@dataclass(frozen=True)
class Task:
    """Questions of one kind, and how they are asked."""

    name: str
    kind: str  # of KINDS
    questions: Sequence[Question]
    examples: Sequence[Question] = ()  # what examples are drawn from; (): the questions
    shots: int = 0  # examples before each question
    first: bool = False  # the first ``shots`` examples for every question; else drawn for each
    leave_out: bool = True  # a question is none of its own examples: one more is drawn, as in lm-evaluation-harness
    apart: bool = False  # each group is a task of its own: its examples, its --limit
    description: str = ""  # before everything
    before_target: str = " "  # between text and answer
    between: str = "\n\n"  # behind each example
    stop: tuple[str, ...] = ()  # answer, code: ends the answer
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(temperature=0.0, max_tokens=256))
    metrics: tuple[str, ...] = ()  # (): all of the kind
    filters: Mapping[str, Callable[[str], str]] = field(default_factory=dict)  # answer: what of it is compared, by name
    alike: Callable[[str], str] = str  # answer: what is done to both before they are compared, such as lower case
    draws: int = 1  # code: programs a question
    notes: tuple[str, ...] = ()  # what reading left out or changed, one line each


class Continued(NamedTuple):
    """What a model says of tokens behind others."""

    logprob: float  # natural, summed over the tokens
    greedy: bool  # whether each is the likeliest at its place


class Scorer(Protocol):
    """A model that tasks ask, of either framework."""

    context: int  # tokens that a row may have
    cut: int  # rows so far that were longer, whose first tokens were left out
    chat: bool  # contexts stand in a chat template: nothing is put before a choice

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, BOS where the tokenizer puts it; white space at the end of ``context`` goes to what follows."""
        ...

    def continuations(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], say: Callable[[str], None] = ...
    ) -> list[Continued]:
        """What follows, of (context, continuation) in ids, in their order; what contexts share is read once."""
        ...

    def texts(self, texts: Sequence[str], say: Callable[[str], None] = ...) -> list[float]:
        """Log-probability of each text whole, every token once, in windows of the context."""
        ...

    def answers(
        self, contexts: Sequence[str], stop: Sequence[str], sample: SampleConfig, say: Callable[[str], None] = ...
    ) -> list[str]:
        """What the model writes behind each context, each as it would alone."""
        ...


class Asked(NamedTuple):
    """What came of the questions of one kind, before it is summed up."""

    each: dict[str, np.ndarray]  # as Outcome's
    answers: list[dict[str, object]]  # what the model said of each question, for --log
    notes: list[str]


class Metric(NamedTuple):
    """A mean over questions."""

    value: float
    stderr: float | None  # standard error; None: fewer than two questions, or unknown


@dataclass(frozen=True)
class Outcome:
    """What a task says of a model."""

    task: str
    kind: str
    questions: int
    metrics: Mapping[str, Metric]  # such as acc, acc_per_byte
    each: Mapping[str, np.ndarray]  # such as acc, logprob -> (questions,) float64: what metrics are means of
    groups: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)  # questions of each group
    shots: int = 0  # examples before each question
    cut: int = 0  # rows longer than the context, whose first tokens were left out
    notes: tuple[str, ...] = ()
