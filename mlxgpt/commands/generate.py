"""The verb ``generate``: continues prompts, as streamed text or one JSON object."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.inference.generation import Result
from mlxgpt.common.tokenizers import ends


def read_prompts(texts: list[str], files: list[str]) -> list[str]:
    """The prompts of --prompt, then one per --prompt-file; ``-`` is standard input.

    Raises:
        UserError: no prompt, or a file that is missing or not UTF-8.
    """
    prompts = list(texts)
    for name in files:
        try:
            data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
            prompts.append(data.decode("utf-8"))
        except OSError as error:
            raise UserError(f"--prompt-file {name}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt-file {name}: not UTF-8 at byte {error.start}") from None
    if not prompts:
        raise UserError("expected --prompt TEXT or --prompt-file FILE")
    return prompts


def summary(results: list[Result], seconds: float, first: float, block_size: int) -> str:
    """One line: tokens, speed, and why generation ended."""
    reasons = {
        "eos": "end of text",
        "stop": "stop string",
        "length": "max_tokens reached",
        "context": f"the context of {block_size} tokens is full",
    }
    count = sum(len(result.tokens) for result in results)
    ended = ", ".join(dict.fromkeys(reasons[result.finish_reason] for result in results))
    rate = f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s), the first text after {first:.2f} s"
    return f"{rate}; ended: {ended}"


def as_json(result: Result) -> dict[str, object]:
    """The pinned keys text, tokens (a count) and prompt_tokens (a count), and further ones."""
    return {
        "text": result.text,
        "tokens": len(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "token_ids": result.tokens,
        "finish_reason": result.finish_reason,
    }


def generate_command(args: argparse.Namespace) -> int:
    """Continues every prompt; a single one is streamed. Text goes to stdout, statistics to stderr."""
    fields = [field.name for field in dataclasses.fields(SampleConfig) if field.name != "prompt"]
    sample = SampleConfig(**{name: getattr(args, name) for name in fields})
    prompts = read_prompts(args.prompt, args.prompt_file)
    backend = backends.load(args.backend)
    model, tokenizer = backend.load.load(
        args.model, adapter=base_and_adapters.parse_adapters(args.adapter) or None, device=args.device, force=args.force
    )
    base_and_adapters.expect_task(model.config, args.model)
    if tokenizer is None:
        raise UserError(
            f"{args.model}: no tokenizer files; expected tokenizer.json or tokenizer.model beside the model"
        )
    tokenizer.ends |= set(ends.named(args.stop_token, tokenizer, "--stop-token"))
    backend.generate.prepare(model)
    start, first = time.perf_counter(), 0.0

    def on_text(index: int, text: str) -> None:
        nonlocal first
        first = first or time.perf_counter() - start
        if len(prompts) == 1 and not args.json:
            print(text, end="", flush=True)

    results = backend.generate.generate(model, tokenizer, prompts, sample, args.stop, on_text)
    seconds = time.perf_counter() - start
    if args.json:
        made = [as_json(result) for result in results]
        print(json.dumps(made[0] if len(made) == 1 else {"results": made}))
        return 0
    if len(prompts) == 1:
        print()
    else:
        for index, result in enumerate(results):
            print(f"--- prompt {index + 1}\n{result.text}")
    print(summary(results, seconds, first or seconds, model.config.block_size), file=sys.stderr)
    return 0
