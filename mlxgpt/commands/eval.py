"""The verb ``eval``: loss, perplexity and bits per byte."""

import argparse
import json
import sys

import numpy as np

from mlxgpt.common import backend as backends
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate import rows as evaluation_rows
from mlxgpt.common.evaluate.score import evaluate, evaluate_rows
from mlxgpt.common.evaluate.text import open_text
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.model import rotary
from mlxgpt.common.tokenizers import beginning


def evaluate_command(args: argparse.Namespace) -> int:
    """Prints loss, perplexity and bits per byte of --data, as lines or as one JSON object."""
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
    rows = evaluation_rows.is_rows(args.data, args.text_key) or bool(args.set)
    live = sys.stderr.isatty() and not args.json

    def say(progress: str) -> None:
        if live:
            print(f"\r{progress}\033[K", end="", file=sys.stderr, flush=True)

    def score(tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
        return backend.generate.score(model, tokens, targets, positions if rotary.by_length(config) else None)

    if rows:
        examples = evaluation_rows.examples(
            evaluation_rows.settings(args.data, args.set), args.split, tokenizer, config
        )
        before = beginning.shared(tokenizer, [each.tokens for each in examples])
        batches = evaluation_rows.batches(examples, config.block_size)
        result = evaluate_rows(score, batches, args.data, say)
    else:
        text = open_text(args.data, tokenizer, args.text_key, args.split)
        before = list(text.begins_with)
        result = evaluate(score, text, config.vocab_size, config.block_size, stride, say)
    if live:
        print(file=sys.stderr)
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
