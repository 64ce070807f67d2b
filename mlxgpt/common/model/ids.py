"""Token ids that someone gives, in any form: rows of whole numbers, each of them in the vocabulary."""

from typing import Any

import numpy as np

from mlxgpt.common.errors import UserError


def host(tokens: Any, n_vocab: int, where: str = "tokens") -> np.ndarray:
    """Lists, numpy arrays or arrays of either framework as (B, T) int32.

    Raises:
        UserError: what ``check_form`` and ``check`` refuse, rows of different lengths, or what numpy cannot read.
    """
    found = as_numpy(tokens, where)
    check_form(found.shape, found.dtype.kind in "iu", str(found.dtype), where)
    check(found, n_vocab, where)
    return found.astype(np.int32)


def as_numpy(given: Any, where: str) -> np.ndarray:
    """What numpy makes of it.

    Raises:
        UserError: rows of different lengths, or what numpy cannot read.
    """
    try:
        return np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:
        if "inhomogeneous" in str(error):
            raise UserError(f"{where}: rows of different lengths: expected (B, T), all rows of one length") from None
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"{where}: numpy cannot read {type(given).__name__}: {reason}") from None


def check_form(shape: tuple[int, ...], whole: bool, dtype: str, where: str = "tokens") -> None:
    """Refuses what is not (B, T) ``whole`` numbers; looks at no value.

    Raises:
        UserError: another rank, no rows or no tokens, or another dtype.
    """
    shape = tuple(shape)
    if len(shape) != 2:
        cure = ": tokens[None] makes one row of them" if len(shape) == 1 and where == "tokens" else ""
        raise UserError(f"{where} have shape {shape}: expected (B, T), rows of token ids{cure}")
    if 0 in shape:
        raise UserError(f"{where} have shape {shape}: expected at least one row and one token in it")
    if not whole:
        raise UserError(f"{where} are {dtype.rpartition('.')[2]}: expected integers, which token ids are")


def check(ids: np.ndarray, n: int, where: str = "tokens", of: str = "the model's vocabulary") -> None:
    """Refuses ids (B, T) outside 0 to n - 1.

    Raises:
        UserError: names the first of them and its place.
    """
    if ids.min() >= 0 and ids.max() < n:
        return
    row, place = np.argwhere((ids < 0) | (ids >= n))[0]
    raise UserError(f"{where}[{row}, {place}] = {ids[row, place]}: expected 0 to {n - 1}, {of}")
