"""How a user's model is called, found by trying: what its forward takes, the order of its axes, which logits it gives.

B rows, T tokens, V vocabulary, C hidden size. B differs from T, so that a shape says which axis is which.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.user_code.imports import TheirError, told

MASKS = ("mask", "attn_mask", "attention_mask", "src_mask", "tgt_mask", "causal_mask", "x_mask", "has_mask")
TARGETS = ("targets", "target", "labels", "y", "yb", "tgt", "targ", "target_ids", "next_tokens")
STARTS = ("start_pos", "start", "offset", "past_length", "pos_offset", "start_index")
PLACES = ("positions", "position_ids", "pos", "input_pos", "position", "cache_position", "pos_ids")
NOTHING = ("cache", "caches", "past", "past_key_values", "kv_cache", "layer_past", "memory", "mems", "state",
           "hidden", "token_type_ids", "segment_ids", "inputs_embeds", "head_mask", "src_key_padding_mask",
           "padding_mask")  # fmt: skip
OFF = ("training", "train", "is_training", "use_cache", "return_dict", "return_attention", "output_attentions")
ON = ("deterministic", "inference", "is_causal", "causal")
LOGITS = ("logits", "lm_logits", "prediction_logits", "output", "out", "scores")
LONGEST = 48  # tokens of a sample; angles of positions in float32 cost more with each
_CAUSAL = 1e-5  # logits that move by less than this share of the largest do not depend on a token


class Library(Protocol):
    """What a framework does with a model: mlxgpt/sample.py and torch_ref/sample.py."""

    def forward(self, model: Any) -> Callable[..., Any]:
        """What is called, for its signature."""
        ...

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """No gradients."""
        ...

    def array(self, values: np.ndarray) -> Any:
        """An array of the framework."""
        ...

    def is_array(self, thing: Any) -> bool:
        """Whether it is one."""
        ...

    def host(self, array: Any) -> np.ndarray:
        """An array as numpy, floats as float32."""
        ...

    def watch(self, model: Any, n_layer: int) -> contextlib.AbstractContextManager[Callable[[], list[Any]]]:
        """What gives, after a call, what entered and left each block in turn; [] where that was not seen."""
        ...


@dataclass(frozen=True)
class Way:
    """One way to call it."""

    targets: str = ""  # the parameter that gets the ids once more, so that all logits come
    mask: str = ""  # the parameter that gets a mask
    kind: str = ""  # of mask
    axes: str = "BT"  # BT, TB, or T for one row at a time
    length: int = 0  # the only length that it takes; 0: any up to the context
    growing: bool = False  # the last position's logits alone: one call a position

    def spelled(self) -> list[str]:
        """What is unusual about it, in words."""
        made = []
        if self.targets:
            made.append(f"it gives every position's logits only with {self.targets}: the ids are given as such")
        if self.growing:
            made.append("it gives the last position's logits alone: called once for every length")
        if self.mask:
            made.append(f"called with {self.mask}: {_MASKS[self.kind]}")
        if self.axes == "TB":
            made.append("it takes (T, B), time first")
        if self.axes == "T":
            made.append("it takes one row of tokens at a time")
        if self.length:
            made.append(f"it takes {self.length} tokens and no other number")
        return made


_MASKS = {
    "none": "None",
    "additive": "0 and -inf, (T, T)",
    "hidden": "true where a token may not look, (T, T)",
    "seen": "true where a token may look, (T, T)",
    "seen4": "true where a token may look, (1, 1, T, T)",
    "ones": "ones, (B, T)",
    "true": "True",
}


def mask_of(kind: str, b: int, t: int) -> Any:
    """A causal mask in one of the ways in which people write it."""
    seen = np.tril(np.ones((t, t), bool))
    made = {
        "additive": np.where(seen, 0.0, -np.inf).astype(np.float32),
        "hidden": ~seen,
        "seen": seen,
        "seen4": seen[None, None],
        "ones": np.ones((b, t), np.int64),
        "true": True,
    }
    return made.get(kind)


@dataclass
class Caller:
    """A model, and the way to call it once ``settle`` has found that."""

    library: Library
    model: Any
    path: Path
    name: str
    vocab_size: int
    n_layer: int = 0
    block_size: int = 0
    way: Way = field(default_factory=Way)
    last_only: bool = False

    def __post_init__(self) -> None:
        try:
            parameters = list(inspect.signature(self.library.forward(self.model)).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        self._first, self._rest = (named[0] if named else None), named[1:]

    def settle(self, draw: Callable[[int], np.ndarray], lengths: Sequence[int] = ()) -> np.ndarray:
        """Finds the way, and the ids of ``draw(T)`` (B, T) that it was found on.

        Raises:
            UserError: none gives logits, or they look ahead, or differ from call to call.
            TheirError: what the first way raised.
        """
        first: BaseException | None = None
        for length in lengths or self._lengths():
            ids = draw(length)
            for way in self._ways(ids.shape[1]):
                try:
                    found = self._kind(way, ids)
                except (TheirError, UserError) as error:
                    first = first or error
                    continue
                return self._settled(way, found, ids)
        assert first is not None
        raise first

    def _lengths(self) -> list[int]:
        most = self.block_size or LONGEST
        wanted = [min(LONGEST, most), most if most <= 4096 else LONGEST, 32, 16, 8]
        return list(dict.fromkeys(length for length in wanted if length <= most))

    def _ways(self, length: int) -> Iterator[Way]:
        """Ways to be called at all, the likeliest first."""
        fixed = length if self.block_size and length > LONGEST else 0
        mask = next((each.name for each in self._rest if each.name in MASKS and each.default is each.empty), "")
        targets = next((each.name for each in self._rest if each.name in TARGETS and each.default is each.empty), "")
        plain = [Way(targets=targets, length=fixed), *([Way(length=fixed)] if targets else [])]
        for way in plain:
            for kind in ("additive", "hidden", "seen", "seen4", "ones", "none", "true") if mask else ("",):
                for axes in ("BT", "TB") if mask else ("BT",):
                    yield dataclasses.replace(way, mask=mask, kind=kind, axes=axes)
        for way in plain:
            yield dataclasses.replace(way, mask=mask, kind="additive" if mask else "", axes="T")

    def _settled(self, way: Way, kind: str, ids: np.ndarray) -> np.ndarray:
        """Completes a way that can be called: every position's logits, each of tokens before it only."""
        names = [each.name for each in self._rest]
        if kind == "last":
            targets = next((name for name in names if name in TARGETS), "")
            way, kind = self._every(way, targets, ids)
        self.way, self.last_only = way, kind == "last"
        once = self._checked(ids)
        if not np.array_equal(once, self._checked(ids), equal_nan=True):
            raise UserError(
                f"{self.path}: {self.name} gives other logits each time: dropout that eval() does not switch off?"
            )
        if not self.last_only and not self.way.growing and ids.shape[1] > 1:
            self._look(names, ids)
        return ids

    def _every(self, way: Way, targets: str, ids: np.ndarray) -> tuple[Way, str]:
        """The way that gives all positions' logits where a plain call gives the last's."""
        if targets:
            with contextlib.suppress(TheirError, UserError):
                more = dataclasses.replace(way, targets=targets)
                if self._kind(more, ids) == "all":
                    return more, "all"
        if not way.length:
            with contextlib.suppress(TheirError, UserError):
                if self._kind(way, ids[:, :1]) and self._kind(way, ids[:, :2]):
                    return dataclasses.replace(way, growing=True), "all"
        return way, "last"

    def _look(self, names: list[str], ids: np.ndarray) -> None:
        """Finds the order of the axes and a mask with which no token looks ahead."""
        if self._is_causal(ids):
            return
        started, way = self.way, self.way
        masks = [name for name in names if name in MASKS]
        kinds = ["additive", "hidden", "seen", "seen4", "true"] if masks else []
        tries = [dataclasses.replace(way, axes=axes) for axes in ("TB", "BT") if way.axes != "T"]
        tries += [
            dataclasses.replace(way, axes=axes, mask=masks[0], kind=kind)
            for kind in kinds
            for axes in (("BT", "TB") if way.axes != "T" else ("T",))
        ]
        for each in tries:
            self.way = each
            with contextlib.suppress(TheirError, UserError):
                if self._is_causal(ids):
                    return
        self.way = started
        raise UserError(
            f"{self.path}: {self.name}: the last token changes the logits of earlier ones: expected a causal model"
            + ("" if masks else " (its forward takes no mask)")
        )

    def _is_causal(self, ids: np.ndarray) -> bool:
        """Whether the last token of the first row changes nothing but its own logits."""
        other = ids.copy()
        other[0, -1] = (other[0, -1] + 1) % self.vocab_size
        a, b = self._checked(ids), self._checked(other)
        moved = np.abs(a - b).max(axis=-1) > _CAUSAL * np.abs(a).max()
        moved[0, -1] = False
        return not moved.any()  # NaN moves nothing: the sample is refused for it

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        return self.library.host(self.native(ids))

    def native(self, ids: np.ndarray) -> Any:
        """Logits of ids (B, T) as the framework has them: (B, T, V), or (B, V) where there are no others.

        Raises:
            TheirError: what the model raised.
        """
        way, (_, t) = self.way, ids.shape
        padded = np.pad(ids, ((0, 0), (0, way.length - t))) if way.length > t else ids
        if way.growing:
            rows = [self._call(way, ids[:, : n + 1])[0] for n in range(t)]
            return self._stack([row.reshape(ids.shape[0], self.vocab_size) for row in rows], 1)
        found, kind = self._call(way, padded)
        if kind == "last":
            return found
        return found[:, :t] if way.length > t else found

    def _stack(self, rows: list[Any], axis: int) -> Any:
        return self.library.array(np.stack([self.library.host(row) for row in rows], axis))

    def both(self, ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits, and the hidden states (B, T, C) where they can be seen, [] else."""
        logits = self._checked(ids)
        try:
            states = self._states(ids)
        except Exception:  # a block that cannot be watched, for whatever reason, is no reason to have no logits
            return logits, []
        return logits, states

    def _states(self, ids: np.ndarray) -> list[np.ndarray]:
        """What enters the first block, and what each gives; [] if that is not what enters the next."""
        b, t = ids.shape
        longest, once = max(t, self.way.length), dataclasses.replace(self.way, growing=False)
        padded = np.pad(ids, ((0, 0), (0, longest - t)))
        rows: list[list[np.ndarray]] = []
        with self.library.watch(self.model, self.n_layer) as seen:
            for part in [row[None] for row in padded] if self.way.axes == "T" else [padded]:
                self._call(once, part)
                rows.append([_batch_first(self.library.host(state), len(part), longest) for state in seen()])
        found = [np.concatenate(several)[:, :t] for several in zip(*rows, strict=True)]
        entered, gave = found[0::2], found[1::2]
        chained = all(np.array_equal(one, other) for one, other in zip(entered[1:], gave[:-1], strict=True))
        states = [*entered[:1], *gave]
        fits = all(state.shape == states[0].shape and state.shape[:2] == (b, t) and state.ndim == 3 for state in states)
        return states if fits and chained and len(gave) > 1 else []

    def _kind(self, way: Way, ids: np.ndarray) -> str:
        return self._call(way, ids)[1]

    def _call(self, way: Way, ids: np.ndarray) -> tuple[Any, str]:
        """Logits, and whether they are of ``all`` positions, (B, T, V), or of the ``last``, (B, V)."""
        if way.axes == "T":
            rows = [self._one(way, row, 1, len(row)) for row in ids]
            return self._stack([row for row, _ in rows], 0).reshape(
                *((len(ids), -1) if rows[0][1] == "all" else (len(ids),)), self.vocab_size
            ), rows[0][1]
        if way.axes == "TB":
            found, kind = self._one(way, ids.T, *ids.T.shape)
            return (found.swapaxes(0, 1) if kind == "all" else found), kind
        return self._one(way, ids, *ids.shape)

    def _one(self, way: Way, ids: np.ndarray, b: int, t: int) -> tuple[Any, str]:
        """One call, on ids (b, t) or (t,)."""
        native = self.library.array(ids.astype(np.int64))
        given: dict[str, Any] = {}
        steps = ids.shape[0] if way.axes in ("TB", "T") else t
        rows = ids.shape[1] if way.axes == "TB" else b
        for each in self._rest:
            value = self._value(each, way, native, rows, steps)
            if value is not inspect.Parameter.empty:
                given[each.name] = value
        ordered = [
            given.pop(each.name) for each in self._rest if each.kind is each.POSITIONAL_ONLY and each.name in given
        ]
        try:
            answer = self.model(native, *ordered, **given)
        except Exception as error:
            cure = "; it is run on the CPU: take the device of the ids" if "CUDA" in str(error) else ""
            raise TheirError(f"{told(error, self.path)}{cure}") from None
        return self._logits(answer, b, t)

    def _value(self, parameter: inspect.Parameter, way: Way, ids: Any, rows: int, steps: int) -> Any:
        """What a parameter of forward after the ids gets; empty where it stays as it is.

        Raises:
            UserError: a required one of which nobody knows what it wants.
        """
        name, needed = parameter.name, parameter.default is parameter.empty
        if name == way.mask:
            made = mask_of(way.kind, rows, steps)
            return self.library.array(made) if isinstance(made, np.ndarray) else made
        if name == way.targets:
            return ids
        if name in ON or name in OFF:
            return (
                name in ON
                if needed or name in ("deterministic", "training", "train", "is_training")
                else parameter.empty
            )
        if not needed:
            return parameter.empty
        if name in STARTS:
            return 0
        if name in PLACES:
            return self.library.array(np.arange(steps))
        if name in NOTHING or name in MASKS or name in TARGETS:
            return None
        raise UserError(
            f"{self.path}: {self.name}: its forward needs {name}, which is not known:"
            " give it a default, or make a sample yourself for --like (docs/adopt.md)"
        )

    def _logits(self, answer: Any, b: int, t: int) -> tuple[Any, str]:
        """The logits in what a call returned."""
        v = self.vocab_size
        arrays = [each for each in _arrays(answer, self.library) if each.ndim >= 1]
        for each in arrays:
            shape = tuple(each.shape)
            if shape in ((b, t, v), (b * t, v)):
                return each.reshape(b, t, v), "all"
            if shape == (b, v, t) and v != t:
                return each.swapaxes(1, 2), "all"
            if shape in ((b, v), (b, 1, v)) or (b == 1 and shape == (v,)):
                return each.reshape(b, v), "last"
        listed = ", ".join(str(tuple(each.shape)) for each in arrays[:4]) or type(answer).__name__
        raise UserError(f"{self.path}: {self.name} gives {listed} for ids ({b}, {t}): expected logits ({b}, {t}, {v})")


def _batch_first(state: np.ndarray, b: int, t: int) -> np.ndarray:
    """A hidden state as (B, T, C)."""
    if state.shape[:2] == (t, b) and state.ndim == 3 and b != t:
        return state.swapaxes(0, 1)
    return state[None] if state.ndim == 2 and b == 1 else state


def _arrays(answer: Any, library: Library) -> list[Any]:
    """The arrays in what a model returned, those that are called logits first."""
    if library.is_array(answer):
        return [answer]
    if isinstance(answer, Mapping):
        named: dict[str, Any] = dict(answer)
    elif hasattr(answer, "_asdict"):
        named = getattr(answer, "_asdict")()  # noqa: B009  (a namedtuple)
    elif isinstance(answer, list | tuple):
        return [each for one in answer for each in _arrays(one, library)]
    else:
        named = dict(vars(answer)) if hasattr(answer, "__dict__") else {}
    order = sorted(named, key=lambda name: LOGITS.index(name) if name in LOGITS else len(LOGITS))
    return [named[name] for name in order if library.is_array(named[name])]
