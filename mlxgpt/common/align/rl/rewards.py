"""Rewards of completions: a user's functions, a reward model, and what is built in; several, each with a weight.

FILE.py, FILE.py:FUNCTION   f(prompts, completions, **columns) -> a number a completion, as trl calls one
DIR                         a reward model: the score of prompt and completion
exact                       1 where the completion is the text of the column answer, blanks around it aside
regex, regex:PATTERN        1 where the pattern (of the column of that name) is found in the completion
length:N                    1 at N characters, less by 1 / N for each one fewer or more, at least 0
tests                       1 where the program passes the column tests (with --run-code)
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxgpt.common.align.rl.prompts import Prompt
from mlxgpt.common.align.rl.user_rewards import Function, Process, parse
from mlxgpt.common.errors import UserError
from mlxgpt.common.user_code import limited

OpenModel = Callable[[str], Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]]
_ANSWERS = ("answer", "ground_truth", "solution", "reference_answer")
_PROGRAM = "program"  # column with what stands before a completion that is a program


class Asked(NamedTuple):
    """What is rewarded: a prompt and a completion each."""

    prompts: Sequence[Prompt]
    completions: Sequence[str]

    def column(self, names: Sequence[str], reward: str) -> list[str]:
        """The values of the first column of these names that there is, as texts.

        Raises:
            UserError: a prompt has none.
        """
        found = []
        for each in self.prompts:
            name = next((name for name in names if name in each.columns), None)
            if name is None:
                raise UserError(f"{each.where}: no key {names[0]!r}: --reward {reward} reads it")
            found.append(str(each.columns[name]))
        return found

    @property
    def given(self) -> tuple[list[Any], list[Any]]:
        """Prompts and completions as trl gives them to functions: texts, or lists of messages."""
        talks = [each.messages is not None for each in self.prompts]
        prompts = [each.text if each.messages is None else list(each.messages) for each in self.prompts]
        texts = zip(self.completions, talks, strict=True)
        return prompts, [[{"role": "assistant", "content": text}] if talk else text for text, talk in texts]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The other columns, a value a completion; None where a prompt has none."""
        names = dict.fromkeys(name for each in self.prompts for name in each.columns)
        return {name: [each.columns.get(name) for each in self.prompts] for name in names}


Reward = Callable[[Asked], Sequence[float]]


class Rewards:
    """All rewards of a recipe.

    Args:
        names: as rl.rewards has them.
        weights: of them; () = 1 each.
        seconds: that functions of a user have for a call.
        open_model: what scores with a reward model.
        run_code: whether ``tests`` may run programs.

    Raises:
        UserError: no rewards, an unknown one, a file that does not load, or code that nobody allowed to run.
    """

    def __init__(
        self, names: Sequence[str], weights: Sequence[float], seconds: float, open_model: OpenModel, run_code: bool
    ):
        if not names:
            raise UserError("expected --reward: FILE.py, a reward model's folder, exact, regex, length:N or tests")
        self.weights, self._process = list(weights) or [1.0] * len(names), Process()
        self.rewards: dict[str, Reward] = {}
        try:
            for name in names:
                label = self._label(name)
                self.rewards[label] = self._open(name, seconds, open_model, run_code)
        except BaseException:
            self.close()
            raise

    def _label(self, name: str) -> str:
        """What metrics call it; a second of the same name gets a number."""
        label = parse(name)[1] or (Path(name).stem if _is_path(name) else name)
        number, made = 2, label
        while made in self.rewards:
            made, number = f"{label}-{number}", number + 1
        return made

    def _open(self, name: str, seconds: float, open_model: OpenModel, run_code: bool) -> Reward:
        kind, _, given = name.partition(":")
        if name == "exact":
            return _exact
        if kind == "regex":
            return _Regex(given, self._process, seconds)
        if kind == "length":
            if not given.isdecimal() or int(given) < 1:
                raise UserError(f"--reward {name}: expected length:N, such as length:80")
            return lambda asked: [max(0.0, 1 - abs(len(text) - int(given)) / int(given)) for text in asked.completions]
        if name == "tests":
            if not run_code:
                raise UserError(
                    "--reward tests: programs that the model writes are run: --run-code runs them on this machine, "
                    "each in a process without network, with little time and memory and a folder of its own"
                )
            limited.check()
            return _tests
        path, function = parse(name)
        if path.endswith(".py"):
            if not Path(path).is_file():
                raise UserError(f"--reward {path}: no such file")
            called = Function(path, function, self._process, seconds)
            return lambda asked: called(*asked.given, asked.columns)
        if Path(name).is_dir():
            score = open_model(name)
            return lambda asked: score(asked.prompts, asked.completions)
        known = "FILE.py, FILE.py:FUNCTION, a reward model's folder, exact, regex, regex:PATTERN, length:N or tests"
        raise UserError(f"--reward {name}: no such file or folder: expected {known}")

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> dict[str, np.ndarray]:
        """Reward -> a number a completion, (B,) float64.

        Raises:
            UserError: one raises, hangs, has another length or a number that is not finite.
        """
        asked, made = Asked(prompts, completions), {}
        for name, reward in self.rewards.items():
            found = np.array(list(reward(asked)), np.float64)
            if found.shape != (len(completions),):
                raise UserError(
                    f"--reward {name}: {found.size} rewards of {len(completions)} completions: expected one each"
                )
            if not np.isfinite(found).all():
                at = int(np.flatnonzero(~np.isfinite(found))[0])
                raise UserError(
                    f"--reward {name}: {found[at]} for completion {at + 1}, {completions[at][:40]!r}, of "
                    f"{prompts[at].where}: expected a finite number"
                )
            made[name] = found
        return made

    def check(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> dict[str, np.ndarray]:
        """The same, asked twice.

        Raises:
            UserError: as above; the second answer is another.
        """
        first, second = self(prompts, completions), self(prompts, completions)
        for name, found in first.items():
            if (found != second[name]).any():
                at = int(np.flatnonzero(found != second[name])[0])
                raise UserError(
                    f"--reward {name}: {found[at].item()} and then {second[name][at].item()} for the same completion: "
                    "expected a function of prompt, completion and columns alone"
                )
        return first

    def total(self, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum (B,) float64."""
        values = [weight * found[name] for name, weight in zip(self.rewards, self.weights, strict=True)]
        return np.sum(values, axis=0)

    def close(self) -> None:
        """Ends the process of the functions."""
        self._process.close()


def _is_path(name: str) -> bool:
    return name.endswith(".py") or Path(name).is_dir()


def _exact(asked: Asked) -> list[float]:
    answers = asked.column(_ANSWERS, "exact")
    pairs = zip(asked.completions, answers, strict=True)
    return [float(text.strip() == answer.strip()) for text, answer in pairs]


class _Regex:
    """A pattern, searched for in the process that has a time limit: some take years."""

    def __init__(self, pattern: str, process: Process, seconds: float):
        self._pattern, self._process, self._seconds = pattern, process, seconds
        if pattern:
            _compiled(pattern, "--reward regex")

    def __call__(self, asked: Asked) -> list[float]:
        patterns = (
            [self._pattern] * len(asked.prompts) if self._pattern else asked.column(("pattern", "regex"), "regex")
        )
        for each, pattern in zip(asked.prompts, patterns, strict=True):
            _compiled(pattern, each.where)
        request = {"path": str(Path(__file__).with_name("patterns.py")), "function": "search"}
        request |= {"prompts": patterns, "completions": list(asked.completions), "columns": {}}
        return self._process.ask(request, self._seconds, "--reward regex")["rewards"]


def _compiled(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: pattern {pattern!r}: {error}") from None


def _tests(asked: Asked) -> list[float]:
    tests = asked.column(("tests", "test"), "tests")
    before = [str(each.columns.get(_PROGRAM, "")) for each in asked.prompts]
    pieces = zip(before, asked.completions, tests, strict=True)
    ended = limited.run_all([f"{first}{text}\n\n{test}\n" for first, text, test in pieces])
    return [float(each.passed) for each in ended]


def deviation(values: np.ndarray) -> float:
    """The standard deviation with ddof 1; 0 of a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def advantages(rewards: np.ndarray, method: str, scale: str) -> np.ndarray:
    """What each completion is better than its group by, (B,) float64 of ``rewards`` (P, G), a group a prompt.

    Less the group's mean, or for rloo the mean of the others; divided by 1e-4 and the deviation (ddof 1) of the group
    or the batch. Equal rewards give exactly 0.
    """
    groups = rewards.shape[1]
    if method == "rloo":
        made = rewards - (rewards.sum(axis=1, keepdims=True) - rewards) / (groups - 1)
    else:
        made = rewards - rewards.mean(axis=1, keepdims=True)
    made = np.where(rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True), 0.0, made)
    if scale == "group":
        made = made / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    elif scale == "batch" and method == "rloo":
        made = (made - made.mean()) / (deviation(made.ravel()) + 1e-4)
    elif scale == "batch":
        made = made / (deviation(rewards.ravel()) + 1e-4)
    assert not math.isnan(float(made.sum()))
    return made.ravel()
