"""Training on preferences as a kind of training: fine-tuning whose examples are pairs, or judged answers."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxgpt.common import failures
from mlxgpt.common.align import reference
from mlxgpt.common.align import source as pair_source
from mlxgpt.common.align.source import PairSource
from mlxgpt.common.align_config import REFERENCE, PreferConfig
from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.runs.checkpoint import Checkpoint
from mlxgpt.common.sft.answers import Answers
from mlxgpt.common.sft.finetune import Finetuning
from mlxgpt.common.train.job import Job

KINDS = ("chosen", "rejected")
_PATIENCE = 30.0  # seconds between lines about a reference that takes long


class Preferring(Finetuning):
    """See job.Kind. ``args``: those of the verb finetune, whose tune.task is prefer."""

    _run: Path | None = None  # of a resumed run

    @property
    def pairs(self) -> PairSource:
        """The source."""
        assert isinstance(self.source, PairSource)
        return self.source

    @property
    def _prefer(self) -> PreferConfig:
        assert self.recipe.prefer
        return self.recipe.prefer

    def read_settings(self) -> tuple[Path | None, str]:
        """The shipped recipe with --config, flags and --set."""
        found = super().read_settings()
        assert self.recipe.tune
        check(self.recipe)
        if self._chosen.written.get("tune", {}).get("packing"):
            print("tune.packing: the rows of pairs are padded, not packed")
        self.recipe = dataclasses.replace(self.recipe, tune=dataclasses.replace(self.recipe.tune, packing=False))
        return found

    def open_source(self) -> None:
        """The preferences; steps and new tokens follow from them."""
        super().open_source()
        assert self.recipe.tune
        best, good = self.recipe.tune.keep_best, self.pairs.good["valid"]
        if self.pairs.single and best != "loss" and (best != "rewards/margins" or good.all() or not good.any()):
            raise UserError(
                f"tune.keep_best = {best!r}: expected loss, or rewards/margins where both good and bad answers "
                "validate: prefer.loss = kto compares no pairs"
            )

    def reopen_source(self, run: Path, newest: Checkpoint | None) -> None:
        """The preferences, the base model, and what the reference said of every answer."""
        super().reopen_source(run, newest)
        assert newest
        if self._prefer.loss in REFERENCE:
            reference.check(run, newest[1].data.get(reference.DIGEST, ""))
            self._run = run

    def _open_examples(self, tokenizer: Any, config: ModelConfig, labels: tuple[str, ...]) -> None:
        assert self.recipe.tune
        tokenizer.ends |= set(self._earlier) - {tokenizer.eos_id}
        self.source = pair_source.open_source(self.recipe.tune, self._prefer, self.recipe.train, tokenizer, config)

    def digests(self) -> dict[str, str]:
        """Those of fine-tuning; in a resumed run also the reference's, which a new one adds when it is measured."""
        more = {reference.DIGEST: reference.digest(self._run)} if self._run else {}
        return super().digests() | more

    def begun(self, job: Job) -> None:
        """Measures the reference before the first step, or reads what was measured then."""
        engine, micro = job.engine, self.recipe.train.micro_batch_size * self.pairs.together

        def ask(batch: Any) -> Any:
            return reference.logps(engine, batch, micro)

        self.pairs.policy = ask
        if self._prefer.loss in REFERENCE:
            if self._run is None:
                self._measure(job, ask)
            self.pairs.reference = reference.read(job.run, self.pairs)

    def _measure(self, job: Job, ask: Any) -> None:
        """Writes what the model says of every answer as the run begins."""
        began = said = time.perf_counter()

        def status(text: str) -> None:
            nonlocal said
            job.progress.status(text)
            if time.perf_counter() - said > _PATIENCE:
                job.progress.say(text)
                said = time.perf_counter()

        splits = tuple(name for name, examples in self.pairs.examples.items() if examples)
        with failures.doing("log-probabilities of the reference", failures.ADVICE[self.verb]):
            arrays = reference.measure(self.pairs, splits, ask, status)
        reference.write(job.run, arrays)
        job.state.data[reference.DIGEST] = reference.digest(job.run)
        job.progress.status("")
        for line in reference.told(arrays, began):
            job.progress.say(line)

    def figures(self, step: int, sums: dict[str, float]) -> dict[str, float]:
        """Metrics by trl's names."""
        return named(sums)

    def score(self, job: Job, total: dict[str, float]) -> dict[str, float]:
        """The same of a validation."""
        return named({name: value for name, value in total.items() if name != "loss"})

    def sample(self, job: Job) -> Mapping[str, str] | str | None:
        """A prompt, the answers that the data have, and the model's own."""
        sample = self.recipe.sample
        if not sample.max_tokens:
            return None
        answers = Answers(job, self.pairs)
        if sample.prompt:
            return answers.sample()
        split = "valid" if self.pairs.examples["valid"] else "train"
        items = self.pairs.examples[split][: self.pairs.together]
        judged = KINDS if not self.pairs.single else KINDS[:1] if self.pairs.good[split][0] else KINDS[1:]
        made = {"prompt": self.pairs.tokenizer.decode(items[0].prompt.tolist())}
        made |= {kind: answers.reference(item) for kind, item in zip(judged, items, strict=True)}
        return made | {"answer": answers.own(items[0])}

    def finish(self, job: Job) -> None:
        """The test split."""
        assert self.recipe.tune
        if not self.recipe.tune.test or not self.pairs.examples["test"]:
            return
        total = Answers(job, self.pairs).sums("test")
        found = {"loss": total["loss"] / total["weight"]} | self.score(job, total)
        job.metrics.write(step=job.state.step, split="test", **found, targets=round(total["weight"]))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        job.progress.say(f"test split at step {job.state.step}: {shown}")


def check(recipe: Recipe) -> None:
    """Refuses settings of the losses of tokens, and those of another task.

    Raises:
        UserError: one is set.
    """
    assert recipe.tune and recipe.prefer
    task = recipe.tune.task
    for each in dataclasses.fields(recipe.prefer):
        value = getattr(recipe.prefer, each.name)
        if value != each.default and (each.name == "center") != (task == "reward"):
            raise UserError(f"prefer.{each.name} = {value!r}: expected {each.default!r} where tune.task = {task}")
    for name in ("label_smoothing", "z_loss"):
        if value := getattr(recipe.train, name):
            cure = "; prefer.loss = cdpo has prefer.smoothing" if name == "label_smoothing" and task == "prefer" else ""
            raise UserError(f"train.{name} = {value}: of losses of tokens: expected 0 where tune.task = {task}{cure}")


def named(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of what the objective added up; of single answers those of their kind, left out where there is none."""
    if "count/chosen" not in sums:
        return {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}
    made: dict[str, float] = {}
    for figure in ("rewards", "logps"):
        for kind in KINDS:
            if count := sums[f"count/{kind}"]:
                made[f"{figure}/{kind}"] = sums[f"{figure}/{kind}"] / count
    if all(sums[f"count/{kind}"] for kind in KINDS):
        made["rewards/margins"] = made["rewards/chosen"] - made["rewards/rejected"]
    return made | {"kl": sums["kl"] / sums["weight"]}
