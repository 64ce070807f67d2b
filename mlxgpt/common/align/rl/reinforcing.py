"""Reinforcement learning as a kind of training: an adapter or a whole model, on what its own completions earn."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import backend as backends
from mlxgpt.common.align import reference
from mlxgpt.common.align.rl import prompts as prompt_files
from mlxgpt.common.align.rl import rollouts, settings, writing
from mlxgpt.common.align.rl.rewards import Rewards
from mlxgpt.common.align.rl.source import RolloutSource
from mlxgpt.common.batch import Engine
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters, tensors
from mlxgpt.common.model import adapters
from mlxgpt.common.recipes import apply_sets
from mlxgpt.common.runs.checkpoint import Checkpoint, RunState
from mlxgpt.common.sft.finetune import Finetuning
from mlxgpt.common.tokenizers.load import load_last, load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.train.job import Job, Weights
from mlxgpt.common.train.made import name_of


class Reinforcing(Finetuning):
    """See job.Kind. ``args``: those of the verb rl (mlxgpt/arguments/training.py)."""

    verb = "rl"
    begin_only = ("out", "adapter", "config", "method", "lr", "replay", "check")
    source: Any  # a RolloutSource, where Finetuning has examples
    _reference: dict[str, np.ndarray] | None = None  # what trains, as the run began; with rl.kl
    _run: Path | None = None  # of a resumed one, where the reference lies
    _rewards: Rewards | None = None

    def read_settings(self) -> tuple[Path | None, str]:
        """The defaults with --config, flags and --set."""
        self._chosen = settings.gather(self.args)
        self.recipe = settings.recipe(self._chosen.sections, self._chosen.where)
        assert self.recipe.tune and self.recipe.rl
        if not self.recipe.rl.rewards and not self.recipe.rl.replay:
            raise UserError("expected --reward: FILE.py, a reward model's folder, exact, regex, length:N or tests")
        name = f"{name_of(self.recipe.tune.source)}-{self.recipe.rl.method}"
        return Path(self._chosen.out) if self._chosen.out else None, name

    def open_model(self) -> None:
        """The model, which must write texts, and the adapter that is trained on."""
        super().open_model()
        base_and_adapters.expect_task(self.recipe.model, str(self._base))

    def open_source(self) -> None:
        """The prompts and the rewards."""
        self.source = self._open(self._spelled())
        assert self.recipe.tune and self.recipe.rl
        longest = max(len(row.ids) for row in self.source.prompts.rows) + self.recipe.rl.max_tokens
        tune = dataclasses.replace(self.recipe.tune, block_size=min(longest, self.recipe.model.block_size))
        self.recipe = self.source.recipe = dataclasses.replace(self.recipe, tune=tune)
        self._check_replay()

    def _spelled(self) -> Tokenizer:
        given = self._given_tokenizer()
        found = load_last([self._base, given]) if given else load_tokenizer(self._base)
        tokenizer = base_and_adapters.expect_tokenizer(found, str(self._base))
        tokenizer.ends |= set(self._earlier) - {tokenizer.eos_id}
        return tokenizer

    def _open(self, tokenizer: Tokenizer) -> RolloutSource:
        recipe = self.recipe
        assert recipe.rl and recipe.tune
        config = recipe.rl
        found = prompt_files.read(recipe.tune, tokenizer, recipe.model, config.raw, config.max_tokens)
        prompt_files.add_ends(tokenizer, found, config.raw)
        if tokenizer.eos_id is None and not tokenizer.ends:
            print("the tokenizer has no token that ends a text: completions end at rl.max_tokens alone")
        digest = found.digest | {"tokenizer": tokenizer.digest} | settings.digests(config.rewards)
        if config.replay:
            place = rollouts.path_of(config.replay)
            digest["replay"] = hashlib.sha256(place.read_bytes()).hexdigest()
        else:
            backend = backends.load(self.args.backend)
            self._rewards = writing.open_rewards(backend, config, self.args.device, self.args.run_code)
        return RolloutSource(recipe, found, tokenizer, self._rewards, digest)

    def _check_replay(self) -> None:
        """Refuses rollouts that are not this run's, before anything is written."""
        config, needed = self.recipe.rl, self.recipe.train.steps
        if not config or not config.replay:
            return
        count = sum(1 for _ in rollouts.read(rollouts.path_of(config.replay)))
        if count * config.updates < needed:
            raise UserError(
                f"rl.replay = {config.replay}: {count} rollouts, of {config.updates} updates each: expected at most "
                f"train.steps = {count * config.updates}"
            )

    def read_stored(self, run: Path, stored: dict[str, Any]) -> None:
        """The run's recipe with --set; --model, --prompts and --reward say where things are now."""
        flags = {"tune.model": self.args.model, "tune.source": self.args.prompts, "train.steps": self.args.steps}
        sets = [f"{key}={value}" for key, value in flags.items() if value is not None]
        sections = apply_sets(stored, sets + self.args.set)
        if self.args.reward:
            sections["rl"]["rewards"] = list(self.args.reward)
        self.recipe = settings.recipe(sections, str(run / "recipe.toml"))

    def reopen_source(self, run: Path, newest: Checkpoint | None) -> None:
        """Prompts, rewards and the reference."""
        if self.recipe.rl and self.recipe.rl.kl and newest:
            reference.check(run, newest[1].data.get(reference.DIGEST, ""))
            self._reference, self._run = tensors.read_tensors(run / reference.FILE), run
        super().reopen_source(run, newest)

    def _open_examples(self, tokenizer: Any, config: Any, labels: tuple[str, ...]) -> None:
        self.source = self._open(self._spelled())

    def weights(self, place: Path | None) -> Weights:
        """Those of Finetuning; what trains of them is the reference of a new run."""
        found = super().weights(place)
        if place is None and self.recipe.rl and self.recipe.rl.kl:
            names = adapters.trainable(self.recipe)
            self._reference = {name: np.array(found[name], np.float32) for name in names}
        self.source.reference = self._reference
        return found

    def digests(self) -> dict[str, str]:
        """In a resumed run also of the reference, which a new one adds when it is written."""
        more = {reference.DIGEST: reference.digest(self._run)} if self._run else {}
        return super().digests() | more

    def set_first_state(self, engine: Engine, state: RunState) -> None:
        """Draws the first rollout and rewards it: what is wrong with rewards is found before a folder is made."""
        self.source.attach(engine, backends.load(self.args.backend))
        found = self.source.first()
        print(f"first rollout: {_shown(found.figures)}")

    def begun(self, job: Job) -> None:
        """Keeps the reference, and gives the source the engine."""
        assert self.recipe.rl
        if self._reference and not self._run:
            reference.write(job.run, self._reference)
            job.state.data[reference.DIGEST] = reference.digest(job.run)
        self.source.attach(job.engine, job.backend)
        self.source.begin(job.run, job.progress.say, job.progress.status, job.state.step)
        self._say = job.progress.say
        if self.recipe.train.compute_dtype == "bfloat16":
            job.progress.say("bfloat16: that MLX and PyTorch draw the same tokens is not promised")

    def figures(self, step: int, sums: dict[str, float]) -> dict[str, float]:
        """Rewards and lengths of the rollout, ratios and divergence of the update, and the time that drawing took."""
        found = self.source.told(sums)
        if step % self.recipe.train.log_every == 0:
            self._say(f"step {step}: {_shown(found)}")
        return found

    def sample(self, job: Job) -> str | None:
        """The last rollout's best completion."""
        return self.source.text()

    def finish(self, job: Job) -> None:
        """How much of the time drawing took, and how many completions differ from replayed ones."""
        assert self.recipe.rl
        if self.source.spent:
            job.progress.say(f"generation: {self.source.drawing / self.source.spent:.0%} of the time of the steps")
        if self.recipe.rl.check:
            job.progress.say(f"completions that differ from the replayed ones: {self.source.differ:,}")

    def close(self) -> None:
        """Ends the process of the reward functions."""
        if self._rewards:
            self._rewards.close()


def _shown(figures: dict[str, float]) -> str:
    ended = 1 - figures["completions/clipped_ratio"]
    made = f"reward {figures['reward']:.4f} (deviation {figures['reward_std']:.3f})"
    made += f", length {figures['completions/mean_length']:.1f}, {ended:.0%} ended"
    return made + (f", kl {figures['kl']:.3g}" if "kl" in figures else "")
