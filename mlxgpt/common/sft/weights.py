"""The weights that fine-tuning starts from: a base model's, resized or with a score head, and an adapter's."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, model_folder, resolve
from mlxgpt.common.folders.adapter import Adapter
from mlxgpt.common.folders.adapter import with_adapter as with_parts
from mlxgpt.common.model import adapters, families, params
from mlxgpt.common.model.affine import Quantized
from mlxgpt.common.sft.settings import Chosen
from mlxgpt.common.train.job import Weights


def locate(recipe: Recipe) -> tuple[Path, Path | None]:
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


def with_adapter(
    recipe: Recipe, chosen: Chosen, base: Path, given: Path | None, force: bool
) -> tuple[Recipe, Adapter | None]:
    """The recipe with the settings and the vocabulary of the adapter that is trained on, and that adapter.

    Raises:
        UserError: it is for another model, has what does not train here, or a setting asks for another shape.
    """
    assert recipe.tune and recipe.adapter
    if given is None:
        return recipe, None
    adapter = adapter_folder.read_adapter(given, base, recipe.model, force)
    for note in adapter.notes:
        print(note)
    _check_trains(adapter, base, given)
    model = dataclasses.replace(with_parts(recipe.model, adapter), labels=recipe.model.labels)
    families.check(model)
    settings = dataclasses.replace(
        adapter_folder.to_config(adapter, model),
        dropout=recipe.adapter.dropout,
        b_lr=recipe.adapter.b_lr,
        bits=recipe.adapter.bits,
        group_size=recipe.adapter.group_size,
    )
    for key, value in chosen.written.get("adapter", {}).items():
        own = getattr(settings, key)
        if value != own and not (isinstance(value, list) and tuple(value) == own):
            raise UserError(f"adapter.{key} = {value!r}: {given} has {own!r}, and it is trained on as it is")
    print(f"{given}: trained on: {adapter.method}, {len(adapter.targets)} matrices")
    if adapter.carried:
        print(f"{' and '.join(adapter.carried)}: in the adapter, which did not train it: from here on trained whole")
    named = recipe.tune.model if recipe.tune.adapter else str(base)  # --model may have been the adapter
    tune = dataclasses.replace(recipe.tune, model=named, adapter=str(given))
    return dataclasses.replace(recipe, model=model, adapter=settings, tune=tune), adapter


def _check_trains(adapter: Adapter, base: Path, given: Path) -> None:
    """Refuses parts of PEFT's adapters that training here does not have."""
    rows = [name.removesuffix(".rows") for name in adapter.params if name.endswith(".rows")]
    both = [path for path in adapter.targets if f"{path}.weight" in adapter.params]
    if rows or both:
        what = (
            f"single rows of {rows[0]} (trainable_token_indices)" if rows else f"{both[0]} resized and adapted as well"
        )
        raise UserError(
            f"{given}: has {what}, which does not train here: expected a model of both "
            f"(mlxgpt fuse -m {base} --adapter {given} -o MODEL), and finetune -m MODEL"
        )


def base_weights(base: Path, recipe: Recipe) -> Weights:
    """The model's weights as the engine takes them: float32 where they train, resized for new tokens or labels."""
    weights: Weights = dict(model_folder.read_stored(base, model_folder.read_config(base)))
    for name in adapters.trainable(recipe):
        if isinstance(weights.get(name), Quantized):
            weights[name] = weights[name].dequantize()
            print(f"{name}: trains, so it is dequantized")
    weights = params.resize_vocab(params.with_head(weights, recipe.model), recipe.model.vocab_size)
    return params.as_classifier(weights, recipe.model, recipe.train.seed) if recipe.model.labels else weights


def adapter_weights(recipe: Recipe, base: Weights, adapter: Adapter | None) -> Weights:
    """The adapter's tensors: those of ``adapter``, else freshly initialized; none with method full."""
    assert recipe.adapter
    if adapter is not None:
        return dict(adapter.params)
    if recipe.adapter.method == "full":
        return {}
    return dict(adapters.init(recipe, Dequantized(base)))


class Dequantized(Mapping[str, np.ndarray]):
    """Weights by name; a quantized one is dequantized when it is asked for."""

    def __init__(self, weights: Weights):
        self._weights = weights

    def __getitem__(self, name: str) -> np.ndarray:
        found = self._weights[name]
        return found.dequantize() if isinstance(found, Quantized) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
