"""Rows that were held out, answered by the model while it is tuned: what is shown, scored, and tested at the end."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mlxgpt.common import confusion, tune_metrics
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.sft import SftSource
from mlxgpt.common.sft_pack import Example
from mlxgpt.common.trainer import Job

ROWS = 8  # answered at once


class Answers:
    """Asks the engine's model; greedy where answers are scored."""

    def __init__(self, backend: Backend, engine: Any, recipe: Recipe, source: SftSource):
        assert recipe.tune
        self._backend, self._engine, self._source = backend, engine, source
        self._tune, self._sample = recipe.tune, recipe.sample
        self._stop = [source.template.end] if source.template else []

    def sample(self) -> str:
        """A question and what the model answers to it: sample.prompt, else the first row that validates."""
        tokenizer = self._source.tokenizer
        if self._sample.prompt:
            template = self._source.template
            asked = [{"role": "user", "content": self._sample.prompt}]
            prompt = template.encode(asked, generation=True) if template else tokenizer.encode(self._sample.prompt)
        else:
            held = self._source.rows("valid") or self._source.rows("train")
            prompt = held[0].last_answer[0].tolist()
        try:
            result = self._generate([prompt], self._sample)[0]
        except RunError as error:
            return f"(none: {error})"
        return f"{tokenizer.decode(prompt)}{result}"

    def score(self, sums: dict[str, float]) -> dict[str, float]:
        """Of a classifier what the sums of a validation tell; else tune.metrics over the first rows that validate."""
        return self._scored("valid", sums)

    def _scored(self, split: str, sums: dict[str, float]) -> dict[str, float]:
        if self._source.labels:
            return confusion.figures(sums, len(self._source.labels))
        rows = self._source.rows(split)
        rows = rows[: self._tune.metric_rows or len(rows)]
        if not self._tune.metrics or not rows:
            return {}
        references = [self._reference(row) for row in rows]
        return tune_metrics.score(self._tune.metrics, self.answer(rows), references)

    def answer(self, rows: Sequence[Example]) -> list[str]:
        """The model's greedy answer to each row, no longer than the longest reference."""
        longest = max(len(row.last_answer[1]) for row in rows)
        settings = dataclasses.replace(self._sample, temperature=0.0, max_tokens=longest)
        made: list[str] = []
        for start in range(0, len(rows), ROWS):
            made += self._generate([row.last_answer[0].tolist() for row in rows[start : start + ROWS]], settings)
        return made

    def _generate(self, prompts: list[list[int]], settings: Any) -> list[str]:
        generate = self._backend.generate.generate
        found = generate(self._engine.model, self._source.tokenizer, prompts, settings, self._stop)
        return [result.text for result in found]

    def _reference(self, row: Example) -> str:
        """The text of a row's last answer, without the token that ends it."""
        tokenizer = self._source.tokenizer
        ids = row.last_answer[1].tolist()
        return tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.special else ids)

    def test(self, job: Job) -> None:
        """Scores the test split with the weights as they are, in metrics.jsonl and on screen."""
        total: dict[str, float] = {}
        for batch in self._source.split("test"):
            for part in batch.split(job.recipe.train.micro_batch_size):
                for name, value in self._engine.evaluate(part).items():
                    total[name] = total.get(name, 0.0) + value
        found = {"loss": total["loss"] / total["weight"]} | self._scored("test", total)
        job.metrics.write(step=job.state.step, split="test", **found, targets=round(total["weight"]))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        job.progress.say(f"test split at step {job.state.step}: {shown}")
        if self._source.labels:
            job.progress.say("\n".join(confusion.lines(total, self._source.labels)))


def check(recipe: Recipe, source: SftSource) -> Recipe:
    """The recipe for the splits that there are: without rows that validate nothing is validated.

    Raises:
        UserError: metrics, or early stopping, want rows that validate; or sample.prompt cannot be asked.
    """
    assert recipe.tune
    if not source.rows("valid"):
        for key, value in (("tune.metrics", recipe.tune.metrics), ("train.early_stop", recipe.train.early_stop)):
            if value:
                raise UserError(f"{key} = {value!r}: no rows to validate on: expected more rows, or a valid.jsonl")
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, eval_every=0))
    return recipe
