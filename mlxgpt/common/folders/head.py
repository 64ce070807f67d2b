"""What a model's files lack: a head that config.json does not tie, or a tensor, for whatever reason can be seen."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import TensorError
from mlxgpt.common.folders import mlx_lm_names
from mlxgpt.common.model import families, module_names, text_part


def is_tied(
    place: Path,
    values: Mapping[str, Any],
    config: ModelConfig,
    name: str,
    there: Collection[str],
    is_copy: Callable[[], bool],
) -> bool:
    """Whether the head is tied, of a model whose files may have one that may be the embedding's copy.

    A head that differs from the embedding is one of its own, whatever config.json says, as in transformers.

    Args:
        place: the folder or file, for messages.
        values: its config.json, whose key may be absent: then ``config`` has the architecture's default.
        config: the model that config.json describes.
        name: what the files call the head.
        there: the names of the tensors that they hold.
        is_copy: tells whether the head equals the embedding.

    Raises:
        TensorError: config.json unties the head, and there is none.
    """
    if name in there:
        return config.tied and is_copy()
    if config.tied:
        return True
    reason = _reason(there, config)
    if reason:
        raise TensorError(name, f"{place}: {reason}")
    key = families.family_of(config).fields["tied"]
    said = f"{key} = false" if key in values else f"no {key}, which means false for {config.family}"
    raise TensorError(
        name,
        f"{place}: tensor {name} is missing, and config.json has {said}: expected the head, or {key} = true in "
        "config.json for one that is the embedding",
    )


def missing(place: Path, name: str, there: Collection[str], config: ModelConfig) -> str:
    """The message for a tensor that is not among those ``there``."""
    return f"{place}: " + (_reason(there, config) or f"tensor {name} is missing, which config.json asks for")


def _reason(there: Collection[str], config: ModelConfig) -> str:
    """Why tensors of a model seem to be missing; '' where nothing tells."""
    lora = next((each for each in there if ".lora_A." in each or each.endswith(".lora_a")), None)
    if lora:
        return f"{lora} is an adapter's, beside its base's tensors: expected a base, or both merged"
    if experts := text_part.experts_among(there):
        return experts
    expected = {*families.from_foreign(config), *mlx_lm_names.names(config)}
    strangers = module_names.strangers(there, expected)
    return strangers and f"{strangers}: expected names such as {next(iter(families.from_foreign(config)))}"
