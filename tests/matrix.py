"""Every pair of formats there and back: A -> B -> A is A, bit for bit; formats that round, after their first rounding.

python tests/matrix.py [--case NAME ...] [--dtype NAME ...]      prints a table a dtype
"""

import argparse
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from models import CASES, weights

from convert import convert, open_model
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import model_folder
from mlxgpt.common.recipes import build


class Format(NamedTuple):
    """One row and column: what --to calls it, its options, and what it does to the weights."""

    to: str
    options: Mapping[str, Any] = {}
    file: str = "model"
    rounds: bool = False
    widens: bool = False  # float32 only


FORMATS = {
    "hf": Format("hf"),
    "mlx-lm": Format("mlx-lm"),
    "mlx-lm, 4 bits": Format("mlx-lm", {"bits": 4, "group_size": 32}, rounds=True),
    "mlx-lm, 8 bits": Format("mlx-lm", {"bits": 8, "group_size": 32}, rounds=True),
    "npz": Format("npz"),
    "gguf": Format("gguf", file="model.gguf"),
    "gguf, Q8_0": Format("gguf", {"bits": 8}, "model.gguf", rounds=True),
    "gguf, Q4_0": Format("gguf", {"gguf_type": "q4_0"}, "model.gguf", rounds=True),
    "nanogpt": Format("nanogpt", file="ckpt.pt"),
    "mingpt": Format("mingpt", file="model.pt"),
    "gptmodel": Format("gptmodel", file="model.pth"),
    "llama2c, version 0": Format("llama2c", {"version": 0}, "model.bin", widens=True),
    "llama2c, version 1": Format("llama2c", {"version": 1}, "model.bin", widens=True),
}
EVERYWHERE = ("hf", "mlx-lm", "mlx-lm, 4 bits", "mlx-lm, 8 bits", "npz", "gguf", "gguf, Q8_0", "gguf, Q4_0")
OWN = {
    "gpt2": ("mingpt", "gptmodel"),
    "gpt2-nobias-erf": ("nanogpt",),
    "gpt2-untied": ("mingpt", "gptmodel"),
    "llama": ("llama2c, version 0", "llama2c, version 1"),
    "llama-gqa": ("llama2c, version 0", "llama2c, version 1"),
}


def wide(config: ModelConfig) -> ModelConfig:
    """``config`` in sizes that groups of 32 divide, so that quantized formats quantize."""
    width = max(64, config.n_embd)
    made = {"n_embd": width, "n_hidden": 4 * width, "head_dim": 0, "rotary_dim": 0, "attn_scale": 0.0}
    keep = {name: value for name, value in vars(config).items() if name not in made}
    return build({"model": keep | made}).model


def expressible(case: str) -> list[str]:
    """The formats that can hold a case."""
    return [name for name in FORMATS if name in EVERYWHERE + OWN.get(case, ())]


def make(source: Path, name: str, place: Path) -> Path:
    """``source`` as a format, in the folder ``place``."""
    form = FORMATS[name]
    place.mkdir(parents=True)
    convert(source, place / form.file, form.to, hash=False, **form.options)
    return place / form.file


def content(path: Path, widened: bool = False) -> tuple[ModelConfig, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """What a model is: its config, and of each tensor dtype, shape and bits; ``widened``: as float32."""
    opened = open_model(path)
    read = {name: np.ascontiguousarray(tensor.read()) for name, tensor in opened.tensors.items()}
    read = {name: array.astype(np.float32) for name, array in read.items()} if widened else read
    return opened.config, {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in read.items()}


def outcome(first: Path, a: str, b: str, place: Path) -> str:
    """What A -> B -> A gives for the model ``first`` in the format ``a``.

    equal: every bit, dtype and field; as float32: every value, where B has no other dtype; once: B rounds, and B -> A
    -> B is B; twice: both round, each by its own grid, so nothing need be equal; DIFFERS: what must be equal is not.
    """
    if FORMATS[a].rounds and FORMATS[b].rounds and a != b:
        return "twice"
    second = make(first, b, place / "b")
    third = make(second, a, place / "a2")
    if FORMATS[b].rounds:
        return "once" if content(make(third, b, place / "b2")) == content(second) else "DIFFERS"
    if content(third) == content(first):
        return "equal"
    return "as float32" if FORMATS[b].widens and content(third, True) == content(first, True) else "DIFFERS"


def table(case: str, dtype: str, place: Path, pairs: Callable[[str, str], bool]) -> dict[tuple[str, str], str]:
    """(A, B) -> its outcome, for those ``pairs`` of the formats that can hold the case."""
    config = wide(CASES[case])
    model_folder.write_model(place / "source", config, weights(config), dtype=dtype)
    made: dict[str, Path] = {}
    refused = {}
    for name in FORMATS:
        try:
            made[name] = make(place / "source", name, place / name)
        except UserError as error:
            refused[name] = str(error)
    assert list(made) == expressible(case), refused
    found = {}
    for a, b in itertools.product(made, made):
        if pairs(a, b):
            found[a, b] = outcome(made[a], a, b, place / "pair")
            shutil.rmtree(place / "pair", ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=model_folder.DTYPES, default=list(model_folder.DTYPES))
    args = parser.parse_args()
    for dtype in args.dtype:
        found: dict[tuple[str, str], Counter] = {}
        for case in args.case:
            with tempfile.TemporaryDirectory() as place:
                for pair, each in table(case, dtype, Path(place), lambda a, b: True).items():
                    found.setdefault(pair, Counter())[each if each != "DIFFERS" else f"DIFFERS {case}"] += 1
        print(f"\nA (row) -> B (column) -> A, {dtype}: {', '.join(args.case)}\n")
        print("| " + " | ".join(["", *FORMATS]) + " |\n|" + "---|" * (len(FORMATS) + 1))
        for a in FORMATS:
            cells = [", ".join(f"{n} {each}" for each, n in found.get((a, b), {}).items()) or "-" for b in FORMATS]
            print(f"| {a} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
