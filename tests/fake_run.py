"""A framework for the loop to drive that is 60 lines of numpy: a bigram model with AdamW in float64.

State is float32, so it passes through files without a change and a resumed run can be held bit for bit against one that
was not stopped. ``python fake_run.py ARGS`` is ``mlxgpt train ARGS`` with this framework and data made on the spot;
FAKE_DELAY (seconds a step) and FAKE_NAN (steps, by commas) shape it.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlxgpt.common import rng
from mlxgpt.common.batch import Batch, State, StepStats
from mlxgpt.common.config import Recipe
from mlxgpt.common.model import params
from mlxgpt.common.plan.memory import Footprint, Piece

VOCABULARY = 13
FREE = 2**40  # bytes that the fake device has left
Arrays = dict[str, np.ndarray]

RECIPE = """
[model]
n_layer = 1
n_head = 2
n_embd = 8
block_size = 8
[data]
tokenizer = "char"
[optim]
lr = 0.05
warmup = 2
[train]
steps = 12
batch_size = 4
eval_every = 4
save_every = 5
[sample]
prompt = "b"
max_tokens = 3
"""


class Engine:
    """See common/batch.py, Engine. The gradient of ``frozen`` tensors is zero; ``stuck`` ones never move."""

    unused_limits: list[str] = []  # noqa: RUF012  (never written)
    note = ""

    def __init__(self, recipe: Recipe, weights: Arrays, device: str = "auto"):
        self.recipe, self.table = recipe, params.table(recipe.model)
        params.check({name: param.shape for name, param in self.table.items()}, weights)
        self.p = {name: array.copy() for name, array in weights.items()}
        self.m = {name: np.zeros_like(array) for name, array in weights.items()}
        self.v = {name: np.zeros_like(array) for name, array in weights.items()}
        self.t, self.model = 0, self
        self.frozen: set[str] = set()
        self.stuck: set[str] = set()
        self.not_finite = {int(step) for step in os.environ.get("FAKE_NAN", "").split(",") if step}
        self.delay = float(os.environ.get("FAKE_DELAY", "0"))

    def _loss(self, batch: Batch) -> tuple[float, np.ndarray]:
        """Weighted loss sum of logits wte wte^T, and its gradient by wte."""
        table = self.p["wte.weight"].astype(np.float64)
        x, y, w = batch.tokens.reshape(-1), batch.targets.reshape(-1), batch.weights.reshape(-1).astype(np.float64)
        logits = table[x] @ table.T
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        loss = float((-np.log(shares[np.arange(len(y)), y]) * w).sum())
        shares[np.arange(len(y)), y] -= 1
        shares *= w[:, None]
        grad = shares.T @ table[x]
        np.add.at(grad, x, shares @ table)
        return loss, grad

    def train_step(self, step: int, micro_batches: list[Batch], lr: float) -> StepStats:
        time.sleep(self.delay)
        losses, grads = zip(*(self._loss(batch) for batch in micro_batches), strict=True)
        weight = sum(batch.weight for batch in micro_batches)
        # the step addresses the noise, as it does dropout's masks
        noise = 1 + 0.1 * float(rng.normal(self.recipe.train.seed, "noise", step, shape=(1,), std=1.0)[0])
        g = {name: 0.1 * array.astype(np.float64) + 0.01 for name, array in self.p.items()}
        g["wte.weight"] = np.sum(grads, axis=0) / weight * noise
        g |= {name: np.zeros_like(self.p[name]) for name in self.frozen}
        norm = float(np.sqrt(sum(np.square(array).sum() for array in g.values())))
        if step in self.not_finite:
            return StepStats(float("nan"), weight, norm, False)
        self.t += 1
        b1, b2 = self.recipe.optim.beta1, self.recipe.optim.beta2
        for name in self.p:
            if name in self.stuck:
                continue
            m = b1 * self.m[name].astype(np.float64) + (1 - b1) * g[name]
            v = b2 * self.v[name].astype(np.float64) + (1 - b2) * np.square(g[name])
            move = m / (1 - b1**self.t) / (np.sqrt(v / (1 - b2**self.t)) + self.recipe.optim.eps)
            self.p[name] = (self.p[name] - lr * move).astype(np.float32)
            self.m[name], self.v[name] = m.astype(np.float32), v.astype(np.float32)
        zeros = tuple(name for name in self.p if not g[name].any())
        return StepStats(sum(losses), weight, norm, True, zero_grads=zeros)

    def evaluate(self, batch: Batch) -> dict[str, float]:
        time.sleep(self.delay)
        return {"loss": self._loss(batch)[0], "weight": batch.weight}

    def token_losses(self, batch: Batch) -> np.ndarray:
        raise NotImplementedError

    def logps(self, batch: Batch) -> np.ndarray:
        raise NotImplementedError

    def snapshot(self) -> State:
        p, m, v = ({name: array.copy() for name, array in group.items()} for group in (self.p, self.m, self.v))
        return State(params=p, m=m, v=v, t=self.t)

    def load_state(self, state: State) -> None:
        for own, given in ((self.p, state["params"]), (self.m, state["m"]), (self.v, state["v"])):
            params.check({name: param.shape for name, param in self.table.items()}, given)
            own.update(given)
        self.t = state["t"]

    def memory(self) -> dict[str, int]:
        return {"active": 1, "peak": 1}

    def describe(self) -> dict[str, str]:
        threads = os.environ.get("FAKE_THREADS", "1")
        return {"framework": "fake", "version": "1", "device": "cpu", "threads": threads, "compiled": "False"}


class Tokenizer:
    """a is 0, b is 1 and so on."""

    n_vocab, eos_id, ends, kind = VOCABULARY, None, frozenset(), "fake"
    before: list[int] = []  # noqa: RUF012
    templates: dict[str, str] = {}  # noqa: RUF012
    files: dict[str, bytes] = {}  # noqa: RUF012
    digest = hashlib.sha256(b"fake").hexdigest()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


class Source:
    """Rows from a fixed sequence; ``losses`` of the validations can be made to order through ``weights``."""

    vocab_size = VOCABULARY

    def __init__(self, seed: int, rows: int, block: int, content: int = 0):
        # token x is mostly followed by 3 x + 1
        self.seed, self.rows, self.block = seed, rows, block
        self.tokens = np.zeros(400, np.int32)
        for i, draw in enumerate(rng.integers(content, "corpus", count=399, high=130)):
            self.tokens[i + 1] = draw % VOCABULARY if draw < 26 else (3 * self.tokens[i] + 1) % VOCABULARY
        self.digest = {"train-00000.bin": hashlib.sha256(self.tokens).hexdigest(), "tokenizer": Tokenizer.digest}  # type: ignore[arg-type]

    def _batch(self, starts: np.ndarray) -> Batch:
        rows = np.stack([self.tokens[start : start + self.block + 1] for start in starts])
        names = tuple(f"train token {start}" for start in starts)
        return Batch(rows[:, :-1], rows[:, 1:], np.ones((len(starts), self.block), np.float32), row_ids=names)

    def batch(self, step: int) -> Batch:
        return self._batch(rng.integers(self.seed, "batch", step, count=self.rows, high=300))

    def validation(self) -> Iterator[Batch]:
        for start in (310, 350):
            yield self._batch(np.arange(start, start + 4 * self.block, self.block))

    @property
    def statistics(self) -> dict[str, int]:
        return {"train_tokens": 300, "val_tokens": 100, "val_bytes": 100}

    def check_vocabulary(self, size: int) -> None:
        assert size == VOCABULARY


def open_data(data: Any, block: int, train: Any, out: Path | None = None, say: Any = print) -> tuple[Source, Tokenizer]:
    """In place of common.data.open_data; data.text_key other than "text" stands for other content."""
    content = int(os.environ.get("FAKE_CONTENT", "0"))
    return Source(train.seed, train.batch_size, block, content), Tokenizer()


def load_backend(name: str) -> Any:
    """In place of common.backend.load."""
    devices = SimpleNamespace(
        use=lambda device: None,
        find=lambda device: None,
        describe=lambda device: {"device": "cpu"},
        capacity=lambda device: {"free": FREE},
    )
    engine = SimpleNamespace(Engine=Engine, devices=devices)
    return SimpleNamespace(
        name="fake", engine=engine,
        generate=SimpleNamespace(sample_text=lambda model, tokenizer, sample: f"bcd {model.t}"),
    )  # fmt: skip


def footprint(recipe: Any, rows: int, length: int, micro_batches: int = 1) -> Footprint:
    """1000 bytes a row."""
    return Footprint(1000 * rows, [Piece("", (rows, length), 1000 * rows)])


def main(argv: list[str]) -> int:
    """``mlxgpt train`` with the fake framework; errors as the command line prints them."""
    from mlxgpt import cli
    from mlxgpt.common import backend
    from mlxgpt.common.train import pretrain

    backend.load = load_backend  # type: ignore[assignment]
    pretrain.token_source.open_data = open_data  # type: ignore[assignment]
    backend.resolve = lambda name, device=None: "fake"
    return cli.main(["train", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
