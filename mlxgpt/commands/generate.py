"""The verb ``generate``: answers prompts in a chat template or continues them, as streamed text or one JSON object."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
import time
from typing import Any

from mlxgpt.common import backend as backends
from mlxgpt.common import recipes
from mlxgpt.common.backend import Backend
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.data.corpus import parse_json
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.folders.base_and_adapters import expect_tokenizer
from mlxgpt.common.inference import generation, prompts, sampling
from mlxgpt.common.inference.generation import Result
from mlxgpt.common.sft.template import template_of
from mlxgpt.common.tokenizers import ends as text_ends
from mlxgpt.common.tokenizers.protocol import Tokenizer


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


def as_json(result: Result, tokenizer: Tokenizer | None, logprobs: bool) -> dict[str, object]:
    """The pinned keys text (null without a tokenizer), tokens and prompt_tokens (counts), and further ones."""
    made: dict[str, object] = {
        "text": result.text if tokenizer else None,
        "tokens": len(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "token_ids": result.tokens,
        "finish_reason": result.finish_reason,
    }
    if logprobs:
        made["logprobs"] = [each._asdict() for each in result.logprobs]
    return made


def _prompts(
    args: argparse.Namespace, texts: list[str], ids: list[list[int]], tokenizer: Tokenizer | None
) -> list[str | list[int]]:
    """Texts as questions where the tokenizer has a chat template, else as they are; then ids.

    Raises:
        UserError: text without a tokenizer, --system without a template, or what the template refuses.
    """
    if texts:
        expect_tokenizer(tokenizer, args.model, "--prompt-ids takes token ids")
    kwargs = recipes.parse_table(args.template_kwargs or "{}", "--template-kwargs")
    template = None
    if tokenizer and texts and not args.raw:
        template = template_of(tokenizer, f"{args.model}: chat template", kwargs=kwargs)
    for flag, given in (("--system", args.system is not None), ("--template-kwargs", kwargs)):
        if given and template is None:
            found = "--raw leaves it out" if args.raw else "the model has none" if texts else "token ids have none"
            raise UserError(f"{flag}: is for a chat template, and {found}")
    if tokenizer is None or template is None:
        return [*texts, *ids]
    with contextlib.suppress(UserError):  # a template may end an answer with plain text
        tokenizer.ends |= {template.end_id}
    return [*prompts.asked(template, texts, args.system or ""), *ids]


def _ends(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens of --stop-token; without a tokenizer also what the model's folder says."""
    if tokenizer:
        return text_ends.named(args.stop_token, tokenizer, "--stop-token")
    if word := next((word for word in args.stop_token if not word.isdecimal()), None):
        raise UserError(f"--stop-token {word!r}: text needs a tokenizer, and this model has none; expected an id")
    folder, _ = base_and_adapters.find_base(args.model, base_and_adapters.parse_adapters(args.adapter) or None)
    return [*text_ends.generation_ends(folder), *map(int, args.stop_token)]


def generate_command(args: argparse.Namespace) -> int:
    """Continues every prompt; a single one is streamed. Text goes to stdout, statistics to stderr."""
    fields = [field.name for field in dataclasses.fields(SampleConfig) if field.name != "prompt"]
    sample = SampleConfig(**{name: getattr(args, name) for name in fields})
    texts = [*args.prompt, *(prompts.read_text(name, "--prompt-file") for name in args.prompt_file)]
    ids = [prompts.ids_of(text, "--prompt-ids") for text in args.prompt_ids]
    if args.logprobs is not None and not args.json:
        raise UserError(f"--logprobs {args.logprobs}: is for --json")
    bias = prompts.bias_of(args.logit_bias, "--logit-bias")
    if not texts and not ids:
        raise UserError("expected --prompt TEXT or --prompt-file FILE, or --prompt-ids IDS")
    backend = backends.load(args.backend)
    if args.json_schema:
        return _constrained(args, backend, sample, texts, ids, bias)
    model, tokenizer = _load(args, backend)
    asked = _prompts(args, texts, ids, tokenizer)
    screen = _Screen(len(asked) == 1 and not args.json)
    results = backend.generate.generate(
        model,
        tokenizer,
        asked,
        sample,
        args.stop,
        screen.on_text,
        _ends(args, tokenizer),
        bias,
        args.logprobs,
        args.kv_bits,
    )
    return _show(args, results, tokenizer, model.config.block_size, screen)


def _load(args: argparse.Namespace, backend: Backend) -> tuple[Any, Tokenizer | None]:
    """The model, ready to generate, and its tokenizer."""
    adapters = base_and_adapters.parse_adapters(args.adapter) or None
    model, tokenizer = backend.load.load(args.model, adapter=adapters, device=args.device, force=args.force)
    base_and_adapters.expect_task(model.config, args.model)
    backend.generate.prepare(model)
    return model, tokenizer


class _Screen:
    """Shows the text of a single answer as it comes, and takes the time."""

    def __init__(self, live: bool) -> None:
        self._live, self._start, self.first = live, time.perf_counter(), 0.0

    def on_text(self, _: int, text: str) -> None:
        """A piece of text."""
        self.first = self.first or self.seconds
        if self._live:
            print(text, end="", flush=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start


def _constrained(
    args: argparse.Namespace,
    backend: Backend,
    sample: SampleConfig,
    texts: list[str],
    ids: list[list[int]],
    bias: dict[int, float],
) -> int:
    """Answers that are JSON of --json-schema, drawn by the server's engine."""
    if importlib.util.find_spec("llguidance") is None:
        raise UserError("--json-schema: llguidance is not installed: pip install 'mlxgpt[serve]'")
    from mlxgpt.common.serve.alone import Alone
    from mlxgpt.common.serve.work import Served

    schema = parse_json(prompts.read_text(args.json_schema, "--json-schema"), f"--json-schema {args.json_schema}")

    def load() -> Served:
        model, tokenizer = _load(args, backend)
        size = model.config.vocab_size
        n_vocab = min(tokenizer.n_vocab, size) if tokenizer else size
        return Served(args.model, model, tokenizer, None, frozenset(), n_vocab, "")

    alone = Alone(backend, load, len(texts) + len(ids), args.kv_bits)
    with alone as served:
        config, tokenizer = served.model.config, served.tokenizer
        asked = _prompts(args, texts, ids, tokenizer)
        rows = generation.start_rows(config, tokenizer, asked, args.stop, _ends(args, tokenizer))
        served = dataclasses.replace(served, ends=frozenset(end for end in rows[0].ends if end is not None))
        sampling.biases(bias, served.n_vocab)
        screen = _Screen(len(asked) == 1 and not args.json)
        results = alone.generate(served, rows, sample, schema, screen.on_text, bias, args.logprobs)
    return _show(args, results, tokenizer, config.block_size, screen)


def _show(
    args: argparse.Namespace, results: list[Result], tokenizer: Tokenizer | None, block_size: int, screen: _Screen
) -> int:
    """Prints what was not shown while it came."""
    seconds = screen.seconds
    if args.json:
        made = [as_json(result, tokenizer, args.logprobs is not None) for result in results]
        print(json.dumps(made[0] if len(made) == 1 else {"results": made}))
        return 0
    shown = [result.text if tokenizer else ",".join(map(str, result.tokens)) for result in results]
    if len(results) == 1:
        print("" if tokenizer else shown[0])
    else:
        for index, text in enumerate(shown):
            print(f"--- prompt {index + 1}\n{text}")
    print(summary(results, seconds, screen.first or seconds, block_size), file=sys.stderr)
    return 0
