"""The settings of fine-tuning: recipes/finetune.toml, over it --config (TOML, or an mlx-lm YAML), flags and --set."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common import recipes
from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.recipes import apply_sets, build, read_toml
from mlxgpt.common.rows import pydocs_qa
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.train import schedule, tasks

_SHOWN = {"model": " DIR: a run, a model folder or a hub id", "source": " PATH: the examples"}
FULL_RATES = {"lr": 2e-5, "min_lr": 2e-6}  # defaults of method full (Taori 2023, Alpaca)
_PREFER_RATE = 0.1  # of these defaults: preferences move a model that answers already (Rafailov et al. 2023)
Sections = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the user asked for, before model and data are opened.

    ``written`` is without the shipped recipe; ``layers`` is mlx-lm's num_layers, and ``layers_said`` whether the file
    sets it.
    """

    sections: Sections
    written: Sections
    where: str
    out: str
    layers: int = 0
    layers_said: bool = False
    notes: tuple[str, ...] = ()


_FLAGS = {"steps": "train.steps", "lr": "optim.lr", "batch_size": "train.batch_size", "rank": "adapter.rank"}


def gather(args: Namespace) -> Chosen:
    """The settings of the command line.

    Raises:
        UserError: a section that is not fine-tuning's, or flags that contradict each other.
    """
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs: expected one of them")
    if args.rank and args.method == "full":
        raise UserError(
            f"--rank {args.rank}: of an adapter; --method full trains every weight: expected one of the two"
        )
    written, where, out, layers, said, notes = {}, "--set", "", 0, False, ()
    if args.config:
        path = Path(args.config).expanduser()
        where = str(path)
        if path.suffix in (".yaml", ".yml"):
            from mlxgpt.common.sft import mlx_lm_yaml

            found = mlx_lm_yaml.read_config(path)
            written, out, notes = found.sections, found.out, found.notes
            layers, said = found.layers, found.chosen
        else:
            written = recipes.read(path)
    check_sections(written, where)
    if args.epochs:
        written.get("train", {}).pop("steps", None)  # the flag overrides the file
    flags = {
        "tune.model": args.model,
        "tune.adapter": args.adapter,
        "tune.source": args.data,
        "tune.task": args.task,
        "tune.train_on_prompt": "true" if args.train_on_prompt else None,
        "tune.epochs": args.epochs,
        "adapter.method": args.method,
    }
    sets = [f"{key}={value}" for key, value in flags.items() if value is not None]
    sets += recipes.flag_sets(args, _FLAGS)
    sets += args.set
    written = apply_sets(written, sets)
    check_sections(written, "--set")
    if args.epochs and "steps" in written.get("train", {}):
        raise UserError(f"--epochs {args.epochs:g} and train.steps: expected one of them")
    shipped = read_toml(recipes.folder() / f"{recipes.FINETUNE}.toml")
    if written.get("adapter", {}).get("method") == "full":
        shipped["optim"] |= FULL_RATES
    if written.get("tune", {}).get("task") == "prefer":
        for name in FULL_RATES:
            shipped["optim"][name] = float(f"{_PREFER_RATE * shipped['optim'][name]:.1e}")
    if "lr" in written.get("optim", {}) and "min_lr" not in written["optim"]:
        # a tenth of the peak, as the shipped recipe has it
        shipped["optim"]["min_lr"] = _number(written["optim"]["lr"]) / 10
    sections = {key: shipped.get(key, {}) | written.get(key, {}) for key in dict.fromkeys([*shipped, *written])}
    return Chosen(sections, written, where, args.out or out, layers, said, notes)


def check_sections(sections: Sections, where: str) -> None:
    """Refuses the sections of pre-training.

    Raises:
        UserError: [data] or [model] is among them.
    """
    for section, instead in (("data", "the data are settings of [tune]"), ("model", "the model is the one of --model")):
        if section in sections:
            raise UserError(f"{where}: [{section}]: of mlxgpt train; in fine-tuning {instead}")


def recipe(sections: Sections, where: str) -> Recipe:
    """The recipe of the sections, its paths absolute, so that a run may move.

    Raises:
        UserError: an unknown key, a wrong value, or no model or data.
    """
    made = build({"tune": {}, "adapter": {}, **sections}, where)
    assert made.tune
    for key, flag in (("model", "--model"), ("source", "--data")):
        if not getattr(made.tune, key):
            raise UserError(f"tune.{key}: expected {flag}{_SHOWN[key]}")
    source = str(pydocs_qa.file()) if made.tune.source == pydocs_qa.NAME else made.tune.source
    paths = {"source": source, "model": made.tune.model, "adapter": made.tune.adapter}
    if made.tune.template not in ("auto", "chatml"):  # words, also beside a file or folder of that name
        paths["template"] = made.tune.template
    absolute = {
        key: str(Path(value).expanduser().resolve())
        for key, value in paths.items()
        if value and Path(value).expanduser().exists()
    }
    tune = dataclasses.replace(made.tune, **{"source": source, **absolute})
    return dataclasses.replace(made, tune=tune, train=tasks.absolute(made.train))


def with_length(recipe: Recipe, chosen: Chosen, source: SftSource) -> Recipe:
    """The recipe with its number of steps, from the epochs where none was given, and a warm-up that fits.

    Raises:
        UserError: a warm-up that was asked for does not fit.
    """
    assert recipe.tune
    steps = recipe.train.steps
    if "steps" not in chosen.written.get("train", {}):
        steps = source.steps(recipe.tune.epochs)
        print(f"{steps:,} steps: {recipe.tune.epochs:g} epochs of {source.steps_per_epoch:,}")
    optim = recipe.optim
    if "warmup" not in chosen.written.get("optim", {}):
        optim = dataclasses.replace(optim, warmup=min(optim.warmup, steps // 10))
    schedule.check_schedule(optim, steps)
    return dataclasses.replace(recipe, optim=optim, train=dataclasses.replace(recipe.train, steps=steps))


def with_layers(recipe: Recipe, chosen: Chosen, model: ModelConfig) -> Recipe:
    """The recipe with mlx-lm's num_layers; its default of 16 means all of a model that has fewer.

    Raises:
        UserError: more layers were asked for than there are, or some with method full.
    """
    assert recipe.adapter
    layers = chosen.layers
    if layers > model.n_layer and not chosen.layers_said:
        layers = 0
    if layers > model.n_layer:
        raise UserError(f"{chosen.where}: num_layers = {layers}: expected at most the model's {model.n_layer}, or -1")
    if layers in (-1, 0, model.n_layer):
        return recipe
    if recipe.adapter.method == "full":
        raise UserError(
            f"{chosen.where}: num_layers = {layers} with fine_tune_type full: expected -1: all layers train"
        )
    return dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, layers=layers))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
