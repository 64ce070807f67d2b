"""Rung 5 through files: stopped in one framework and process, resumed in another.

Same framework: bit-equal to the run that was not stopped. The other one: within 2e-5 of it, every loss to the end. Four
processes do it all: each framework trains and stops, then each resumes what both left.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlxgpt.common.folders import resolve, tensors
from mlxgpt.common.recipes import build, read_toml
from mlxgpt.common.runs import checkpoint, metrics

BACKENDS = ("mlx", "torch")
STEPS, STOP = 36, 15
GATE = 2e-5
COMMON = [
    "model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=24", "data.tokenizer=char",
    "train.batch_size=8", "train.micro_batch_size=4", "train.dropout=0.2", "train.eval_every=10", "train.save_every=10",
    "train.keep=0", "train.early_stop=0", "optim.warmup=5", "sample.max_tokens=0",
]  # fmt: skip
CASES = {
    "adamw-random": ["model.family=gpt2", "data.sampling=random", "optim.lr=3e-3", "optim.weight_decay=0.1"],
    "muon-epoch": [
        "model.family=llama",
        "model.n_kv_head=1",
        "data.sampling=epoch",
        "optim.name=muon",
        "optim.lr=3e-3",
    ],
}
RUN_ALL = "import sys, json; from mlxgpt import cli; sys.exit(max(cli.main(argv) for argv in json.loads(sys.argv[1])))"


def run_all(commands: list[list[str]], place: Path) -> str:
    """Commands of mlxgpt, one after the other, in one new process."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MLXGPT_CACHE": str(place / "cache")}
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def scale_second_moments(run: Path) -> None:
    """A mutation: second moments a thousandth too large, in a checkpoint whose sums hold."""
    place = resolve.path_of(run, STOP)
    state, config = checkpoint.verify(place), build(read_toml(run / "recipe.toml")).model
    snapshot = checkpoint.read_snapshot(place, config)
    snapshot["v"] = {name: array * np.float32(1.001) for name, array in snapshot["v"].items()}
    checkpoint.write(run, snapshot, config, None, state, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every run of this file has been made."""
    place = tmp_path_factory.mktemp("resume")
    words = [
        f"{a} {b} the {c}." for a in ("one", "two", "six") for b in ("sees", "likes") for c in ("cat", "dog", "owl")
    ]
    order = np.random.default_rng(0).integers(0, len(words), 600)
    (place / "text.txt").write_text("\n".join(words[i] for i in order))
    (place / "recipe.toml").write_text('[data]\nsource = "text.txt"\n')
    outputs = []
    for backend in BACKENDS:
        commands = []
        for case, settings in CASES.items():
            sets = [word for item in COMMON + settings for word in ("--set", item)]
            base = ["train", "./recipe.toml", "--backend", backend, "--device", "cpu", "--steps", str(STEPS), *sets]
            commands.append([*base, "--out", f"{case}-{backend}"])
            commands.append([*base, "--out", f"{case}-{backend}-stopped", "--stop-after", str(STOP)])
        outputs.append(run_all(commands, place))
    for backend in BACKENDS:
        commands = []
        for case in CASES:
            for origin in BACKENDS:
                run = f"{case}-{origin}-{backend}"
                shutil.copytree(place / f"{case}-{origin}-stopped", place / run, symlinks=True)
                commands.append(["train", "--resume", run, "--backend", backend, "--device", "cpu"])
            mutated = f"{case}-{backend}-mutated"
            shutil.copytree(place / f"{case}-{backend}-stopped", place / mutated, symlinks=True)
            scale_second_moments(place / mutated)
            commands.append(["train", "--resume", mutated, "--backend", backend, "--device", "cpu"])
        outputs.append(run_all(commands, place))
    (place / "output").write_text("\n".join(outputs))
    return place


def losses(run: Path) -> np.ndarray:
    """Every train and validation loss, in the order of the file."""
    found = [(entry["step"], entry["split"], entry["loss"]) for entry in metrics.read_lines(run / metrics.FILE)]
    assert [step for step, split, _ in found if split == "train"] == list(range(1, STEPS + 1))
    assert [step for step, split, _ in found if split == "val"] == [10, 20, 30, STEPS]
    return np.array([loss for _, _, loss in found])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_framework_is_bit_equal(place: Path, case: str, backend: str) -> None:
    whole, resumed = place / f"{case}-{backend}", place / f"{case}-{backend}-{backend}"
    assert losses(resumed).tolist() == losses(whole).tolist()
    ends = [resolve.path_of(run, STEPS) for run in (whole, resumed)]
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert checkpoint.verify(ends[0]) == checkpoint.verify(ends[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("origin", BACKENDS)
def test_the_other_framework_is_within_the_gate(place: Path, case: str, origin: str) -> None:
    other = BACKENDS[1 - BACKENDS.index(origin)]
    resumed, whole = place / f"{case}-{origin}-{other}", losses(place / f"{case}-{origin}")
    gap = float(np.abs(losses(resumed) - whole).max())
    print(f"{case}: {origin} to {other}: {gap:.2e}, gate {GATE:.0e}")
    assert whole[0] - whole[-1] > 0.5
    assert 0 < gap <= GATE
    end = checkpoint.verify(resolve.path_of(resumed, STEPS))
    assert (end.framework, end.t, end.tokens) == (other, STEPS, STEPS * 8 * 24)
    assert [entry["framework"] for entry in json.loads((resumed / "environment.json").read_text())] == [origin, other]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_moments_a_thousandth_off_are_over_the_gate(place: Path, case: str, backend: str) -> None:
    gap = float(np.abs(losses(place / f"{case}-{backend}-mutated") - losses(place / f"{case}-{backend}")).max())
    print(f"{case}: {backend}: {gap:.2e}")
    assert gap > GATE


def test_moments_are_saved_under_the_names_of_the_weights(place: Path) -> None:
    for case in CASES:
        files = [resolve.path_of(place / f"{case}-{backend}", STEPS) / checkpoint.OPTIMIZER for backend in BACKENDS]
        mlx, torch = (tensors.read_tensors(file) for file in files)
        assert mlx.keys() == torch.keys() and mlx["t"] == torch["t"] == STEPS
        assert all(mlx[name].shape == torch[name].shape for name in mlx)


def test_only_a_change_of_framework_is_said_to_change_bits(place: Path) -> None:
    lines = [line for line in (place / "output").read_text().splitlines() if "not bit-equal" in line]
    assert len(lines) == 2 * len(CASES)
    assert all("framework mlx -> torch" in line or "framework torch -> mlx" in line for line in lines)
