"""Batches that a program makes itself, as the source of a run: checked on the host, and the same for a step each time.

B rows, T tokens a row.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from mlxgpt.common.batch import Batch
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.model import ids
from mlxgpt.common.tokenizers.protocol import Tokenizer

Batches = Callable[[int], Any]


class Given:
    """See batch.Source. ``source`` and ``validation`` as api.Trainer takes them.

    Raises:
        UserError: what is given is no batch, does not fit the recipe, or differs when it is asked for again.
    """

    def __init__(self, source: Any, validation: Any, recipe: Recipe):
        self._batch, self._recipe = batches_of(source), recipe
        model = recipe.model
        self.vocab_size = model.vocab_size
        self._targets = (len(model.labels), "the labels") if model.labels else (model.vocab_size, "the vocabulary")
        first, again = self._made(1), self._made(1)
        if len(first.tokens) != recipe.train.batch_size:
            raise UserError(
                f"source, step 1: {len(first.tokens)} rows: expected train.batch_size = {recipe.train.batch_size}"
            )
        if digest(first) != digest(again):
            raise UserError(
                "source, step 1: two calls gave two batches: expected a function of the step alone, as exact resume "
                "needs; a generator of the step is one: numpy.random.default_rng((seed, step))"
            )
        if validation is None and not callable(source):
            validation = getattr(source, "validation", None)
        self._validation = self._all(validation)
        own = getattr(source, "digest", None)
        self.digest: dict[str, str] = dict(own) if isinstance(own, Mapping) else {}
        self.digest["batch of step 1"] = digest(first)
        if self._validation:
            self.digest["validation batches"] = digest(*self._validation)

    def batch(self, step: int) -> Batch:
        """The batch of a step (from 1).

        Raises:
            RunError: it is wrong, where that of step 1 was not.
        """
        try:
            return self._made(step)
        except UserError as error:
            raise RunError(str(error)) from None

    def _made(self, step: int) -> Batch:
        made = self._checked(self._batch(step), f"source, step {step}")
        if len(made.tokens) > self._recipe.train.batch_size:
            size = self._recipe.train.batch_size
            raise UserError(f"source, step {step}: {len(made.tokens)} rows: expected at most train.batch_size = {size}")
        if not made.weight:
            raise UserError(f"source, step {step}: no token is a target: expected weights above 0")
        return made

    def validation(self) -> Iterator[Batch]:
        """The validation batches."""
        return iter(self._validation)

    def compare_beginnings(self, tokenizer: Tokenizer, name: str, say: Callable[[str], None]) -> None:
        """Nobody knows where documents begin in what a program makes."""

    @property
    def statistics(self) -> dict[str, int]:
        """Batches of validation and their targets."""
        targets = sum(int((batch.weights > 0).sum()) for batch in self._validation)
        return {"val_batches": len(self._validation), "val_tokens": targets}

    def _all(self, validation: Any) -> list[Batch]:
        """Every validation batch, once and for all: what gives them may be used up."""
        found: Any = validation() if callable(validation) else () if validation is None else validation
        found = [found] if isinstance(found, (Batch, tuple)) and found else found
        if not isinstance(found, Iterable):
            kind = type(found).__name__
            raise UserError(f"validation is a {kind}: expected a list of batches, or a function that returns one")
        made = [self._checked(each, f"validation batch {number}") for number, each in enumerate(found, 1)]
        if made and not sum(batch.weight for batch in made):
            raise UserError("validation: no token is a target: expected weights above 0")
        return made

    def _checked(self, found: Any, where: str) -> Batch:
        """``found`` as a batch of int32 ids in the vocabulary."""
        batch, model = as_batch(found, where), self._recipe.model
        ids.check(batch.tokens, model.vocab_size, f"{where}: tokens")
        if (batch.targets < 0).any():
            row, place = np.argwhere(batch.targets < 0)[0]
            raise UserError(
                f"{where}: targets[{row}, {place}] = {batch.targets[row, place]}: expected ids; "
                "what is not a target has weight 0, and any id"
            )
        ids.check(batch.targets, self._targets[0], f"{where}: targets", self._targets[1])
        if batch.tokens.shape[1] > model.block_size:
            raise UserError(
                f"{where}: rows of {batch.tokens.shape[1]} tokens: expected at most model.block_size = "
                f"{model.block_size}"
            )
        return batch


def batches_of(source: Any) -> Batches:
    """The function from a step to its batch: ``source`` itself, or its method batch.

    Raises:
        UserError: it is neither.
    """
    found = getattr(source, "batch", source)
    if not callable(found):
        kind = type(source).__name__
        raise UserError(f"source is a {kind}: expected a function from a step to its batch, or an object with batch()")
    return found


def as_batch(found: Any, where: str) -> Batch:
    """A Batch, (tokens, targets) or (tokens, targets, weights) as a Batch of int32 and float32.

    Raises:
        UserError: anything else, or arrays that do not have one shape (B, T).
    """
    if not isinstance(found, Batch):
        if not (isinstance(found, (tuple, list)) and len(found) in (2, 3)):
            kind = type(found).__name__
            raise UserError(f"{where}: a {kind}: expected a Batch, (tokens, targets) or (tokens, targets, weights)")
        tokens, targets = found[:2]
        weights = found[2] if len(found) == 3 else np.ones(ids.as_numpy(tokens, f"{where}: tokens").shape, np.float32)
        found = Batch(tokens, targets, weights)  # type: ignore[arg-type]
    fields: dict[str, Any] = {}
    for name in ("tokens", "targets", "weights", "positions", "segments"):
        given = getattr(found, name)
        if given is None and name in ("positions", "segments"):
            continue
        array = ids.as_numpy(given, f"{where}: {name}")
        ids.check_form(array.shape, name == "weights" or array.dtype.kind in "iu", str(array.dtype), f"{where}: {name}")
        if array.shape != fields.get("tokens", array).shape:
            raise UserError(f"{where}: {name} have shape {array.shape}: expected that of tokens, "
                            f"{fields['tokens'].shape}")  # fmt: skip
        fields[name] = array
    weights = fields["weights"]
    if weights.dtype.kind not in "fiub" or not np.isfinite(weights).all() or (weights < 0).any():
        raise UserError(f"{where}: weights: expected finite numbers, none below 0")
    # ids are checked before they are made narrower
    kinds = {name: np.float32 if name == "weights" else np.int32 for name in fields}
    whole = {name: np.clip(array, -(2**31), 2**31 - 1) if kinds[name] is np.int32 else array
             for name, array in fields.items()}  # fmt: skip
    return Batch(**{name: array.astype(kinds[name]) for name, array in whole.items()}, row_ids=found.row_ids)


def digest(*batches: Batch) -> str:
    """A sha256 of all that the batches hold."""
    made = hashlib.sha256()
    for batch in batches:
        for name in ("tokens", "targets", "weights", "positions", "segments"):
            array = getattr(batch, name)
            made.update(f"{name} {None if array is None else array.shape}".encode())
            made.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return made.hexdigest()
