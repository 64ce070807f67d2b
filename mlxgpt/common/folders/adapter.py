"""An adapter in memory, and several on one base: what readers give, and what loading and fusing start from."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlxgpt.common.config import AdapterConfig, ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import adapters, params
from mlxgpt.common.model.adapters import Target

VOCABULARY = ("wte.weight", "lm_head.weight", "lm_head.bias")  # what has a row a token


@dataclass
class Adapter:
    """An adapter in our names and layout: see model/adapters.py. ``params`` also hold the tensors that train whole."""

    method: str  # lora or dora
    targets: dict[str, Target]
    params: dict[str, np.ndarray]
    adapter: AdapterConfig | None = None  # how it was trained, where it was written here
    base: str | None = None  # base_model_name_or_path, model: where its base was
    base_sha256: str | None = None
    vocab_size: int | None = None  # where it has other tokens than its base
    labels: tuple[str, ...] = ()  # where it makes a classifier of its base
    notes: list[str] = field(default_factory=list)  # lines to say
    apart: bool = False  # its base is tied, and it gives the head weights of its own
    carried: tuple[str, ...] = ()  # of params: weights of the base that its file holds, which did not train


@dataclass(frozen=True)
class Together:
    """What a base and its adapters are together."""

    config: ModelConfig
    targets: dict[str, Target]
    params: dict[str, np.ndarray]  # tensors of the updates
    whole: dict[str, np.ndarray]  # tensors that replace the base's, and PATH.rows with PATH.tokens
    apart: bool = False  # its base is tied, and its head is not

    def changed(self, base: ModelConfig) -> set[str]:
        """Tensors of a base of config ``base`` out of which ``onto`` makes others; the rest stay, or are replaced."""
        names = {name.replace(".rows", ".weight") for name in self.whole if name.endswith(".rows")}
        if self.config.vocab_size > base.vocab_size:
            names |= {"wte.weight", "lm_head.weight", "lm_head.bias"}
        return names | ({"wte.weight"} if self.apart else set())

    def onto(self, weights: Mapping[str, adapters.Weight]) -> dict[str, adapters.Weight]:
        """The base's ``weights``, on which the updates act: with the head of its own, the new rows, and ``whole``.

        ``weights`` may be those alone that ``changed`` names.
        """
        made = params.with_head(weights, self.config) if self.apart else dict(weights)
        made = params.resize_vocab(made, self.config.vocab_size)
        for name in params.table(self.config):
            if name in self.whole:
                made[name] = self.whole[name]
            path = name.removesuffix(".weight")
            if f"{path}.rows" in self.whole:
                made[name] = adapters.with_rows(made[name], self.whole, path)
        return made


def with_adapter(config: ModelConfig, adapter: Adapter) -> ModelConfig:
    """The model that runs with ``adapter``: of another vocabulary, with a head of its own, or a classifier."""
    return dataclasses.replace(
        config,
        vocab_size=adapter.vocab_size or config.vocab_size,
        labels=adapter.labels or config.labels,
        tied=config.tied and not adapter.apart,
    )


def add_up(base: ModelConfig, given: Sequence[tuple[Adapter, float]]) -> Together:
    """Adapters on a base of ``base``, each times its weight.

    Raises:
        UserError: they cannot be added up; see ``adapters.add_up``.
    """
    config = base
    for each, _ in given:
        config = with_adapter(config, each)
    listed = [(each if config.tied == base.tied or each.apart else _apart(each), weight) for each, weight in given]
    targets, arrays, whole = adapters.add_up([(each.targets, each.params, weight) for each, weight in listed])
    shapes = {name: param.shape for name, param in params.table(config).items()}
    for path, target in targets.items():
        shape = (target.n_out, target.n_in)[:: -1 if path == "wte" else 1]
        if shapes.get(f"{path}.weight") != shape:
            raise UserError(
                f"adapters: the update of {path} is for {list(shape)}, but with the others it is "
                f"{list(shapes.get(f'{path}.weight', ()))}"
            )
    for name, array in whole.items():
        if name in shapes and array.shape != shapes[name]:
            raise UserError(f"adapters: {name} has shape {list(array.shape)}, expected {list(shapes[name])}")
    return Together(config, targets, arrays, whole, base.tied and not config.tied)


def _apart(adapter: Adapter) -> Adapter:
    """``adapter`` of a tied base, with the embedding's changes done to the head as well, which is to be another one."""
    targets, arrays = dict(adapter.targets), dict(adapter.params)
    for kind in ("weight", "rows", "tokens", "magnitude"):
        if f"wte.{kind}" in arrays:
            arrays[f"lm_head.{kind}"] = arrays[f"wte.{kind}"]
    if "wte" in targets:
        old = targets["wte"]
        targets["lm_head"] = dataclasses.replace(old, n_out=old.n_in, n_in=old.n_out)
        for one, other in (("lora_a", "lora_b"), ("start_a", "start_b")):
            if f"wte.{one}" in arrays:
                arrays[f"lm_head.{one}"] = np.ascontiguousarray(arrays[f"wte.{other}"].T)
                arrays[f"lm_head.{other}"] = np.ascontiguousarray(arrays[f"wte.{one}"].T)
    return dataclasses.replace(adapter, targets=targets, params=arrays)
