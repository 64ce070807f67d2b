"""Running the models: each framework, and each judge, in a process of its own that writes .npz; nothing is imported."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np

from convert.formats.opened import Opened
from mlxgpt.common import rng
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.protocol import Tokenizer

# as written -> the library, and the module that asks it in a process of its own
JUDGES = {"transformers": ("transformers", "torch_ref.judge"), "mlx-lm": ("mlx_lm", "mlxgpt.judge")}
TOKENS, GREEDY, PROMPT = 64, 64, 8
BEYOND = 16  # tokens past the sliding window


@dataclass(frozen=True)
class Plan:
    """What every program computes: the arguments of ``probe``, and the arrays of it that are wanted."""

    tokens: Path
    count: int
    prompt: int
    gradients: bool
    greedy: bool
    adapted: bool = False  # a side is a base and an adapter, of which only the sum is the other's

    def arguments(self) -> list[str]:
        """As ``probe`` and the judges take them."""
        made = ["--tokens", str(self.tokens), "--prompt", str(self.prompt)]
        made += ["--greedy", str(GREEDY)] if self.greedy else []
        made += ["--scale", "1"] if self.adapted else []
        return made if self.gradients else [*made, "--no-gradients"]


@dataclass
class Runs:
    """Results: arrays by (program, folder's key), and errors by program."""

    arrays: dict[tuple[str, str], Any] = field(default_factory=dict)
    exact: Any = None  # of the first folder, from torch in float64
    failed: dict[str, str] = field(default_factory=dict)


def installed(module: str) -> bool:
    """Whether a library is there; it is not imported."""
    return importlib.util.find_spec(module) is not None


def length(configs: Sequence[ModelConfig]) -> int:
    """Tokens to compute on: 64, or past every sliding window, as far as both contexts hold."""
    windows = [config.window for config in configs if config.window]
    wanted = max([TOKENS, *(window + BEYOND for window in windows)])
    return min(wanted, *(config.block_size for config in configs))


def token_ids(
    configs: Sequence[ModelConfig], tokenizer: Tokenizer | None, data: Path | None, notes: list[str]
) -> np.ndarray:
    """Ids (T + 1,) that both models have, of text where there is a tokenizer; what they are goes into ``notes``.

    Raises:
        UserError: ``data`` cannot be read, or is of no use.
    """
    count, high = length(configs) + 1, min(config.vocab_size for config in configs)
    if data is not None:
        if tokenizer is None:
            raise UserError(f"--data {data}: text needs a tokenizer, and neither model has one")
        found = beginning.start(tokenizer, _text(data))[:count]
        if len(found) < 2 or max(found) >= high:
            raise UserError(f"--data {data}: {len(found)} tokens below {high}: expected at least 2 of the vocabulary")
        notes.append(f"logits on the first {len(found) - 1} tokens of {data}")
        return np.array(found, np.int32)
    if tokenizer is not None:
        try:
            found = beginning.start(tokenizer, "".join(topics.topics.values())[: 16 * count])[:count]
        except UserError:
            found = []
        if len(found) == count and max(found) < high:
            notes.append(f"logits on {count - 1} tokens of Python's language reference")
            return np.array(found, np.int32)
    notes.append(
        f"logits on {count - 1} drawn tokens: no tokenizer for both models' vocabulary gives that many of text"
    )
    return rng.integers(0, "verify", count=count, high=high).astype(np.int32)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def write_plan(ids: np.ndarray, work: Path, gradients: bool, greedy: bool, adapted: bool = False) -> Plan:
    """Puts the ids where the programs find them."""
    np.save(work / "ids.npy", ids)
    return Plan(work / "ids.npy", len(ids) - 1, min(PROMPT, len(ids) - 1), gradients, greedy, adapted)


def run_framework(name: str, folders: dict[str, Path], plan: Plan, work: Path, runs: Runs) -> None:
    """One framework on all folders, in one process; torch also in float64 on the first."""
    if not folders:
        return
    out = work / name
    out.mkdir()
    command = ["-m", PACKAGES[name], "probe", *map(str, folders.values()), "--out", str(out), "--device", "cpu"]
    error = _run([*command, *plan.arguments(), *(["--exact"] if name == "torch" else [])])
    for number, key in enumerate(folders):
        if (out / f"{number}.npz").is_file() and not error:
            runs.arrays[name, key] = np.load(out / f"{number}.npz")
    if (out / "0.exact.npz").is_file() and not error:
        runs.exact = np.load(out / "0.exact.npz")
    if error:
        runs.failed[name] = error


def run_judge(judge: str, key: str, opened: Opened, plan: Plan, probes: Sequence[str], work: Path, runs: Runs) -> None:
    """A library on the folder that it judges."""
    out, texts, model = work / f"{judge}-{key}.npz", work / "probes.json", work / "model.json"
    texts.write_text(json.dumps(probes))
    model.write_text(json.dumps(dataclasses.asdict(opened.config)))
    command = ["-m", JUDGES[judge][1], str(opened.path), "--model", str(model), "--out", str(out)]
    command += ["--probes", str(texts)]
    error = _run([*command, *plan.arguments()])
    if error:
        runs.failed[f"{judge} {key}"] = error
    else:
        runs.arrays[judge, key] = np.load(out)


def _run(arguments: list[str]) -> str:
    """'' or the last line of what a process said before it failed."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, nothing said"]
    return said[-1]
