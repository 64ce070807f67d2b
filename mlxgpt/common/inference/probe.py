"""What a framework computes of a model on given tokens, as .npz; ``verify`` compares these files.

logits.xS (t, V)                    of the last t tokens, with every matrix times S (x1: as they are)
hidden.xS.embed, .h.N, .ln_f (t, C) what enters the first block, what block N gives, what the head sees
gradient.xS.NAME                    of the mean next-token loss
greedy.tokens (n,)                  what follows the first tokens, decoded with a cache
greedy.margins (n,)                 by how much each was the likeliest, relative to the largest logit
"""

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.model import params

KEPT = 64  # tokens whose logits and activations are kept: the last ones
SCALES = (1.0, 8.0)


@dataclass(frozen=True)
class Request:
    """What to compute. ``ids`` (T + 1,): T tokens and, one later, their targets; ``prompt`` of them are continued."""

    ids: np.ndarray
    prompt: int = 1
    greedy: int = 0
    scales: tuple[float, ...] = SCALES
    gradients: bool = True
    exact: bool = False

    @property
    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, (1, T) int32."""
        return self.ids[None, :-1], self.ids[None, 1:]

    def check(self, config: ModelConfig, where: str) -> None:
        """Refuses a classifier, ids that the model does not have, and more than its context holds."""
        if config.labels:
            raise UserError(f"{where}: {config.kind}, which predicts no tokens: expected a language model")
        if len(self.ids) < 2 or len(self.ids) - 1 > config.block_size:
            raise UserError(
                f"{where}: {len(self.ids) - 1} tokens: expected 1 to {config.block_size}, and a target more"
            )
        if self.ids.min() < 0 or self.ids.max() >= config.vocab_size:
            raise UserError(f"{where}: token id {self.ids.max()}: expected 0 to {config.vocab_size - 1}")


def growth(config: ModelConfig, scale: float, before: float) -> dict[str, float]:
    """What each matrix, embeddings included, is multiplied by to come from one scale to the next."""
    return {name: scale / before for name, param in params.table(config).items() if param.std}


def spell(scale: float) -> str:
    """``x8``."""
    return f"x{scale:g}"


def margins(logits: np.ndarray) -> np.ndarray:
    """By how much the largest of ``logits`` (n, V) exceeds the next, relative to the largest magnitude of all."""
    top = np.sort(np.partition(logits, -2, axis=-1)[:, -2:], axis=-1)
    largest = np.abs(logits).max()
    return (top[:, 1] - top[:, 0]) / (largest or 1.0)


def write_arrays(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """An .npz of arrays that are made one at a time."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def read_ids(path: Path) -> np.ndarray:
    """The token ids in a .npy file, (T + 1,) int32.

    Raises:
        UserError: the file is missing or holds anything else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a .npy file: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        raise UserError(f"{path}: expected token ids, whole numbers in one dimension")
    return found.astype(np.int32)


def request_of(values: Mapping[str, object]) -> Request:
    """The request that the arguments of ``probe`` make."""
    scales = tuple(float(scale) for scale in values["scale"] or SCALES)  # type: ignore[union-attr]
    if any(not 0 < scale < np.inf for scale in scales):
        raise UserError(f"--scale {min(scales):g}: expected a positive number")
    ids = read_ids(Path(str(values["tokens"])))
    greedy, prompt = int(str(values["greedy"])), int(str(values["prompt"]))
    if greedy < 0 or not 1 <= prompt < max(2, len(ids)):
        raise UserError(f"--prompt {prompt}, --greedy {greedy}: expected 1 to {len(ids) - 1} tokens, and 0 or more")
    return Request(ids, prompt, greedy, scales, bool(values["gradients"]))
