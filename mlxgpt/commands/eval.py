"""The verb ``eval``: loss, perplexity and bits per byte of data, and scores on tasks."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import backend as backends
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate import rows as evaluation_rows
from mlxgpt.common.evaluate.score import evaluate, evaluate_rows
from mlxgpt.common.evaluate.text import open_text
from mlxgpt.common.files import atomic_write
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.inference import kv_cache
from mlxgpt.common.model import rotary
from mlxgpt.common.tasks import named, requests, shots, show
from mlxgpt.common.tasks.task import Continued
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.protocol import Tokenizer

_DATA = ("text_key", "split", "set", "stride", "kv_bits")  # flags of --data without --task
_TASKS = ("limit", "shots", "log")


class _OneByOne:
    """A scorer without a cache, one row at a time."""

    def __init__(self, backend: backends.Backend, model: Any, tokenizer: Tokenizer):
        self.context, self.cut = model.config.block_size, 0
        self._score, self._model, self._tokenizer = backend.generate.score, model, tokenizer

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = beginning.start(self._tokenizer, context)
        return before, beginning.start(self._tokenizer, context + continuation)[len(before) :]

    def continuations(self, pairs: Any, say: Any = None) -> list[Continued]:
        found = []
        for context, continuation in pairs:
            ids = np.array([[*context, *continuation][-self.context - 1 :]], np.int32)
            losses = self._score(self._model, ids[:, :-1], ids[:, 1:], None)[0, -len(continuation) :]
            found.append(Continued(-float(losses.astype(np.float64).sum()), False))
        return found

    def texts(self, texts: Any, say: Any = None) -> list[float]:
        pairs = [([], beginning.start(self._tokenizer, text)) for text in texts]
        return [one.logprob for one in self.continuations(pairs)]

    def answers(self, contexts: Any, stop: Any, sample: Any, say: Any = None) -> list[str]:
        return ["" for _ in contexts]


def evaluate_command(args: argparse.Namespace) -> int:
    """Prints loss, perplexity and bits per byte of --data, or scores on each --task, as lines or as one JSON object."""
    needed, others = ("--task", _DATA) if args.task else ("--data without --task", _TASKS)
    unfit = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) not in (None, [])]
    if unfit:
        raise UserError(f"{unfit[0]}: does nothing with {needed}")
    if args.task:
        return _tasks(args)
    if not args.data:
        raise UserError("expected --data PATH, or --task FILE.jsonl, FILE.yaml or NAME")
    return _data(args)


def _tasks(args: argparse.Namespace) -> int:
    tasks = named.read_all(args.task, args.data, args.shots)
    if args.log and Path(args.log).exists():
        raise UserError(f"--log {args.log}: exists already: expected a new file")
    for task in tasks:  # examples that are missing are refused before a model is loaded
        shots.before(task, requests.first(task, args.limit))
    backend = backends.load(args.backend)
    model, tokenizer = backend.load.load(
        args.model, adapter=base_and_adapters.parse_adapters(args.adapter) or None, device=args.device, force=args.force
    )
    base_and_adapters.expect_task(model.config, args.model)
    tokenizer = base_and_adapters.expect_tokenizer(tokenizer, args.model)
    scorer = _OneByOne(backend, model, tokenizer)
    begins = beginning.begins_with(tokenizer)
    logged: list[dict[str, object]] = []
    outcomes = []
    for task in tasks:
        with _progress(args, f"{task.name}: ") as say:
            outcomes.append(requests.ask(task, scorer, args.limit, say, logged.append))
        if not args.json:
            print("\n".join(show.lines(outcomes[-1])), flush=True)
    if args.log:
        with atomic_write(Path(args.log)) as file:
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in logged)
    if args.json:
        found = {"tasks": {outcome.task: show.described(outcome) for outcome in outcomes}}
        print(json.dumps({**found, "limit": args.limit, **beginning.described(tokenizer, begins)}))
    else:
        print(f"begins with    {beginning.shown(tokenizer, begins)}")
    return 0


def _data(args: argparse.Namespace) -> int:
    backend = backends.load(args.backend)
    model, tokenizer = backend.load.load(
        args.model, adapter=base_and_adapters.parse_adapters(args.adapter) or None, device=args.device, force=args.force
    )
    config = model.config
    base_and_adapters.expect_task(config, args.model)
    stride = args.stride or config.block_size
    if stride > config.block_size:
        raise UserError(
            f"--stride {stride}: expected at most model.block_size = {config.block_size}, or tokens would be skipped"
        )
    kv_cache.group_size(config.head_dim, args.kv_bits or 0)
    rows = evaluation_rows.is_rows(args.data, args.text_key or "text") or bool(args.set)

    def score(tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
        positions = positions if rotary.by_length(config) else None
        return backend.generate.score(model, tokens, targets, positions, args.kv_bits or 0)

    with _progress(args) as say:
        if rows:
            examples = evaluation_rows.examples(
                evaluation_rows.settings(args.data, args.set), args.split or "val", tokenizer, config
            )
            before = beginning.shared(tokenizer, [each.tokens for each in examples])
            batches = evaluation_rows.batches(examples, config.block_size)
            result = evaluate_rows(score, batches, args.data, say)
        else:
            text = open_text(args.data, tokenizer, args.text_key or "text", args.split or "val")
            before = list(text.begins_with)
            result = evaluate(score, text, config.vocab_size, config.block_size, stride, say)
    bits = result.bits_per_byte
    if args.json:
        values = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": bits, "tokens": result.tokens}
        values |= {"bytes": result.size, "block_size": config.block_size, "stride": stride}
        print(json.dumps({**values, **beginning.described(tokenizer, before)}))
        return 0
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.2f}")
    print(f"bits per byte  {f'{bits:.4f}' if bits is not None else 'unknown: fine-tuning examples, or no tokenizer'}")
    how = "those of answers" if rows else f"each scored once, in windows of {config.block_size} every {stride}"
    print(f"tokens         {result.tokens}, {how}")
    print(f"begins with    {beginning.shown(tokenizer, before)}")
    return 0


@contextlib.contextmanager
def _progress(args: argparse.Namespace, about: str = "") -> Iterator[Callable[[str], None]]:
    """Tells a terminal how far it is, in one line that is renewed."""
    live = sys.stderr.isatty() and not args.json

    def say(progress: str) -> None:
        if live:
            print(f"\r{about}{progress}\033[K", end="", file=sys.stderr, flush=True)

    yield say
    if live:
        print(file=sys.stderr)
