"""The verb ``data inspect --model``: examples as fine-tuning sees them, with the trained tokens highlighted."""

import json
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from mlxgpt.common import recipes
from mlxgpt.common.config import ModelConfig, Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters, model_folder
from mlxgpt.common.sft import source as sft_source
from mlxgpt.common.sft.pack import Example
from mlxgpt.common.sft.source import SftSource
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.load import load_last
from mlxgpt.common.tokenizers.protocol import Tokenizer

_MARKS = ("[[", "]]")  # around trained tokens, without color


Open = Callable[[Recipe, Tokenizer, ModelConfig, Callable[[str], None]], SftSource]


def _open(recipe: Recipe, tokenizer: Tokenizer, config: ModelConfig, say: Callable[[str], None]) -> SftSource:
    assert recipe.tune
    return sft_source.open_source(recipe.tune, recipe.train, tokenizer, config, say)


def inspect_examples(args: Namespace, opened: Open = _open) -> int:
    """``data inspect DATA --model DIR [--rows N] [--set tune.KEY=VALUE] [--json]``; ``opened`` makes the source."""
    if args.tokenizer:
        raise UserError("--tokenizer: only for a corpus; examples are shown in the tokens of --model")
    place, adapters = base_and_adapters.find_base(args.model)
    tokenizer = load_last([place, *(each for each, _ in adapters)])
    tokenizer = base_and_adapters.expect_tokenizer(tokenizer, args.model)
    sections = recipes.apply_sets({"tune": {"source": args.source, "model": args.model}, "train": {}}, args.set)
    other = next((name for name in sections if name not in ("tune", "train", "prefer")), None)
    if other:
        raise UserError(f"--set {other}: expected a key of tune, train or prefer")
    recipe = recipes.build(sections)
    notes: list[str] = []
    say = notes.append if args.json else print
    source = opened(recipe, tokenizer, model_folder.read_config(place), say)
    shown = source.examples["train"][: (args.rows or 3) * source.together]
    if args.json:
        print(json.dumps(source.describe() | {"notes": notes, "rows": [_as_dict(source, row) for row in shown]}))
        return 0
    _table(source)
    console = Console(highlight=False, soft_wrap=True)
    for row in shown:
        console.print()
        console.print(_shown(source, row, console.is_terminal))
    return 0


def _table(source: SftSource) -> None:
    """What examples begin with, and a line per split."""
    print(f"begins with: {beginning.shown(source.tokenizer, source.begins_with)}")
    print(
        f"\n{'split':<8}{'examples':>9}{'tokens':>12}{'trained':>12}{'longest':>9}{'truncated':>11}{'cut':>7}{'dropped':>9}"
    )
    for name, count in source.counts.items():
        if count.rows:
            figures = f"{count.longest:>9,}{count.truncated:>11,}{count.cut:>7,}{count.dropped:>9,}"
            print(f"{name:<8}{count.rows:>9,}{count.tokens:>12,}{count.trained:>12,}{figures}")
            if count.lost:
                print(f"{'':<8}{count.lost:,} tokens lost from examples longer than {source.encoder.size}")


def runs(source: SftSource, row: Example) -> list[tuple[bool, str]]:
    """The example's text in pieces of (trained, text)."""
    if source.labels:
        return [(False, source.tokenizer.decode(row.tokens.tolist()))]
    ids = np.append(row.tokens, row.targets[-1])
    asked = np.append(False, row.weights > 0)
    starts = [0, *(np.flatnonzero(np.diff(asked)) + 1).tolist()]
    return [
        (bool(asked[a]), source.tokenizer.decode(ids[a:b].tolist()))
        for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]


def _label(source: SftSource, row: Example) -> str:
    """A classifier's label of the example; '' for others."""
    return source.labels[int(row.targets[-1])] if len(source.labels) > 1 else ""


def _as_dict(source: SftSource, row: Example) -> dict[str, Any]:
    pieces = runs(source, row)
    found: dict[str, Any] = {"row": row.where, "tokens": len(row), "trained": int(np.count_nonzero(row.weights))}
    found |= {"pieces": [{"trained": trained, "text": text} for trained, text in pieces]}
    label = _label(source, row)
    return found | ({"label": label} if label else {})


def _shown(source: SftSource, row: Example, colored: bool) -> Text:
    """A heading, and the example with its trained tokens in color or between marks."""
    label = f", label {_label(source, row)}" if _label(source, row) else ""
    text = Text(f"{row.where}: {len(row):,} tokens, {np.count_nonzero(row.weights):,} trained{label}\n", style="bold")
    for trained, piece in runs(source, row):
        start, stop = _MARKS if trained and not colored else ("", "")
        text.append(f"{start}{piece}{stop}", style="not bold black on green" if trained else "not bold")
    return text
