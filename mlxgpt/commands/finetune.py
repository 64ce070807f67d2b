"""The verb ``finetune``: like ``train``, but an adapter trains or a model that exists, and the data are rows."""

import dataclasses
import functools
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate import answers as tune_answers
from mlxgpt.common.evaluate import text_metrics
from mlxgpt.common.folders import adapter_folder, model_folder, resolve
from mlxgpt.common.folders.adapter_folder import Adapter
from mlxgpt.common.model import adapters, families, params
from mlxgpt.common.model.affine import Quantised
from mlxgpt.common.plan import gate as plan_gate
from mlxgpt.common.recipes import apply_sets, read_toml
from mlxgpt.common.runs import checkpoint, run_folder
from mlxgpt.common.sft import settings as sft_settings
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.train import resume, session

_BASE = "base model"  # among the digests
Weights = dict[str, Any]
"""Canonical name -> float32 array, or affine.Quantised of a matrix that is frozen."""


def finetune(args: Namespace) -> int:
    """Starts a run of fine-tuning, or goes on with one.

    Returns:
        0, or 130 and 143 after a signal.

    Raises:
        UserError: wrong usage or input; nothing was written.
        RunError: the run broke.
    """
    return _continue(args) if args.resume else _begin(args)


def _begin(args: Namespace) -> int:
    """A new run."""
    chosen = sft_settings.gather(args)
    recipe = sft_settings.recipe(chosen.sections, chosen.where)
    assert recipe.tune and recipe.adapter
    out = run_folder.unused(Path(chosen.out) if chosen.out else None, _name(recipe))
    text_metrics.check(recipe.tune.metrics)
    base, given = _locate(recipe)
    config = model_folder.read_config(base)
    recipe = sft_settings.with_layers(dataclasses.replace(recipe, model=config), chosen, config)
    recipe, adapter = _take_adapter(recipe, chosen, base, given, args.force)
    assert recipe.adapter
    adapters.targets(config, recipe.adapter)  # what matches nothing is refused before rows are read
    for note in chosen.notes:
        print(f"{chosen.where}: {note}")
    backend = session.open_backend(args)
    assert recipe.tune
    source = sft_source.open(recipe.tune, recipe.train, load_tokenizer(base), config, print, config.labels)
    recipe = tune_answers.check(sft_settings.with_length(recipe, chosen, source), source)
    session.check_settings(recipe, args)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, labels=source.labels))
    recipe = _with_tokens(recipe, source)
    if recipe.adapter and recipe.adapter.method != "full":
        for line in adapter_folder.limits(recipe):
            print(line)
    gate = plan_gate.gate(recipe, backend, args)
    base_weights = _base_weights(base, recipe)
    own = _own(recipe, base_weights, adapter)
    checkpoint.check_space(run_folder.existing(out), session.space(recipe))
    engine = backend.engine.Engine(recipe, base_weights | own, device=args.device)
    state = session.fresh(recipe, _digests(recipe, source.digest, base), engine.describe())
    run_folder.make(out)
    with run_folder.locked(out):
        run_folder.begin(out, recipe, engine.describe() | {"data": source.describe()}, None)
        return _run(args, gate, out, recipe, engine, source, state, base, own, save_first=True)


def _continue(args: Namespace) -> int:
    """A run that was stopped, from its newest checkpoint that holds."""
    run = Path(args.resume)
    resume.check_run(run)
    for flag, value in (("--out", args.out), ("--adapter", args.adapter), ("--config", args.config),
                        ("--method", args.method), ("--task", args.task), ("--epochs", args.epochs),
                        ("--train-on-prompt", args.train_on_prompt)):  # fmt: skip
        if value:
            raise UserError(f"{flag} {value}: a resumed run goes on as it began, where it is")
    with run_folder.locked(run):
        stored = read_toml(run / "recipe.toml")
        if "tune" not in stored:
            raise UserError(f"{run}: a run of mlxgpt train: mlxgpt train --resume {run} goes on with it")
        flags = {"tune.model": args.model, "tune.source": args.data, "train.steps": args.steps}
        sets = [f"{key}={value}" for key, value in flags.items() if value is not None]
        recipe = sft_settings.recipe(apply_sets(stored, sets + args.set), str(run / "recipe.toml"))
        assert recipe.tune and recipe.adapter
        going = session.find(args, run, recipe, stored)
        if going is None:
            return 0
        found, rounding = going
        if found is None:
            raise UserError(f"{run}: no checkpoint: it was stopped before its first; remove it and start again")
        backend = session.open_backend(args)
        whole = recipe.adapter.method == "full"
        base = found[0] if whole else _locate(recipe)[0]
        config = recipe.model if whole else model_folder.read_config(base)
        tokenizer = load_tokenizer(found[0] if whole else base)
        source = sft_source.open(recipe.tune, recipe.train, tokenizer, config, print, recipe.model.labels)
        digests = _digests(recipe, source.digest, base)
        before, after = found[1].data.get(_BASE), digests.get(_BASE)
        if before != after:
            raise UserError(
                f"{base}: sha256 {after}: the run began on a model with {before}; --model names another place"
            )
        resume.check_data(run, found[1].data, digests)
        gate = plan_gate.gate(recipe, backend, args)
        weights = _base_weights(base, recipe)
        adapter = None if whole else adapter_folder.read(found[0], base, recipe.model)
        own = _own(recipe, weights, adapter)
        engine = backend.engine.Engine(recipe, weights | own, device=args.device)
        trained = {name: (weights | own)[name] for name in adapters.trainable(recipe)}
        snapshot = checkpoint.read_optimizer(found[0], trained)
        state = session.go_on(run, found, snapshot, recipe, engine, rounding)
        session.clear(run, recipe, engine.describe() | {"data": source.describe()}, state.step)
        return _run(args, gate, run, recipe, engine, source, state, base, own)


def _run(
    args: Namespace,
    gate: plan_gate.Gate,
    run: Path,
    recipe: Recipe,
    engine: Any,
    source: SftSource,
    state: checkpoint.RunState,
    base: Path,
    own: Weights,
    **more: Any,
) -> int:
    """The loop: its checkpoints are adapters, or models where every weight trains; answers are scored beside it."""
    assert recipe.tune and recipe.adapter
    if recipe.adapter.method != "full":
        frozen = {name: array for name, array in own.items() if name.rpartition(".")[2].startswith("start_")}
        more["write_adapter"] = functools.partial(_write, recipe=recipe, base=base, frozen=frozen, source=source)
    answers = tune_answers.Answers(gate.backend, engine, recipe, source)
    if recipe.sample.max_tokens and recipe.tune.task == "lm":
        more["sample"] = answers.sample
    more |= {"verb": "finetune", "score": answers.score, "finish": answers.finish}
    return session.run(args, gate, run, recipe, engine, source, source.tokenizer, state, **more)


def _write(place: Path, trained: Weights, recipe: Recipe, base: Path, frozen: Weights, source: SftSource) -> None:
    """A checkpoint's adapter folder; the tokenizer is written where training added to it."""
    assert recipe.tune
    tokenizer = source.tokenizer if source.added else None
    hub_id = None if Path(recipe.tune.model).exists() else recipe.tune.model
    adapter_folder.write(place, recipe, base, {**trained, **frozen}, tokenizer, hub_id)


def _name(recipe: Recipe) -> str:
    """What a run is called where --out does not say it: the model and the method."""
    assert recipe.tune and recipe.adapter
    return f"{Path(recipe.tune.model).name}-{recipe.adapter.method}"


def _locate(recipe: Recipe) -> tuple[Path, Path | None]:
    """(the model's folder, the adapter to train on): --model may itself be an adapter, whose base is then the model.

    Raises:
        UserError: one of them is not there, or both name an adapter.
    """
    assert recipe.tune
    place = resolve.resolve_model(recipe.tune.model)
    given = resolve.resolve_model(recipe.tune.adapter) if recipe.tune.adapter else None
    if (place / "config.json").is_file():
        return place, given
    if given:
        raise UserError(f"--model {place}: an adapter, as is --adapter {given}: expected the model that they change")
    return adapter_folder.base_of(place), place


def _take_adapter(
    recipe: Recipe, chosen: sft_settings.Chosen, base: Path, given: Path | None, force: bool
) -> tuple[Recipe, Adapter | None]:
    """The recipe with the settings of the adapter that is trained on, and that adapter.

    Raises:
        UserError: it is for another model, or a setting asks for another shape than it has.
    """
    assert recipe.tune and recipe.adapter
    if given is None:
        return recipe, None
    found = adapter_folder.read(given, base, recipe.model, force)
    for note in found.notes:
        print(note)
    settings = dataclasses.replace(
        adapter_folder.to_config(found, recipe.model),
        dropout=recipe.adapter.dropout,
        b_lr=recipe.adapter.b_lr,
        bits=recipe.adapter.bits,
        group_size=recipe.adapter.group_size,
    )
    for key, value in chosen.written.get("adapter", {}).items():
        own = getattr(settings, key)
        if value != own and not (isinstance(value, list) and tuple(value) == own):
            raise UserError(f"adapter.{key} = {value!r}: {given} has {own!r}, and it is trained on as it is")
    print(f"{given}: trained on: {found.method}, {len(found.targets)} matrices")
    tune = dataclasses.replace(recipe.tune, adapter=str(given))
    return dataclasses.replace(recipe, adapter=settings, tune=tune), found


def _with_tokens(recipe: Recipe, source: SftSource) -> Recipe:
    """The recipe for a tokenizer that was given more tokens: embedding and head grow, and train whole."""
    assert recipe.adapter
    if not source.added:
        return recipe
    old, model, adapter = recipe.model.vocab_size, recipe.model, recipe.adapter
    if source.tokenizer.n_vocab > old:
        model = dataclasses.replace(model, vocab_size=source.tokenizer.n_vocab)
        families.config_to_hf(model)
        print(f"embedding: {old:,} rows become {model.vocab_size:,}; the new ones start as the mean of the others")
    if adapter.method != "full":
        names = ("wte",) if model.tied else ("wte", "lm_head")
        adapter = dataclasses.replace(adapter, train=tuple(dict.fromkeys([*adapter.train, *names])))
        print(f"{' and '.join(names)} train whole, for the new tokens")
    return dataclasses.replace(recipe, model=model, adapter=adapter)


def _base_weights(base: Path, recipe: Recipe) -> Weights:
    """The model's weights as the engine takes them: float32 where they train, with rows for new tokens, or a score."""
    weights: Weights = dict(model_folder.read_stored(base, model_folder.read_config(base)))
    for name in adapters.trainable(recipe):
        if isinstance(weights.get(name), Quantised):
            weights[name] = weights[name].dequantise()
            print(f"{name}: trains, so it is dequantised")
    weights = params.resize_vocab(weights, recipe.model.vocab_size)
    return params.as_classifier(weights, recipe.model, recipe.train.seed) if recipe.model.labels else weights


def _own(recipe: Recipe, weights: Weights, adapter: Adapter | None) -> Weights:
    """The adapter's tensors: as given, or as an adapter starts; nothing for method full."""
    assert recipe.adapter
    if adapter is not None:
        return dict(adapter.params)
    if recipe.adapter.method == "full":
        return {}
    return dict(adapters.init(recipe, Dequantised(weights)))


class Dequantised(Mapping[str, np.ndarray]):
    """Weights by name, a quantised one dequantised when it is asked for."""

    def __init__(self, weights: Weights):
        self._weights = weights

    def __getitem__(self, name: str) -> np.ndarray:
        found = self._weights[name]
        return found.dequantise() if isinstance(found, Quantised) else found

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _digests(recipe: Recipe, digest: dict[str, str], base: Path) -> dict[str, str]:
    """What a resumed run compares: the data, its packing, and the weights that stay."""
    assert recipe.adapter
    if recipe.adapter.method == "full":
        return digest
    return digest | {_BASE: adapter_folder.base_sha256(base)}
