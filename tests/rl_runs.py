"""Runs of reinforcement learning on a tiny model: its folder, prompts and rewards, and what a run leaves."""

import json
from pathlib import Path
from typing import Any

from mlxgpt import cli
from mlxgpt.common.align.rl import rollouts
from mlxgpt.common.align.rl.reinforcing import Reinforcing
from mlxgpt.common.folders import model_folder, resolve
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build
from mlxgpt.common.runs import metrics
from mlxgpt.common.tokenizers import load as tokenizer

BACKENDS = ("mlx", "torch")
ASKED = ("red", "blue", "green", "two", "three", "cat", "dog")
REWARDS = '''
import time

def letters(prompts, completions, answer, **columns):
    """More letters and the answer's first one."""
    return [min(8, sum(map(str.isalpha, text))) / 8 + (a[0] in text) for text, a in zip(completions, answer)]

def same(prompts, completions):
    return [1.0] * len(completions)

def raises(prompts, completions, answer):
    return [1 / len(text.strip("abcdefghijklmnopqrstuvwxyz ")[:0]) for text in completions]

def nan(prompts, completions, answer):
    return [float("nan")] + [0.0] * (len(completions) - 1)

def short(prompts, completions):
    return [0.0] * (len(completions) - 1)

def words(prompts, completions):
    return ["good"] * len(completions)

def moody(prompts, completions):
    return [time.perf_counter()] * len(completions)

def hangs(prompts, completions):
    time.sleep(60)

def dies(prompts, completions):
    import os
    os._exit(3)

calls = 0
def later(prompts, completions):
    """Right twice, at the first rollout, and wrong from then on."""
    global calls
    calls += 1
    return [0.0 if calls > 2 else float(len(text)) for text in completions][: None if calls < 3 else 1]
'''
SMALL = [
    "rl.prompts=2", "rl.completions=4", "rl.max_tokens=8", "rl.updates=2", "optim.lr=2e-3", "train.save_every=0",
    "train.sample_every=0", "train.compile=off", "adapter.rank=2",
]  # fmt: skip


def make(place: Path) -> Path:
    """Fills a folder with a model of two layers, prompts and rewards."""
    texts = [f"say {one} {two} and {one}\n" for one in ASKED for two in ASKED]
    spelled = tokenizer.train_tokenizer("bpe", texts, 280)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_hidden": 64, "block_size": 40, "vocab_size": spelled.n_vocab}
    model = build({"model": {"family": "llama", **sizes}}).model
    weights = params.init_params(model, 3)
    model_folder.write_model(place / "base", model, weights, tokenizer=spelled)
    rows = [{"prompt": f"say {word} and", "answer": word} for word in ASKED[:5]]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "rewards.py").write_text(REWARDS)
    return place


def go(
    out: str, *words: str, reward: str = "rewards.py:letters", steps: int = 6, prompts: str = "prompts.jsonl"
) -> int:
    """``mlxgpt rl`` on the CPU."""
    sets = [word for item in SMALL for word in ("--set", item)]
    rewards = ["--reward", reward] if reward else []
    base = ["rl", "--model", "base", "--prompts", prompts, *rewards, "--out", out, "--steps", str(steps)]
    return cli.main([*base, *sets, "--device", "cpu", *words])


def lines(run: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return list(metrics.read_lines(Path(run) / metrics.FILE))


def drawn(run: str) -> bytes:
    return (Path(run) / rollouts.FILE).read_bytes()


def weights(run: str) -> dict[str, bytes]:
    """The files of the newest checkpoint."""
    last = resolve.path_of(Path(run), resolve.steps_of(Path(run))[-1])
    return {path.name: path.read_bytes() for path in sorted(last.rglob("*.safetensors"))}


def gap(one: str, other: str, name: str) -> float:
    pairs = zip(lines(one), lines(other), strict=True)
    return max(abs(first[name] - second[name]) for first, second in pairs)


def opened(*words: str) -> Reinforcing:
    """A kind whose source is open."""
    parser = cli.Parser()
    cli.VERBS["rl"].declare(parser)
    sets = [word for item in SMALL for word in ("--set", item)]
    prompts = [] if "--prompts" in words else ["--prompts", "prompts.jsonl"]
    base = ["-m", "base", *prompts, "--reward", "exact", "--backend", "torch", "--device", "cpu"]
    kind = Reinforcing(parser.parse_args([*base, *sets, *words]))
    kind.read_settings()
    kind.open_model()
    kind.open_source()
    return kind
