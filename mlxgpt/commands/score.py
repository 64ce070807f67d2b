"""The verb ``score``: a reward model's score of each text, conversation or answer, and its accuracy on pairs."""

import argparse
import json
from typing import Any

from mlxgpt.common import backend as backends
from mlxgpt.common import recipes
from mlxgpt.common.align import scoring
from mlxgpt.common.align.scoring import Item
from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.inference import last_token
from mlxgpt.common.rows.preferences import ANSWERS
from mlxgpt.common.rows.row import Row


def score_command(args: argparse.Namespace) -> int:
    """``score --model DIR [--adapter DIR] --text TEXT | --data FILE [--json]``."""
    tune = _settings(args.set)
    items = [Item(f"--text {n}", "text", (Row(f"--text {n}", text=text),)) for n, text in enumerate(args.text, 1)]
    items += scoring.read(args.data, tune) if args.data else []
    if not items:
        raise UserError("nothing to score: expected --text TEXT, or --data FILE with texts, conversations or answers")
    backend = backends.load(args.backend)
    model, tokenizer = backend.load.load(
        args.model, adapter=base_and_adapters.parse_adapters(args.adapter) or None, device=args.device, force=args.force
    )
    base_and_adapters.expect_task(model.config, args.model, "score")
    tokenizer = base_and_adapters.expect_tokenizer(tokenizer, args.model)
    pad = last_token.passed_over(base_and_adapters.find_base(args.model)[0], tokenizer)
    texts, cut = scoring.encode(items, tune, tokenizer, model.config, pad)
    found = list(scoring.grouped(items, scoring.score(backend, model, texts)))
    right = [better > worse for _, (better, *others) in found for worse in others]
    if args.json:
        made: dict[str, Any] = {"rows": [_as_dict(item, scores) for item, scores in found], "cut": cut}
        print(json.dumps(made | ({"pairs": len(right), "accuracy": sum(right) / len(right)} if right else {})))
        return 0
    for item, scores in found:
        shown = " ".join(item.rows[0].words.split())
        print("\t".join([*(f"{score:.6f}" for score in scores), shown]))
    if cut:
        print(f"{cut:,} texts are longer than the model's context of {model.config.block_size} tokens: shortened")
    if right:
        print(f"accuracy {sum(right) / len(right):.4f} of {len(right):,} pairs")
    return 0


def _settings(sets: list[str]) -> TuneConfig:
    """How rows are read: those of tune."""
    sections = recipes.apply_sets({"tune": {}}, sets)
    other = next((name for name in sections if name != "tune"), None)
    if other:
        raise UserError(f"--set {other}: expected a key of tune: rows are only scored")
    tune = recipes.build(sections).tune
    assert tune
    return tune


def _as_dict(item: Item, scores: list[float]) -> dict[str, Any]:
    if len(scores) == 2:
        both = dict(zip(ANSWERS, scores, strict=True))
        return {"where": item.where} | both | {"margin": scores[0] - scores[1]}
    (row,) = item.rows
    text = {"messages": row.messages} if row.messages else {"prompt": row.text, "completion": row.answer}
    return {"where": item.where} | (text if row.answer or row.messages else {"text": row.text}) | {"score": scores[0]}
