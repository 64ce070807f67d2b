"""What preference training is held against trl on: pairs in words, a tiny llama, and the settings of both sides.

tests/align_trl.py makes the expected curves of this where trl is installed; tests/test_align_trl.py holds both engines
against them. Nothing here needs a framework.

B rows of a batch, T tokens of a row; rows 2i and 2i + 1 are the better and the worse answer of pair i.
"""

import dataclasses
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.align import reference
from mlxgpt.common.align import source as pair_source
from mlxgpt.common.align.source import PairSource
from mlxgpt.common.align_config import REFERENCE
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import AdapterConfig, ModelConfig, OptimConfig, PreferConfig, Recipe, TrainConfig, TuneConfig
from mlxgpt.common.model import adapters, params
from mlxgpt.common.model_config import SCORE
from mlxgpt.common.recipes import build
from mlxgpt.common.tokenizers.load import train_tokenizer
from mlxgpt.common.tokenizers.padding import with_padding
from mlxgpt.common.tokenizers.protocol import Tokenizer

STEPS, BATCH, CUT = 20, 4, 32
"""Updates, pairs (KTO: rows) of one, and the tokens that are left of a row in the case ``cut``."""
CURVES = Path(__file__).parent / "align_curves.json"
OPTIM = OptimConfig(lr=1e-3, min_lr=1e-3, schedule="constant", warmup=0)
WORDS = (
    "a", "the", "slow", "quick", "river", "stone", "table", "answer", "question", "makes", "gives", "seven", "light",
    "runs", "under", "over", "paper", "again",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A loss and how it is trained; ``trl`` names the trainer there and its settings."""

    trainer: str
    trl: dict[str, Any] = field(default_factory=dict)
    prefer: dict[str, Any] = field(default_factory=dict)
    task: str = "prefer"
    adapter: str = ""  # none, zero (B = 0) or given (B != 0)
    micro: int = 0
    cut: bool = False
    margin: bool = False  # rows have one


CASES = {
    "dpo": Case("DPO"),
    "precomputed": Case("DPO", {"precompute_ref_log_probs": True}),
    "lora": Case("DPO", adapter="zero"),
    "given": Case("DPO", {"precompute_ref_log_probs": True}, adapter="given"),
    "micro": Case("DPO", micro=2),
    "cut": Case("DPO", {"max_length": CUT}, cut=True),
    "robust": Case("DPO", {"loss_type": "robust", "label_smoothing": 0.1}, {"loss": "robust", "smoothing": 0.1}),
    "ipo": Case("DPO", {"loss_type": "ipo"}, {"loss": "ipo"}),
    "sft": Case("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {"sft": 0.5}),
    "kto": Case("KTO", {"undesirable_weight": 1.5}, {"loss": "kto", "undesirable": 1.5}),
    "orpo": Case("ORPO", {}, {"loss": "orpo"}),
    "simpo": Case(
        "CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0},
        {"loss": "simpo", "beta": 2.0, "gamma": 0.5},
    ),
    "reward": Case("Reward", task="reward"),
    "centered": Case(
        "Reward", {"center_rewards_coefficient": 0.1}, {"center": 0.1}, task="reward", adapter="given", margin=True
    ),
}
UNTRIED = {"cdpo": Case("", {}, {"loss": "cdpo", "smoothing": 0.2})}
"""What trl does not have."""


def pairs() -> list[dict[str, Any]]:
    """A prompt and two answers, the better one with its words in order; KTO's rows take one of the two."""
    draw = random.Random(11)

    def words(least: int, most: int) -> list[str]:
        return [WORDS[int(draw.random() * len(WORDS))] for _ in range(least + int(draw.random() * (most - least + 1)))]

    made = []
    for _ in range(STEPS * BATCH):
        prompt = " ".join(words(2, 9)) + "\n"
        made.append({"prompt": prompt, "chosen": " ".join(sorted(words(1, 14))), "rejected": " ".join(words(1, 14))})
        made[-1]["label"], made[-1]["margin"] = draw.random() < 0.5, round(draw.random(), 2)
    return made


def tokenizer() -> Tokenizer:
    """Bytes and some merges, none over the end of a prompt."""
    return train_tokenizer("bpe", [" ".join(WORDS * 3), "\n"], 300)


def model(case: Case) -> ModelConfig:
    """A llama with grouped queries, or its reward model, whose tokenizer pads with a token of its own."""
    read, labels = tokenizer(), SCORE if case.task == "reward" else ()
    read = with_padding(read) if labels else read
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48, block_size=64, vocab_size=read.n_vocab)
    return dataclasses.replace(build({"model": {"family": "llama"} | sizes}).model, labels=labels)


def recipe(case: Case) -> Recipe:
    """Ours of the case."""
    return Recipe(
        model=model(case),
        optim=OPTIM,
        train=TrainConfig(steps=STEPS, batch_size=BATCH, micro_batch_size=case.micro, compile="off"),
        tune=TuneConfig(task=case.task, date="2026-11-25"),
        adapter=AdapterConfig(rank=4, alpha=8.0) if case.adapter else AdapterConfig(method="full"),
        prefer=PreferConfig(**case.prefer),
    )


def weights(made: Recipe) -> dict[str, np.ndarray]:
    """The base's: three times the usual, so that attention is not flat."""
    drawn = params.init_params(made.model, 3)
    return {name: array if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 3 * array
            for name, array in drawn.items()}  # fmt: skip


def adapter(case: Case, made: Recipe, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The adapter that is trained on; given, as after a training."""
    if not case.adapter:
        return {}
    drawn = adapters.init(made, base)
    for name in drawn if case.adapter == "given" else ():
        if name.endswith("lora_b"):
            drawn[name] = rng.normal(5, name, shape=drawn[name].shape, std=0.05)
    return drawn


def rows(case: Case) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) as ids, the end included, in the order of a batch's rows; of KTO one a pair."""
    read, made = tokenizer(), []
    for each in pairs():
        answers = ("chosen" if each["label"] else "rejected",) if case.trainer == "KTO" else ("chosen", "rejected")
        for answer in answers:
            ids = [list(read.encode(each[key])) for key in ("prompt", answer)]
            made.append((ids[0], [*ids[1], read.eos_id]))
    return made


def arrays(case: Case, texts: list[tuple[list[int], list[int]]], width: int) -> Batch:
    """Rows (B, T) of ``width`` without what else an objective reads: a target for each token of an answer."""
    tokens, targets = np.zeros((2, len(texts), width), np.int32)
    held = np.zeros((len(texts), width), np.float32)
    for b, (prompt, answer) in enumerate(texts):
        ids = (prompt + answer)[: CUT if case.cut else None]
        if case.task == "reward":
            tokens[b, : len(ids)], held[b, len(ids) - 1] = ids, 1
        else:
            tokens[b, : len(ids) - 1], targets[b, : len(ids) - 1] = ids[:-1], ids[1:]
            held[b, len(prompt) - 1 : len(ids) - 1] = 1
    alone = case.trainer == "KTO"
    return Batch(tokens, targets, held, together=1 if alone else 2, each=1.0 if alone else 0.5)


def batches(case: Case) -> list[Batch]:
    """The batch of each step, in order, without the reference's log-probabilities."""
    texts, lines = rows(case), pairs()
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    size = BATCH if case.trainer == "KTO" else 2 * BATCH
    made = []
    for step in range(STEPS):
        here, of = texts[step * size : (step + 1) * size], lines[step * BATCH : (step + 1) * BATCH]
        batch, beside = arrays(case, here, width), {}
        if case.task == "reward":
            margins = [each["margin"] if case.margin else 0.0 for each in of]
            beside["margin"] = np.repeat(np.array(margins, np.float32), 2)
        if case.trainer == "KTO":
            beside["good"] = np.array([each["label"] for each in of], np.float32)
        if case.prefer.get("sft") or case.trainer == "ORPO":
            counted = np.array(batch.weights)
            if case.trainer == "ORPO":  # of the prompt too
                for b, (prompt, answer) in enumerate(here):
                    counted[b, : len(prompt + answer) - 1] = 1
            counted[1::2] = 0
            beside["nll"] = counted * np.float32(case.prefer.get("sft", 1.0) * BATCH / counted.sum())
        made.append(dataclasses.replace(batch, beside=beside))
    return made


def mismatched(case: Case) -> list[Batch]:
    """KTO's: each step's prompts with the answers of the rows before them."""
    texts = rows(case)
    width = max(len(prompt) for prompt, _ in texts) + max(len(answer) for _, answer in texts)
    made = []
    for step in range(STEPS):
        here = texts[step * BATCH : (step + 1) * BATCH]
        turned = [(prompt, here[n - 1][1]) for n, (prompt, _) in enumerate(here)]
        made.append(arrays(case, turned, width))
    return made


def source(case: Case, place: Path) -> PairSource:
    """The same rows as our source reads them from a file, in their order; ``place``: an empty folder."""
    made = recipe(case)
    assert made.tune and made.prefer
    for split, lines in (("train", pairs()), ("valid", pairs()[:1])):
        kept = [{key: each[key] for key in _columns(case, each)} for each in lines]
        if case.trainer == "KTO":
            kept = [{**each, "completion": line["chosen" if line["label"] else "rejected"]}
                    for each, line in zip(kept, lines, strict=True)]  # fmt: skip
        (place / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in kept))
    tune = dataclasses.replace(
        made.tune, source=str(place), packing=False, overflow="start", block_size=CUT if case.cut else 0
    )
    found = pair_source.open_source(tune, made.prefer, made.train, tokenizer(), made.model, lambda line: None)
    plans = [[(row,) for row in range(start, start + BATCH)] for start in range(0, STEPS * BATCH, BATCH)]
    found._batches = lambda split, order, epoch=None: plans  # type: ignore[method-assign]
    found._plans.clear()
    found._others.clear()
    return found


def _columns(case: Case, row: dict[str, Any]) -> list[str]:
    if case.trainer == "KTO":
        return ["prompt", "label"]
    return ["prompt", "chosen", "rejected", *(["margin"] if case.margin else [])]


def train_from(found: PairSource, case: Case, engine: Any, count: int) -> dict[str, list[float]]:
    """``loss`` and ``norm`` of the first ``count`` steps, of batches that our source makes."""

    def ask(batch: Batch) -> np.ndarray:
        return reference.logps(engine, batch, 0)

    found.policy = ask
    if case.task == "prefer" and found.prefer.loss in REFERENCE:
        found.reference = reference.measure(found, ("train",), ask, lambda line: None)
    made = {"loss": list[float](), "norm": list[float]()}
    for step in range(1, count + 1):
        stats = engine.train_step(step, found.batch(step).split(case.micro), OPTIM.lr)
        made["loss"].append(stats.loss_sum / stats.weight)
        made["norm"].append(stats.grad_norm)
    return made


def logps(engine: Any, batch: Batch) -> np.ndarray:
    """Log-probabilities (B,) float64 of the rows' answers, as the engine's weights are now."""
    return -(engine.token_losses(batch).astype(np.float64) * batch.weights).sum(axis=1)


def train(case: Case, engine: Any, steps: list[Batch], count: int = STEPS) -> dict[str, list[float]]:
    """``loss``, ``norm`` and, of pairs, ``margin`` of the first ``count`` steps by one of our engines."""
    made = {"loss": list[float](), "norm": list[float](), "margin": list[float]()}
    others = mismatched(case)[:count] if case.trainer == "KTO" else []
    needs = case.trainer in ("DPO", "KTO", "")
    reference = [logps(engine, batch).astype(np.float32) for batch in steps[:count]] if needs else []
    before = [logps(engine, batch) for batch in others]
    for number, batch in enumerate(steps[:count]):
        beside = dict(batch.beside)
        if needs:
            beside["reference"] = reference[number]
        if others:
            z = max(0.0, float((logps(engine, others[number]) - before[number]).mean()))
            beside["kl"] = np.full(BATCH, z, np.float32)
        batch = dataclasses.replace(batch, beside=beside)
        stats = engine.train_step(number + 1, batch.split(case.micro), OPTIM.lr)
        made["loss"].append(stats.loss_sum / stats.weight)
        made["norm"].append(stats.grad_norm)
        if "rewards/margins" in stats.sums:
            made["margin"].append(stats.sums["rewards/margins"] / stats.weight)
    return made
