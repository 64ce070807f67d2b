"""The memory check before every training run: a plan before anything is allocated."""

import dataclasses
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.plan import advice, chips, machine
from mlxgpt.common.plan import compute as plan_compute
from mlxgpt.common.plan import measured as measured_plan
from mlxgpt.common.plan import memory as plan_memory
from mlxgpt.common.plan import show as plan_show
from mlxgpt.common.plan.memory import Memory

FILE = "plan.json"


def room(backend: Backend, device: Any) -> dict[str, int]:
    """Bytes that the device has; see machine.room."""
    return machine.room(backend.engine.devices.capacity(device))


@dataclasses.dataclass
class Gate:
    """The plan of a run; ``finish`` compares it with what was measured."""

    recipe: Recipe
    backend: Backend
    device: str
    memory: Memory | None
    seconds: float | None
    before: int  # peak memory of the process before the run
    began: float

    def finish(self, run: Path, engine: Any) -> str:
        """Predicted and measured memory in one line; writes the run's plan.json."""
        spent = time.perf_counter() - self.began
        memory = self.memory or plan_memory.plan(
            self.recipe, measured_plan.computed(self.backend.name, self.device != "cpu")
        )
        measured, how = engine.memory()["peak"], "arrays"
        if (self.backend.name, self.device) == ("torch", "cpu"):
            # the resident memory of the process, which exceeds PyTorch's tensors
            measured, how = max(0, measured - self.before), "resident"
        made = {
            "predicted_peak": memory.peak,
            "components": memory.components,
            "measured_peak": measured,
            "measured": how,
            "predicted_seconds": self.seconds,
            "measured_seconds": spent,
            "backend": self.backend.name,
            "device": self.device,
        }
        (run / FILE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        more = " (resident, without the framework itself)" if how == "resident" else ""
        return f"memory: {plan_show.size(memory.peak)} predicted, {plan_show.size(measured)} measured{more}"


def gate(recipe: Recipe, backend: Backend, args: Namespace) -> Gate:
    """Plans a run before anything is allocated.

    Raises:
        UserError: out of memory is predicted, and ``args.force`` is not set; names settings that would fit.
    """
    device = backend.engine.devices.find(args.device)
    described = backend.engine.devices.describe(device)["device"]
    where, memory = room(backend, device), None
    # to measure costs seconds: a run far from the limit is compared with the closed form at its end
    if plan_memory.at_most(recipe) > where["limit"] / 2:
        with measured_plan.Measured(backend.name, args.device, described == "cpu", where["limit"]) as measure:
            memory = plan_memory.plan(recipe, measure)
            if memory.whole > where["limit"] and not args.force:
                settings = plan_memory.fitting(recipe, measure, where["limit"])
                fits = advice.as_flags(settings or {})
                raise UserError(
                    f"memory: {plan_show.size(memory.whole)} predicted, {plan_show.size(where['limit'])} free: "
                    + (f"would fit: {fits}" if fits else "no micro-batch fits: expected a smaller model")
                    + "; --force starts it anyway"
                )
    chip = chips.chip_of(described)
    seconds = plan_compute.seconds(recipe, plan_memory.length(recipe), chip) if chip else None
    before = backend.engine.devices.memory(device)["peak"] if backend.name == "torch" else 0
    return Gate(recipe, backend, described, memory, seconds, before, time.perf_counter())
