"""A user's own model in MLX, run for its numbers; see common/user_code/run.py."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxgpt.common.user_code import run
from mlxgpt.common.user_code.run import Arrays


def flat(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name."""
    return dict(tree_flatten(tree))


class Library:
    """MLX, on the CPU and in float32."""

    def __init__(self) -> None:
        mx.set_default_device(mx.Device(mx.cpu))

    def is_model(self, thing: Any) -> bool:
        """Whether it is a module, or a class of one."""
        return isinstance(thing, nn.Module) or (isinstance(thing, type) and issubclass(thing, nn.Module))

    def forward(self, model: Any) -> Callable[..., Any]:
        """What is called, for its signature."""
        return model.__call__

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """No gradients."""
        return contextlib.nullcontext()

    def array(self, values: np.ndarray) -> Any:
        """An array of the framework."""
        return mx.array(values.astype(np.int32) if values.dtype == np.int64 else values)

    def is_array(self, thing: Any) -> bool:
        """Whether it is one."""
        return isinstance(thing, mx.array)

    def host(self, array: Any) -> np.ndarray:
        """An array as numpy, floats as float32."""
        return np.array(array.astype(mx.float32))

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Everything that a model holds, by name."""
        return {name: tuple(value.shape) for name, value in flat(model.parameters()).items()}

    def buffers(self, model: Any) -> set[str]:
        """The names of it that are no parameters."""
        return self.shapes(model).keys() - flat(model.trainable_parameters()).keys()

    def groups(self, model: Any) -> dict[str, int]:
        """Name -> a number that is the same for names of one and the same array."""
        return {name: id(value) for name, value in flat(model.parameters()).items()}

    def put(self, model: Any, values: Mapping[str, np.ndarray]) -> None:
        """Sets these, in float32 on the CPU, and puts the model in evaluation mode."""
        model.set_dtype(mx.float32)
        model.update(tree_unflatten([(name, mx.array(value)) for name, value in values.items()]))
        model.eval()

    def blocks(self, model: Any, n_layer: int) -> list[Any]:
        """The list of ``n_layer`` modules that holds most of the model; of any length where 0."""
        lists = [value for each in model.modules() for value in each.values() if isinstance(value, list)]
        found = [each for each in lists if all(isinstance(module, nn.Module) for module in each)]
        fits = [each for each in found if len({type(m) for m in each}) == 1 and len(each) == (n_layer or len(each))]
        return max(
            fits, key=lambda each: sum(value.size for m in each for value in flat(m.parameters()).values()), default=[]
        )

    @contextlib.contextmanager
    def watch(self, model: Any, n_layer: int) -> Iterator[Callable[[], list[Any]]]:
        """What gives, after a call, what entered and left each block in turn; [] where that was not seen."""
        seen: list[Any] = []
        blocks = self.blocks(model, n_layer)

        def before(first: bool, given: tuple[Any, ...]) -> None:
            if first:
                seen.clear()
            seen.append(next(each for each in given if self.is_array(each) and each.ndim > 1))

        def after(gave: Any) -> None:
            seen.append(gave if self.is_array(gave) else next(each for each in gave if self.is_array(each)))

        def watching(kind: Any, first: bool) -> Any:
            class Watching(kind):
                def __call__(self, *given: Any, **named: Any) -> Any:
                    before(first, (*given, *named.values()))
                    gave = super().__call__(*given, **named)
                    after(gave)
                    return gave

            return Watching

        kinds = [type(each) for each in blocks]
        try:
            for each, kind in zip(blocks, kinds, strict=True):
                each.__class__ = watching(kind, each is blocks[0])
            yield lambda: seen if len(seen) == 2 * len(blocks) else []
        finally:
            for each, kind in zip(blocks, kinds, strict=True):
                each.__class__ = kind

    def gradients(self, model: Any, call: Callable[[], Any], targets: np.ndarray) -> Arrays:
        """Of the mean next-token loss, by their names; ``call`` gives logits (1, T, V)."""

        def mean() -> Any:
            return nn.losses.cross_entropy(call(), mx.array(targets), reduction="mean")

        for name, value in flat(nn.value_and_grad(model, mean)()[1]).items():
            yield name, self.host(value)


if __name__ == "__main__":
    sys.exit(run.main(Library(), sys.argv[1:]))
