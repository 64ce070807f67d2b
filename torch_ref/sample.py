"""A user's own model in PyTorch, run for its numbers; see common/user_code/run.py."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from mlxgpt.common.user_code import run
from mlxgpt.common.user_code.run import Arrays


def flat(model: Any) -> dict[str, Any]:
    """The arrays of a model by name."""
    return model.state_dict(keep_vars=True)


class Library:
    """PyTorch, on the CPU and in float32."""

    def __init__(self) -> None:
        torch.backends.mha.set_fastpath_enabled(False)  # another order of sums, and no hooks
        torch.backends.mps.is_available = lambda: False  # type: ignore[method-assign]

    def is_model(self, thing: Any) -> bool:
        """Whether it is a module, or a class of one."""
        return isinstance(thing, nn.Module) or (isinstance(thing, type) and issubclass(thing, nn.Module))

    def forward(self, model: Any) -> Callable[..., Any]:
        """What is called, for its signature."""
        return model.forward

    def quiet(self) -> contextlib.AbstractContextManager[Any]:
        """No gradients."""
        return torch.no_grad()

    def array(self, values: np.ndarray) -> Any:
        """An array of the framework."""
        return torch.from_numpy(np.ascontiguousarray(values))

    def is_array(self, thing: Any) -> bool:
        """Whether it is one."""
        return isinstance(thing, torch.Tensor)

    def host(self, array: Any) -> np.ndarray:
        """An array as numpy, floats as float32."""
        return array.detach().float().cpu().numpy()

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Everything that a model holds, by name."""
        return {name: tuple(value.shape) for name, value in flat(model).items()}

    def buffers(self, model: Any) -> set[str]:
        """The names of it that are no parameters."""
        return {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def groups(self, model: Any) -> dict[str, int]:
        """Name -> a number that is the same for names of one and the same array."""
        return {name: id(value) for name, value in flat(model).items()}

    def put(self, model: Any, values: Mapping[str, np.ndarray]) -> None:
        """Sets these, in float32 on the CPU, and puts the model in evaluation mode."""
        model.to("cpu").float().eval()
        held = flat(model)
        with torch.no_grad():
            for name, value in values.items():
                held[name].copy_(self.array(value))

    def blocks(self, model: Any, n_layer: int) -> list[Any]:
        """The list of ``n_layer`` modules that holds most of the model; of any length where 0."""
        lists = [each for each in model.modules() if isinstance(each, nn.ModuleList | nn.Sequential | nn.ModuleDict)]
        found = [list(each.children()) for each in lists]
        fits = [each for each in found if len({type(m) for m in each}) == 1 and len(each) == (n_layer or len(each))]
        return max(fits, key=lambda each: sum(p.numel() for m in each for p in m.parameters()), default=[])

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

        hooks = [each.register_forward_hook(lambda _, given, gave: after(gave)) for each in blocks]
        hooks += [
            each.register_forward_pre_hook(
                lambda module, given, named: before(module is blocks[0], (*given, *named.values())), with_kwargs=True
            )
            for each in blocks
        ]
        try:
            yield lambda: seen if len(seen) == 2 * len(blocks) else []
        finally:
            for hook in hooks:
                hook.remove()

    def gradients(self, model: Any, call: Callable[[], Any], targets: np.ndarray) -> Arrays:
        """Of the mean next-token loss, by their names; ``call`` gives logits (1, T, V)."""
        model.zero_grad()
        nn.functional.cross_entropy(call().flatten(0, 1).float(), self.array(targets).flatten().long()).backward()
        for name, value in model.named_parameters():
            yield name, self.host(torch.zeros_like(value) if value.grad is None else value.grad)


if __name__ == "__main__":
    sys.exit(run.main(Library(), sys.argv[1:]))
