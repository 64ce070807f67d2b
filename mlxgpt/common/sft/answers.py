"""Answers of the model that is being fine-tuned: a sample, scores on held-out examples, and the test at the end."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.scores import confusion, text_metrics
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.train.job import Job

ROWS = 8  # examples answered at once


class Answers:
    """Asks a job's model; greedy where answers are scored."""

    def __init__(self, job: Job, source: SftSource):
        assert job.recipe.tune
        self._job, self._source = job, source
        self._tune, self._sample = job.recipe.tune, job.recipe.sample

    def sample(self) -> str:
        """A question and the model's answer: sample.prompt, else the first validation example with its own answer."""
        tokenizer, prompt = self._source.tokenizer, _question(self._sample.prompt, self._source)
        try:
            result = self._generate([prompt], self._sample)[0]
        except RunError as error:
            return f"(none: {error})"
        told = f"{tokenizer.decode(prompt)}{result}"
        return told if self._sample.prompt else f"{told}\nreference: {self.reference(_first(self._source))}"

    def score(self, split: str, sums: dict[str, float]) -> dict[str, float]:
        """Of a classifier what the engine's ``sums`` tell; else tune.metrics over the split's first examples."""
        if self._source.labels:
            return confusion.figures(sums, len(self._source.labels))
        rows = self._source.rows(split)
        rows = rows[: self._tune.metric_rows or len(rows)]
        if not self._tune.metrics or not rows:
            return {}
        references = [self.reference(row) for row in rows]
        return text_metrics.score(self._tune.metrics, self.answer(rows), references)

    def answer(self, rows: Sequence[Example]) -> list[str]:
        """The model's greedy answer to each example, no longer than the longest reference."""
        longest = max(len(row.last_answer[1]) for row in rows)
        settings = dataclasses.replace(self._sample, temperature=0.0, max_tokens=longest)
        made: list[str] = []
        for start in range(0, len(rows), ROWS):
            made += self._generate([row.last_answer[0].tolist() for row in rows[start : start + ROWS]], settings)
        return made

    def _generate(self, prompts: list[list[int]], settings: Any) -> list[str]:
        generate = self._job.backend.generate.generate
        found = generate(self._job.engine.model, self._source.tokenizer, prompts, settings)
        return [result.text for result in found]

    def own(self, row: Example) -> str:
        """The model's answer to an example, as sample.* draws it."""
        try:
            return self._generate([row.prompt.tolist()], self._sample)[0]
        except RunError as error:
            return f"(none: {error})"

    def reference(self, row: Example) -> str:
        """The text of an example's last answer, without its end token."""
        tokenizer = self._source.tokenizer
        ids = row.last_answer[1].tolist()
        return tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.special else ids)

    def finish(self) -> None:
        """Scores the test split with the weights as they are; of a classifier also shows the validation confusion."""
        job, labels = self._job, self._source.labels
        if labels and self._source.rows("valid"):
            lines = confusion.lines(self.sums("valid"), labels)
            job.progress.say("\n".join([f"validation split at step {job.state.step}:", *lines]))
        if self._tune.test and self._source.rows("test"):
            self._test()

    def sums(self, split: str) -> dict[str, float]:
        """The engine's sums over a whole split."""
        total: dict[str, float] = {}
        for batch in self._source.split(split):
            for part in batch.split(self._job.recipe.train.micro_batch_size):
                for name, value in self._job.engine.evaluate(part).items():
                    total[name] = total.get(name, 0.0) + value
        return total

    def _test(self) -> None:
        """The test split, in metrics.jsonl and on screen."""
        job, total = self._job, self.sums("test")
        found = {"loss": total["loss"] / total["weight"]} | self.score("test", total)
        job.metrics.write(step=job.state.step, split="test", **found, targets=round(total["weight"]))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        job.progress.say(f"test split at step {job.state.step}: {shown}")
        if self._source.labels:
            job.progress.say("\n".join(confusion.lines(total, self._source.labels)))


def _first(source: SftSource) -> Example:
    """The first validation example, or training example where there is none."""
    return (source.rows("valid") or source.rows("train"))[0]


def _question(prompt: str, source: SftSource) -> list[int]:
    """The tokens of a question, rendered as in the examples; '' is the first validation (or training) example."""
    if not prompt:
        return _first(source).last_answer[0].tolist()
    if source.template:
        return source.template.encode([{"role": "user", "content": prompt}], generation=True)
    return beginning.start(source.tokenizer, prompt)


def for_splits(recipe: Recipe, source: SftSource) -> Recipe:
    """The recipe for the splits that exist: without validation examples nothing is validated.

    Raises:
        UserError: a setting needs validation examples or validations, or sample.prompt cannot be encoded.
    """
    assert recipe.tune
    tune, train = recipe.tune, recipe.train
    wanted = {"tune.metrics": tune.metrics, "train.early_stop": train.early_stop}
    wanted |= {"tune.keep_best": tune.keep_best} if tune.keep_best != "loss" else {}
    for key, value in wanted.items():
        if value and not source.rows("valid"):
            raise UserError(f"{key} = {value!r}: no validation examples: expected more examples, or a valid.jsonl")
        if value and not train.eval_every:
            raise UserError(f"{key} = {value!r}: expected train.eval_every, which is 0: nothing is ever validated")
    if recipe.sample.max_tokens and tune.task in ("lm", "prefer") and recipe.sample.prompt:
        try:
            count = len(_question(recipe.sample.prompt, source))
        except UserError as error:
            raise UserError(f"sample.prompt = {recipe.sample.prompt!r}: {error}") from None
        if not 0 < count <= recipe.model.block_size:
            raise UserError(
                f"sample.prompt = {recipe.sample.prompt!r}: {count} tokens; expected at most model.block_size = "
                f"{recipe.model.block_size}"
            )
    if source.rows("valid"):
        return recipe
    return dataclasses.replace(recipe, train=dataclasses.replace(train, eval_every=0))
