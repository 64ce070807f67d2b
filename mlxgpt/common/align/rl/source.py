"""Rollouts as a source of batches: the policy that trains draws them, in the one loop that trains everything.

A rollout is rl.prompts x rl.completions completions; its rl.updates batches are the same rows. All of it follows from
(train.seed, the rollout's number) and the weights at its beginning. B rows, T tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.align.rl import draw, figures, rewards, rollouts
from mlxgpt.common.align.rl.prompts import Prompt, Prompts
from mlxgpt.common.align.rl.rewards import Rewards
from mlxgpt.common.align.rl.rollouts import Line
from mlxgpt.common.backend import Backend
from mlxgpt.common.batch import Batch, Engine
from mlxgpt.common.config import Recipe, SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.model import rotary
from mlxgpt.common.sft import pack
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.sft.template import Template
from mlxgpt.common.tokenizers.protocol import Tokenizer


@dataclass
class Rollout:
    """What was drawn, and the batch of each of its updates."""

    number: int  # from 0
    lines: list[Line]
    batch: Batch
    figures: dict[str, float]  # by trl's names
    written: bool = False


@dataclass
class RolloutSource:
    """See batch.Source. ``attach`` gives it the engine whose policy draws."""

    recipe: Recipe
    prompts: Prompts
    tokenizer: Tokenizer
    rewards: Rewards | None  # None: those of rl.replay
    digest: dict[str, str]
    labels: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    reference: Mapping[str, np.ndarray] | None = None  # what trains, as the run began; with rl.kl
    drawing: float = 0.0  # seconds in which completions were drawn
    spent: float = 0.0  # seconds of whole steps
    differ: int = 0  # rl.check: completions that differ from the replayed ones
    _engine: Engine | None = None
    _backend: Backend | None = None
    _say: Callable[[str], None] = print
    _status: Callable[[str], None] = lambda text: None
    _held: Rollout | None = None
    _replay: Iterator[list[Line]] | None = None
    _replayed: int = 0
    _began: tuple[float, float] = (0.0, 0.0)  # when the step began, and ``drawing`` then
    _run: Any = field(default=None, repr=False)

    @property
    def template(self) -> Template | None:
        """The chat template that asks."""
        return None if self._config.raw else self.prompts.template

    @property
    def _config(self) -> Any:
        assert self.recipe.rl
        return self.recipe.rl

    def attach(self, engine: Engine, backend: Backend) -> None:
        """The engine whose policy draws."""
        self._engine, self._backend = engine, backend

    def begin(self, run: Any, say: Callable[[str], None], status: Callable[[str], None], step: int) -> None:
        """The run whose rollouts.jsonl is written; what it has after ``step`` is dropped."""
        self._run, self._say, self._status, self.drawing = run, say, status, 0.0
        left = rollouts.cut(run, step)
        if step % self._config.updates:
            number = (step - 1) // self._config.updates
            if not left or left[0].step != number * self._config.updates + 1:
                raise UserError(
                    f"{run / rollouts.FILE}: the rollout of step {step} is not there, which the run goes on with"
                )
            self._held = self._made(number, left)
            self._held.written = True

    def first(self) -> Rollout:
        """The first rollout, before anything is written; its rewards are asked for twice.

        Raises:
            UserError: rewards that cannot be used, or nothing to learn from because no completion ended.
        """
        self._held = self._begun(0)
        config = self._config
        if not any(line.ended for line in self._held.lines):
            what = f"no completion of the first rollout ended within rl.max_tokens = {config.max_tokens}"
            if config.mask_truncated:
                raise UserError(
                    f"{what}, and rl.mask_truncated leaves those out: expected a larger rl.max_tokens, or a model that "
                    "was trained to end its answers"
                )
            self._say(f"{what}: what they were rewarded with is learned, to end is not")
        return self._held

    def batch(self, step: int) -> Batch:
        """The global batch of ``step`` (from 1); draws a rollout where the step begins one.

        Raises:
            RunError: a reward, or the file of rl.replay, is not as expected.
        """
        self._began = time.perf_counter(), self.drawing
        number = (step - 1) // self._config.updates
        try:
            if self._held is None or self._held.number != number:
                self._held = self._begun(number)
        except UserError as error:
            raise RunError(f"step {step}: {error}") from None
        if not self._held.written:
            rollouts.append(self._run, self._held.lines)
            self._held.written = True
        return self._held.batch

    def validation(self) -> Iterator[Batch]:
        """None: rewards are what counts."""
        return iter(())

    def _begun(self, number: int) -> Rollout:
        """Rollout ``number``: drawn or replayed, rewarded, and made a batch."""
        config, seed = self._config, self.recipe.train.seed
        rows = self.prompts.of_rollout(number, config.prompts, seed)
        asked = [self.prompts.rows[row] for row in rows for _ in range(config.completions)]
        step = number * config.updates + 1
        if config.replay:
            lines = self._next(number, rows)
            if config.check:
                self._compare(number, step, rows, lines)
            found = {name: np.array([line.rewards[name] for line in lines]) for name in lines[0].rewards}
            total = np.array([line.reward for line in lines])
        else:
            drawn = self._drawn(number, rows)
            texts = [each.text for each in drawn]
            assert self.rewards
            self._status("rewards")
            found = (self.rewards.check if number == 0 else self.rewards)(asked, texts)
            total = self.rewards.total(found)
            lines = [
                Line(step, row, prompt.digest, list(each.ids), each.ended, each.text, {}, 0.0, 0.0)
                for row, prompt, each in zip(np.repeat(rows, config.completions).tolist(), asked, drawn, strict=True)
            ]
        self._status("")
        batch, more = self._tokens(lines), {}
        logps = None
        if config.updates > 1 or (config.method == "rloo" and config.kl):
            logps = self._logps(batch)
        learned = total
        if config.method == "rloo" and config.kl:
            assert logps is not None
            apart = np.where(batch.weights > 0, logps - self._reference(batch), 0.0).astype(np.float64)
            learned = total - config.kl * apart.sum(axis=1)
            more["kl"] = float(apart.sum() / max(1, np.count_nonzero(batch.weights)))
        better = rewards.advantages(learned.reshape(-1, config.completions), config.method, config.scaled)
        keep = logps is not None and config.updates > 1
        lines = [
            replace(
                line,
                step=step,
                rewards={name: float(values[at]) for name, values in found.items()},
                reward=float(total[at]),
                advantage=float(better[at]),
                old=logps[at][batch.weights[at] > 0].tolist() if keep and logps is not None else [],
            )
            for at, line in enumerate(lines)
        ]
        made = self._made(number, lines)
        made.figures |= more
        return made

    def _made(self, number: int, lines: list[Line]) -> Rollout:
        """A rollout of its lines alone, and of the reference."""
        config, batch = self._config, self._tokens(lines)
        drawn = batch.weights > 0
        better = np.array([line.advantage for line in lines], np.float32)
        beside = {"advantages": better}
        if config.updates > 1:
            beside["old"] = np.zeros(batch.tokens.shape, np.float32)
            for at, line in enumerate(lines):
                beside["old"][at, drawn[at]] = line.old
        if config.kl and config.method != "rloo":
            beside["reference"] = self._reference(batch)
        counted = np.array([line.ended or not config.mask_truncated for line in lines])
        mask = np.where(counted[:, None], batch.weights, 0).astype(np.float32)
        idle = ""
        if not mask.any():
            idle = "no completion ended"
        elif not better[counted].any() and (not config.kl or not self._engine or not self._engine.t):
            idle = "equal rewards in every group"  # nor has the policy moved away from the reference
        made = replace(batch, weights=figures.weights(mask, config), beside=beside, each=1.0, idle=idle)
        return Rollout(number, lines, made, figures.of_rollout(lines, config.completions))

    def _tokens(self, lines: Sequence[Line]) -> Batch:
        """The rows, weights 1 where a token of a completion is the target."""
        examples = []
        for line in lines:
            prompt = self.prompts.rows[line.prompt]
            ids = np.array([*prompt.ids, *line.ids], np.int32)
            weights = np.zeros(len(ids) - 1, np.float32)
            weights[len(prompt.ids) - 1 :] = 1
            examples.append(Example(prompt.where, ids[:-1], ids[1:], weights))
        config = self.recipe.model
        plan = [(at,) for at in range(len(examples))]
        return pack.padded_batch(examples, plan, config.block_size, rotary.by_length(config))

    def _logps(self, batch: Batch) -> np.ndarray:
        """Log-probabilities (B, T) float32 of the targets by the policy as it is."""
        assert self._engine
        pieces = batch.split(self.recipe.train.micro_batch_size)
        return -np.concatenate([self._engine.token_losses(piece) for piece in pieces])

    def _reference(self, batch: Batch) -> np.ndarray:
        """The same by the run as it began: its tensors take the places of those that train for the time of it."""
        assert self._engine and self.reference is not None
        now = self._engine.snapshot()
        try:
            self._engine.load_state({**now, "params": dict(self.reference)})
            return self._logps(batch)
        finally:
            self._engine.load_state(now)

    def sampling(self, number: int) -> SampleConfig:
        """How the completions of a rollout are drawn."""
        return draw.settings(self._config, rng.key32(self.recipe.train.seed, "rollout", number))

    def _drawn(self, number: int, rows: Sequence[int]) -> list[draw.Drawn]:
        assert self._engine and self._backend
        began, config = time.perf_counter(), self._config
        prompts = [self.prompts.rows[row].ids for row in rows]
        groups = max(1, self.recipe.train.micro_batch_size // config.completions) if _micro(self.recipe) else 0
        made = draw.draw(
            self._backend, self._engine.model, self.tokenizer, prompts, config.completions, self.sampling(number),
            groups, self._status,
        )  # fmt: skip
        self.drawing += time.perf_counter() - began
        return made

    def _next(self, number: int, rows: Sequence[int]) -> list[Line]:
        """The rollout of rl.replay with this number."""
        if self._replay is None or self._replayed > number:
            self._replay, self._replayed = rollouts.read(rollouts.path_of(self._config.replay)), 0
        found: list[Line] | None = None
        while self._replayed <= number:
            found, self._replayed = next(self._replay, None), self._replayed + 1
        where = f"rl.replay = {self._config.replay}"
        if found is None:
            raise UserError(f"{where}: ends before rollout {number + 1}: expected a run as long as this one")
        wanted = [(row, self.prompts.rows[row].digest) for row in rows for _ in range(self._config.completions)]
        if [(line.prompt, line.sha256) for line in found] != wanted:
            raise UserError(
                f"{where}: rollout {number + 1} is of other prompts than this run asks: expected the same file of "
                "prompts, train.seed, rl.prompts and rl.completions, and the same tokenizer"
            )
        return found

    def _compare(self, number: int, step: int, rows: Sequence[int], lines: Sequence[Line]) -> None:
        """Draws as well, and says once where the first token differs, and by how much."""
        ours = self._drawn(number, rows)
        apart = sum(list(one.ids) != other.ids for one, other in zip(ours, lines, strict=True))
        if apart and not self.differ:
            at = rollouts.first_difference([each.ids for each in ours], [line.ids for line in lines])
            assert at
            self._say(self._told(number, step, ours[at[0]].ids, lines[at[0]], *at))
        self.differ += apart

    def _told(self, number: int, step: int, ours: Sequence[int], line: Line, row: int, token: int) -> str:
        """Where a completion differs from the replayed one, and the gap of the two noisy logits here."""
        what = f"step {step}: row {row + 1} differs from the replayed one from token {token + 1} on"
        if token >= min(len(ours), len(line.ids)):
            return f"{what}: one ended there"
        pair = ours[token], line.ids[token]
        start = (*self.prompts.rows[line.prompt].ids, *line.ids[:token])
        ones, before = np.ones(len(start), np.float32), np.array(start, np.int32)
        rows = [Example("", before, np.array([*start[1:], each], np.int32), ones) for each in pair]
        placed = rotary.by_length(self.recipe.model)
        logps = self._logps(pack.padded_batch(rows, [(0,), (1,)], self.recipe.model.block_size, placed))
        copies = draw.copies([self.prompts.rows[each].ids for each in self._rows(number)], self._config.completions)
        copy = [each for group in copies for each in group][row]
        noise = draw.noise(self.sampling(number).seed, copy, token, max(pair) + 1)
        gap = float(logps[0, len(start) - 1] - logps[1, len(start) - 1]) + float(noise[pair[0]] - noise[pair[1]])
        return f"{what}: {pair[0]} here, {pair[1]} there; the noisy logits of the two stand {gap:.2g} apart here"

    def _rows(self, number: int) -> list[int]:
        return self.prompts.of_rollout(number, self._config.prompts, self.recipe.train.seed)

    def told(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of an update: of its rollout, and of what the objective added up."""
        assert self._held
        batch, made = self._held.batch, dict(self._held.figures)
        made |= figures.of_update(sums, batch, self._config.method)
        whole = time.perf_counter() - self._began[0]
        made["generation/share"] = round((self.drawing - self._began[1]) / whole, 4) if whole else 0.0
        self.spent += whole
        return made

    def text(self) -> str | None:
        """The completion of the last rollout that was rewarded most, behind its prompt."""
        if self._held is None:
            return None
        best = max(self._held.lines, key=lambda line: line.reward)
        prompt: Prompt = self.prompts.rows[best.prompt]
        return f"{prompt.text}{'' if prompt.text[-1:].isspace() else ' '}{best.text}\n(reward {best.reward:g})"

    def describe(self) -> dict[str, Any]:
        """Counts, for environment.json."""
        return {"prompts": len(self.prompts.rows), "dropped": self.prompts.dropped}


def _micro(recipe: Recipe) -> bool:
    """Whether rows pass through the model in smaller batches, as a large rollout has to."""
    return 0 < recipe.train.micro_batch_size < recipe.train.batch_size
