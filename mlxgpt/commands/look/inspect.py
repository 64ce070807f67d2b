"""The verb ``inspect``: what is inside a model on a text, as one page that loads nothing, or as one JSON object."""

import argparse
import base64
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mlxgpt import __version__
from mlxgpt.common import backend as backends
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import atomic_write
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.folders.base_and_adapters import expect_tokenizer
from mlxgpt.common.inference import inspection, prompts
from mlxgpt.common.inference.inspection import Inspection
from mlxgpt.common.sft.template import template_of
from mlxgpt.common.tokenizers import beginning, spelling
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.units import size

LIMIT = 256
"""Tokens that are shown unless --limit says another number."""
MOST = 50
"""Of --top: a page of 256 tokens and as many candidates of each is 0.6 MB."""


def inspect_command(args: argparse.Namespace) -> int:
    """Writes the page, or with ``--json`` prints the numbers, and writes the page only where --out says."""
    out = Path(args.out or f"{Path(args.model).resolve().name}-inspect.html") if args.out or not args.json else None
    if out and out.is_dir():
        raise UserError(f"{out}: a folder; expected a file to write")
    if out and not out.parent.is_dir():
        raise UserError(f"{out}: no folder {out.parent} to write to")
    if args.top > MOST:
        raise UserError(f"--top {args.top}: expected at most {MOST}")
    source = _source(args)
    backend = backends.load(args.backend)
    adapters = base_and_adapters.parse_adapters(args.adapter) or None
    model, tokenizer = backend.load.load(args.model, adapter=adapters, device=args.device, force=args.force)
    config = model.config
    base_and_adapters.expect_task(config, args.model)
    ids, given = _tokens(args, source, tokenizer)
    inspection.check(config, ids, args.model)
    limit = min(LIMIT, config.block_size) if args.limit is None else args.limit
    if limit > config.block_size:
        raise UserError(f"--limit {limit}: the model's context holds {config.block_size} tokens")
    shown = np.asarray(ids[:limit], np.int32)
    layers = inspection.layers_of(config, len(shown), args.layers)
    inside = importlib.import_module(f"{backends.PACKAGES[args.backend]}.probe").Inside(model, shown)
    known = tokenizer.n_vocab if tokenizer else config.vocab_size
    found = inspection.inspect(inside, config, shown, given, args.top, layers, known)
    spell = spelling.speller(tokenizer)
    facts = {
        "model": args.model,
        "adapters": args.adapter,
        "backend": args.backend,
        "family": config.family,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "tokens": len(shown),
        "tokens_of_text": len(ids),
        "notes": _notes(config, len(ids), found, args),
        **beginning.described(tokenizer, ids[:given] if tokenizer and ids[:given] == tokenizer.before else []),
    }
    if out:
        page = render(found, spell, facts, config)
        with atomic_write(out) as file:
            file.write(page.encode())
        _say(args, f"{out}: {size(len(page.encode()))}, {len(shown)} tokens{_mean(found)}")
    for note in facts["notes"]:
        _say(args, note)
    if args.json:
        print(json.dumps(facts | inspection.as_json(found, spell)))
    return 0


def _say(args: argparse.Namespace, line: str) -> None:
    print(line, file=sys.stderr if args.json else sys.stdout)


def _mean(found: Inspection) -> str:
    return "" if found.loss is None else f", loss {found.loss:.4f} nats a token"


def _source(args: argparse.Namespace) -> str:
    """The text or the ids, from the one flag that gives them.

    Raises:
        UserError: none does, or several do, or --chat is asked of ids.
    """
    given = [flag for flag in ("text", "text_file", "ids") if getattr(args, flag) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{flag.replace('_', '-')}" for flag in given)
        raise UserError(f"{found or 'no text'}: expected one of --text TEXT, --text-file FILE and --ids IDS")
    if args.chat and args.ids is not None:
        raise UserError("--chat: is for text, and --ids are taken as they are")
    return (
        prompts.read_text(args.text_file, "--text-file") if args.text_file is not None else args.text or args.ids or ""
    )


def _tokens(args: argparse.Namespace, source: str, tokenizer: Tokenizer | None) -> tuple[list[int], int]:
    """The ids, and how many at the start are given: what the model puts before a text, else the first token."""
    if args.ids is not None:
        return prompts.ids_of(source, "--ids"), 1
    tokenizer = expect_tokenizer(tokenizer, args.model, "--ids takes token ids")
    if args.chat:
        template = template_of(tokenizer, f"{args.model}: chat template")
        if template is None:
            raise UserError(f"--chat: {args.model} has no chat template; without it the text is taken as it is")
        ids = list(prompts.asked(template, [source])[0])
    else:
        ids = beginning.start(tokenizer, source)
    before = beginning.begins_with(tokenizer)
    return ids, max(1, len(before)) if ids[: len(before)] == before else 1


def _notes(config: ModelConfig, tokens: int, found: Inspection, args: argparse.Namespace) -> list[str]:
    """What is not all there, and why."""
    notes, shown = [], len(found.ids)
    if tokens > shown:
        more = f"; --limit shows up to {config.block_size}, the model's context"
        whole = ", as many as the model's context holds"
        notes.append(f"the first {shown} of {tokens:,} tokens{more if shown < config.block_size else whole}")
    if args.layers is None and len(found.attention) < config.n_layer:
        kept = ", ".join(map(str, found.attention)) or "no layer"
        notes.append(
            f"attention of layers {kept} of {config.n_layer}: more would be over {inspection.WEIGHTS:,} weights; "
            "--layers chooses, --limit shortens"
        )
    return notes


def render(found: Inspection, spell: Callable[[int], str], facts: dict[str, Any], config: ModelConfig) -> str:
    """The page as HTML; everything that a model or a text said is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    even, texts = math.log(config.vocab_size), [spell(i) for i in found.ids.tolist()]
    strip = [
        {
            "shown": spelling.visible(text),
            "newline": "\n" in text,
            "part": None if math.isnan(loss) else min(1.0, loss / even),
            "says": "given" if math.isnan(loss) else f"loss {loss:.3f}",
        }
        for text, loss in zip(texts, found.losses.tolist(), strict=True)
    ]
    cards = [("tokens", f"{len(found.ids):,}")]
    if found.loss is not None:
        cards += [("loss, nats a token", f"{found.loss:.4f}"), ("perplexity", f"{math.exp(min(found.loss, 700)):,.2f}")]
    cards += [("an even guess", f"{even:.4f}"), ("begins with", facts["begins_with_text"] or "nothing")]
    architecture = f"{config.family}, {config.n_layer} layers of {config.n_head} heads, width {config.n_embd}"
    return environment.get_template("inspect.html.jinja").render(
        title=f"Inside {facts['model']}", adapters=facts["adapters"], notes=facts["notes"], strip=strip, cards=cards,
        subtitle=f"{architecture}, {config.vocab_size:,} tokens in the vocabulary; computed by {facts['backend']}",
        data=_data(found, spell), version=__version__,
    )  # fmt: skip


def _data(found: Inspection, spell: Callable[[int], str]) -> dict[str, Any]:
    """What the page's script draws; numbers to six digits, attention in bytes."""
    used = {*found.ids.tolist(), *found.following.ids.flat, *found.lens.ids.flat}
    used |= {i for each in found.neighbors.values() for i in each.ids}
    return {
        "ids": found.ids.tolist(),
        "names": {int(i): spelling.visible(spell(int(i))) for i in used},
        "losses": _rounded(found.losses),
        "ranks": found.ranks.tolist(),
        "entropies": _rounded(found.entropies),
        "next": {"ids": found.following.ids.tolist(), "values": _rounded(found.following.values)},
        "lens": {"ids": found.lens.ids.tolist(), "values": _rounded(found.lens.values)},
        "targets": _rounded(found.lens_targets),
        "norms": {"stream": _rounded(found.stream)} | {name: _rounded(each) for name, each in found.branches.items()},
        "neighbors": {i: [each.ids.tolist(), _rounded(each.values)] for i, each in found.neighbors.items()},
        "attention": {layer: _packed(weights) for layer, weights in found.attention.items()},
    }


def _rounded(values: np.ndarray) -> Any:
    """Nested lists of six significant digits; null where there is no number."""
    if values.ndim > 1:
        return [_rounded(each) for each in values]
    return [None if math.isnan(value) else float(f"{value:.6g}") for value in values.tolist()]


def _packed(weights: np.ndarray) -> str:
    """base64 of a byte a weight, 255 times its root: head by head (H, T, T) the rows up to their own token."""
    rows, columns = np.tril_indices(weights.shape[-1])
    codes = np.rint(255 * np.sqrt(weights[:, rows, columns])).astype(np.uint8)
    return base64.b64encode(codes.tobytes()).decode()
