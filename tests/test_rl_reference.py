"""Runs of mlxgpt rl recomputed from their rollouts alone, and faults that the comparison must find."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import policy_reference
import pytest
import rl_runs
import torch
from rl_runs import SMALL, lines, opened

from mlxgpt import cli
from mlxgpt.common import backend
from mlxgpt.common.align.rl import rollouts
from mlxgpt.common.align.rl.source import RolloutSource
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build, read_toml
from mlxgpt.common.tokenizers import load as tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts and rewards."""
    return rl_runs.make(tmp_path_factory.mktemp("rl"))


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(place)
    return place


def test_the_end_that_was_drawn_is_trained_and_the_prompt_is_not(at: Path) -> None:
    source = opened().source
    prompt = source.prompts.rows[1]
    ended, cut = (
        rollouts.Line(1, 1, "", ids, ended, "", {}, 0.0, 0.5, [0.0] * len(ids))
        for ids, ended in (([40, 41, source.tokenizer.eos_id], True), ([40, 41, 42, 43], False))
    )
    made = source._made(0, [ended, cut] * 4)
    trained = made.batch.targets[0][made.batch.weights[0] > 0].tolist()
    assert trained == ended.ids and len(prompt.ids) > 1
    assert made.batch.weights[0].max() == pytest.approx(1 / 3) and made.batch.weight == 8
    masked = opened("--set", "rl.mask_truncated=true", "--set", "rl.method=dapo").source._made(0, [ended, cut] * 4)
    assert masked.batch.weights[1].sum() == 0 and masked.batch.weights.sum() == pytest.approx(8)


METHODS = {
    "grpo": ("mlx", ["rl.kl=0.3"]),
    "dr_grpo": ("torch", []),
    "dapo": ("mlx", ["rl.clip=0.01", "rl.kl=0.1", "rl.kl_ratio=false"]),
    "rloo": ("torch", ["rl.kl=0.05", "rl.clip=0.05"]),
}


def learned(method: str, name: str = "", *more: str) -> str:
    """A run of all weights, whose completions often end; its folder."""
    own, sets = METHODS[method]
    out = f"{method}-{name or own}"
    shutil.rmtree(out, ignore_errors=True)
    if not Path("ending").exists():
        model, spelled = model_folder.read_config(Path("base")), tokenizer.load_tokenizer(Path("base"))
        ends = list(range(60, 90))
        model_folder.write_model(Path("ending"), model, params.init_params(model, 3), tokenizer=spelled, ends=ends)
    small = [item for item in SMALL if not item.startswith("adapter")]
    every = [*small, "adapter.method=full", "rl.temperature=0.8", f"rl.method={method}", *sets]
    words = [word for item in every for word in ("--set", item)]
    base = ["rl", "-m", "ending", "--prompts", "prompts.jsonl", "--reward", "rewards.py:letters", "-o", out, "-n", "8"]
    assert cli.main([*base, *words, *more, "--backend", name or own, "--device", "cpu"]) == 0
    return out


@torch.no_grad()
def adam(weights: Any, moments: Any, gradients: Any, t: int) -> None:
    """Update ``t`` at rate 2e-3, of gradients whose norm is at most 1; torch.optim takes seconds to import."""
    norm = torch.sqrt(sum((each**2).sum() for each in gradients))  # type: ignore[arg-type]
    for weight, (m, v), gradient in zip(weights, moments, gradients, strict=True):
        clipped = gradient * min(1.0, 1 / (float(norm) + 1e-6))
        m.mul_(0.9).add_(0.1 * clipped)
        v.mul_(0.999).add_(0.001 * clipped**2)
        weight -= 2e-3 * (m / (1 - 0.9**t)) / (torch.sqrt(v / (1 - 0.999**t)) + 1e-8)


def recomputed(run: str, method: str) -> list[float]:
    """The losses of a run, of its rollouts alone: float64 objectives, Adam, rows one after the other."""
    config = build(read_toml(Path(run) / "recipe.toml")).rl
    assert config
    model, spelled = backend.load("torch").load.load("ending", device="cpu")
    model.requires_grad_(True)
    first = copy.deepcopy(model)
    weights = list(model.parameters())
    moments = [(torch.zeros_like(each), torch.zeros_like(each)) for each in weights]
    prompts = [spelled.encode(json.loads(line)["prompt"]) for line in Path("prompts.jsonl").read_text().splitlines()]
    losses = []
    for rows in rollouts.read(Path(run) / rollouts.FILE):

        def asked(net: Any, rows: Any = rows) -> tuple[torch.Tensor, torch.Tensor]:
            made, masks = torch.zeros(len(rows), 8, dtype=torch.float64), torch.zeros(len(rows), 8, dtype=torch.float64)
            for at, row in enumerate(rows):
                before = prompts[row.prompt]
                logits = net(torch.tensor([[*before, *row.ids]]))[0, len(before) - 1 : -1].double() / 0.8
                found = logits.log_softmax(dim=-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
                made[at, : len(row.ids)], masks[at, : len(row.ids)] = found, 1
            return made, masks

        with torch.no_grad():
            (old, mask), (reference, _) = asked(model), asked(first)
        rewards = np.array([row.reward for row in rows])
        if method == "rloo":
            rewards = rewards - config.kl * (old - reference).sum(dim=1).numpy()
        scale = "none" if method in ("dr_grpo", "rloo") else "group"
        better = torch.from_numpy(policy_reference.advantages(rewards.reshape(2, 4), method, scale))
        for _ in range(2):
            high = 0.28 if method == "dapo" else config.clip
            loss = policy_reference.loss(
                method, asked(model)[0], old, reference, better, mask, config.clip, high, config.kl, config.kl_ratio,
                max_tokens=8,
            )  # fmt: skip
            losses.append(float(loss.detach()))
            adam(weights, moments, torch.autograd.grad(loss, weights), len(losses))
    return losses


def apart(run: str, method: str) -> list[float]:
    """How far a run's losses are from that, step by step."""
    pairs = zip(lines(run), recomputed(run, method), strict=True)
    return [abs(line["loss"] - loss) for line, loss in pairs]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_what_the_reference_makes_of_its_rollouts(at: Path, method: str) -> None:
    run = learned(method)
    gaps = apart(run, method)
    print(f"{method}: step 1 {gaps[0]:.1e}, largest {max(gaps):.1e}")
    assert gaps[0] <= 1e-6 and max(gaps) <= 1e-5
    told = lines(run)
    assert max(line["clip_ratio/region_mean"] for line in told) > 0 or method in ("grpo", "dr_grpo")
    rows = [row for each in rollouts.read(Path(run) / rollouts.FILE) for row in each]
    assert 0 < sum(row.ended for row in rows) < len(rows) and max(abs(line["loss"]) for line in told) > 1e-3


def untrained_end(real: Any) -> Any:
    def tokens(self: Any, lines: Any) -> Any:
        made = real(self, lines)
        weights = made.weights.copy()
        for at, line in enumerate(lines):
            if line.ended and len(line.ids) > 1:
                weights[at, np.flatnonzero(weights[at])[-1]] = 0
                line.old[len(line.ids) - 1 :] = []
        return dataclasses.replace(made, weights=weights)

    return tokens


def counted_prompt(real: Any) -> Any:
    def tokens(self: Any, lines: Any) -> Any:
        made = real(self, lines)
        weights = made.weights.copy()
        weights[:, 0] = 1
        for line in lines:
            line.old[len(line.ids) :] = [0.0] * bool(line.old)
        return dataclasses.replace(made, weights=weights)

    return tokens


@pytest.mark.parametrize("fault", [untrained_end, counted_prompt])
def test_a_wrong_mask_is_far_from_the_reference(at: Path, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RolloutSource, "_tokens", fault(RolloutSource._tokens))
    assert max(apart(learned("dapo", "torch", "--set", "rl.kl=0"), "dapo")) > 1e-4
