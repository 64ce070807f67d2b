"""Fine-tuning as a kind of training: an adapter or a whole model, on examples."""

import dataclasses
import functools
import json
import shlex
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.folders.adapter import Adapter
from mlxgpt.common.model import adapters, families
from mlxgpt.common.recipes import apply_sets
from mlxgpt.common.runs.checkpoint import Checkpoint
from mlxgpt.common.scores import text_metrics
from mlxgpt.common.sft import answers, settings
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft import weights as sft_weights
from mlxgpt.common.sft.answers import Answers
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.ends import generation_ends, union
from mlxgpt.common.tokenizers.load import has_tokenizer, load_last, load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.train.job import Job, Kind, Weights
from mlxgpt.common.train.made import name_of

_BASE = "base model"  # among the digests


class Finetuning(Kind[SftSource]):
    """See job.Kind. ``args``: those of the verb finetune (mlxgpt/arguments/training.py)."""

    verb = "finetune"
    begin_only = ("out", "adapter", "config", "method", "task", "epochs", "train_on_prompt", "lr", "batch_size", "rank")
    source: SftSource
    _base: Path  # the base model's folder
    _adapter: Adapter | None = None  # the one that a new run trains on
    _earlier: tuple[int, ...] = ()  # what ends a text by the adapter that is trained on
    _frozen: Weights  # of the adapter, what does not train: PiSSA's start

    def __init__(self, args: Namespace):
        self.args = args

    @property
    def _whole(self) -> bool:
        """Whether every weight trains, not an adapter."""
        assert self.recipe.adapter
        return self.recipe.adapter.method == "full"

    def read_settings(self) -> tuple[Path | None, str]:
        """The shipped recipe with --config, flags and --set."""
        self._chosen = settings.gather(self.args)
        self.recipe = settings.recipe(self._chosen.sections, self._chosen.where)
        assert self.recipe.tune and self.recipe.adapter
        name = f"{name_of(self._chosen.sections['tune']['source'])}-{self.recipe.adapter.method}"
        return Path(self._chosen.out) if self._chosen.out else None, name

    def open_model(self) -> None:
        """The base model, and the adapter that is trained on."""
        chosen, recipe = self._chosen, self.recipe
        assert recipe.tune
        text_metrics.check_packages(recipe.tune.metrics)
        self._base, given = sft_weights.locate(recipe)
        config = model_folder.read_config(self._base)
        _check_head(config, recipe.tune.task, self._base)
        recipe = settings.with_layers(dataclasses.replace(recipe, model=config), chosen, config)
        self.recipe, self._adapter = sft_weights.with_adapter(recipe, chosen, self._base, given, self.args.force)
        self._earlier = tuple(generation_ends(given)) if given else ()
        assert self.recipe.adapter
        adapters.targets(
            self.recipe.model, self.recipe.adapter
        )  # what matches nothing is refused before examples are read
        for line in [*model_folder.notes(self._base), *(f"{chosen.where}: {note}" for note in chosen.notes)]:
            print(line)

    def open_source(self) -> None:
        """The examples; steps, labels and new tokens follow from them."""
        self._open_examples(self._tokenizer(), self.recipe.model, self.recipe.model.labels)
        recipe = answers.for_splits(settings.with_length(self.recipe, self._chosen, self.source), self.source)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, labels=self.source.labels))
        self.recipe = _with_new_tokens(recipe, self.source)
        if not self._whole:
            tied = model_folder.read_config(self._base).tied
            limits = adapter_folder.limits(self.recipe, apart=tied and not self.recipe.model.tied)
            for line in limits or self._unknown_to_mlx_lm():
                print(line)

    def _unknown_to_mlx_lm(self) -> list[str]:
        """A line where mlx-lm would not end an answer: it reads no ends from an adapter's folder."""
        tokenizer = self.source.tokenizer
        bases = load_last([self._base])
        known = union(generation_ends(self._base), [bases.eos_id if bases else None])
        new = [end for end in union([tokenizer.eos_id], sorted(tokenizer.ends)) if end not in known]
        if self.source.labels or not new:
            return []
        flags = " ".join(f"--extra-eos-token '{tokenizer.decode([end])}'" for end in new)
        return [f"mlx-lm reads what ends an answer from the model's folder only: {flags} with the adapter, or fuse it"]

    def read_stored(self, run: Path, stored: dict[str, Any]) -> None:
        """The run's recipe with --set; --model and --data say where base and examples are now."""
        flags = {"tune.model": self.args.model, "tune.source": self.args.data, "train.steps": self.args.steps}
        sets = [f"{key}={value}" for key, value in flags.items() if value is not None]
        self.recipe = settings.recipe(apply_sets(stored, sets + self.args.set), str(run / "recipe.toml"))

    def reopen_source(self, run: Path, newest: Checkpoint | None) -> None:
        """The examples, and the base model, which must be the one that the run began on."""
        assert newest
        place, state = newest
        self._base = place if self._whole else sft_weights.locate(self.recipe)[0]
        self._earlier = tuple(generation_ends(place))
        config = self.recipe.model if self._whole else model_folder.read_config(self._base)
        self._open_examples(self._tokenizer(), config, self.recipe.model.labels)
        before, after = state.data.get(_BASE), self.digests().get(_BASE)
        if before != after:
            raise UserError(
                f"{self._base}: sha256 {after}: the run began on a model with {before}; --model names another place"
            )

    def _tokenizer(self) -> Tokenizer | None:
        """The base's, or the one of the adapter that the run began on."""
        given = self._given_tokenizer()
        return load_last([self._base, given]) if given else load_tokenizer(self._base)

    def _given_tokenizer(self) -> Path | None:
        """The adapter that the run began on, if it has a tokenizer of its own."""
        assert self.recipe.tune
        given = None if self._whole or not self.recipe.tune.adapter else Path(self.recipe.tune.adapter)
        return given if given and has_tokenizer(given) else None

    def _open_examples(self, tokenizer: Any, config: ModelConfig, labels: tuple[str, ...]) -> None:
        assert self.recipe.tune
        tokenizer.ends |= set(self._earlier) - {tokenizer.eos_id}
        self.source = sft_source.open_source(self.recipe.tune, self.recipe.train, tokenizer, config, print, labels)

    @property
    def seeded(self) -> bool:
        """Never: they come from the base model."""
        return False

    def weights(self, place: Path | None) -> Weights:
        """The base model's, and those of the adapter."""
        base = sft_weights.base_weights(self._base, self.recipe)
        adapter = self._adapter
        if place and not self._whole:
            adapter = adapter_folder.read_adapter(place, self._base, self.recipe.model)
        own = sft_weights.adapter_weights(self.recipe, base, adapter)
        self._frozen = {name: array for name, array in own.items() if name.rpartition(".")[2].startswith("start_")}
        return base | own

    @functools.cached_property
    def _base_sha256(self) -> str:
        return adapter_folder.base_sha256(self._base)

    def digests(self) -> dict[str, str]:
        """The examples, their order and packing, and the weights that stay."""
        return self.source.digest if self._whole else self.source.digest | {_BASE: self._base_sha256}

    @property
    def spells(self) -> Tokenizer | None:
        """The examples' tokenizer."""
        return self.source.tokenizer

    def describe_source(self) -> dict[str, Any]:
        """Counts of examples and tokens."""
        return self.source.describe()

    def write_weights(self, place: Path, trained: dict[str, np.ndarray]) -> None:
        """A model folder where every weight trains, else an adapter, with a tokenizer that is not the base's."""
        recipe, tokenizer = self.recipe, self.source.tokenizer
        assert recipe.tune
        ends = union(generation_ends(self._base), self._earlier, [tokenizer.eos_id], sorted(tokenizer.ends))
        ends = [] if recipe.model.labels else ends
        if self._whole:
            model_folder.write_model(place, recipe.model, trained, tokenizer=tokenizer, ends=ends)
            return
        hub_id = None if Path(recipe.tune.model).exists() else recipe.tune.model
        bases = load_last([self._base])
        own = tokenizer if bases is None or tokenizer.files != bases.files else None
        adapter_folder.write_adapter(place, recipe, self._base, {**trained, **self._frozen}, own, hub_id, ends)

    def sample(self, job: Job) -> Mapping[str, str] | str | None:
        """A question and the model's answer."""
        assert self.recipe.tune
        wanted = self.recipe.sample.max_tokens and self.recipe.tune.task == "lm"
        return Answers(job, self.source).sample() if wanted else None

    def score(self, job: Job, total: dict[str, float]) -> dict[str, float]:
        """Accuracy and macro F1 of a classifier; else tune.metrics of answers to the first validation examples."""
        job.progress.status("answering")
        return Answers(job, self.source).score("valid", total)

    def trial(self, run: Path) -> str:
        """Texts are given as they were in training: to classify, in the template, or as they are."""
        source, place = self.source, shlex.quote(str(run))
        if source.labels:
            return f"classify --model {place} --text TEXT"
        if source.template:
            kwargs = source.template.kwargs
            more = f" --template-kwargs {shlex.quote(json.dumps(kwargs))}" if kwargs else ""
            return f"generate --model {place}{more} --prompt TEXT, or mlxgpt chat --model {place}{more}"
        return f"generate --model {place} {'--raw ' if source.tokenizer.templates else ''}--prompt TEXT"

    def finish(self, job: Job) -> None:
        """The test split, and a classifier's confusion."""
        Answers(job, self.source).finish()


def _check_head(config: ModelConfig, task: str, base: Path) -> None:
    """Refuses a base whose head is another task's.

    Raises:
        UserError: it is.
    """
    fits = {"classify": not config.scores, "reward": config.scores}.get(task, False)
    if config.labels and not fits:
        expected = {"classify": "a language model or a classifier", "reward": "a language model or a reward model"}
        raise UserError(f"{base}: {config.kind}: expected {expected.get(task, 'a language model')} for --task {task}")


def _with_new_tokens(recipe: Recipe, source: SftSource) -> Recipe:
    """The recipe for a tokenizer that was given more tokens: embedding and head grow, and train whole."""
    assert recipe.adapter
    if recipe.model.labels and not source.added and source.tokenizer.n_vocab > recipe.model.vocab_size:
        print(f"embedding: {recipe.model.vocab_size:,} rows become {source.tokenizer.n_vocab:,}: a token that pads")
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=source.tokenizer.n_vocab))
    if not source.added:
        return recipe
    old, model, adapter = recipe.model.vocab_size, recipe.model, recipe.adapter
    if source.tokenizer.n_vocab > old:
        model = dataclasses.replace(model, vocab_size=source.tokenizer.n_vocab)
        families.config_to_hf(model)
        print(f"embedding: {old:,} rows become {model.vocab_size:,}; the new ones start as the mean of the others")
    if adapter.method != "full":
        names = ("wte",) if model.tied or model.labels else ("wte", "lm_head")
        adapter = dataclasses.replace(adapter, train=tuple(dict.fromkeys([*adapter.train, *names])))
        print(f"{' and '.join(names)} train whole, for the new tokens")
    return dataclasses.replace(recipe, model=model, adapter=adapter)
