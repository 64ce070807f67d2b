"""TF32: float32 products of operands that are rounded to 10 bits of mantissa. Off, unless train.tf32 asks for it.

MLX takes it by default where the hardware has it (an M5 from macOS 26.2 on, CUDA from Ampere on): MLX_ENABLE_TF32, read
once a process, at the first product. Products are then about 1e-3 off, and no two frameworks give one curve.
"""

import contextlib
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common import recipes
from mlxgpt.common.errors import UserError

VARIABLE = "MLXGPT_TF32"
"""1 asks for TF32 from Python, before mlxgpt is imported; the verbs that take a recipe set it from train.tf32."""
NOTE = "TF32 is on: float32 products are rounded to 10 bits of mantissa, and the gates are not made for that"


def asked() -> bool:
    """Whether this process asks for TF32.

    Raises:
        UserError: MLXGPT_TF32 is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise UserError(f"{VARIABLE}={value}: expected 0 or 1")
    return value == "1"


def take(args: Namespace) -> None:
    """Sets VARIABLE as train.tf32 of a verb's recipe, run, --config or --set says, before a framework is imported."""
    if not hasattr(args, "set"):
        return
    recipe, resumed, config = (getattr(args, name, None) for name in ("recipe", "resume", "config"))
    train: dict[str, Any] = {}
    with contextlib.suppress(UserError, TypeError, ValueError):  # what is wrong with it is said by the verb
        if recipe:
            path = recipes.find(recipe)
        else:
            path = Path(resumed, "recipe.toml") if resumed else Path(config or "").expanduser()
        if path.suffix not in ("", ".yaml", ".yml"):  # mlx-lm's has no such key
            train = dict(recipes.read_toml(path).get("train", {}))
    with contextlib.suppress(UserError):
        train = recipes.apply_sets({"train": train}, args.set)["train"]
    os.environ[VARIABLE] = "1" if train.get("tf32") is True else "0"


def override(on: bool) -> None:
    """NVIDIA's own variable is stronger than what a program sets; cuBLAS reads it when it starts."""
    if "NVIDIA_TF32_OVERRIDE" in os.environ:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "1" if on else "0"


def judged(state: str) -> str:
    """What a gate says of a device whose TF32 is ``on``, ``off`` or ``unknown``: a line, or ''.

    Raises:
        UserError: unknown, and so nothing can be judged.
    """
    if state == "unknown":
        raise UserError(
            "TF32 is on: MLX was imported before mlxgpt and may round float32 products to 10 bits of mantissa, so no "
            "gate can be judged; import mlxgpt first, or set MLX_ENABLE_TF32=0"
        )
    return NOTE if state == "on" else ""
