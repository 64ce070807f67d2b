"""The verb ``classify``: a label and its probability for each text, and metrics if the labels are known."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common import backend as backends
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.inference import last_token
from mlxgpt.common.rows import files as row_files
from mlxgpt.common.rows import formats as row_formats
from mlxgpt.common.rows.row import Row
from mlxgpt.common.scores import confusion
from mlxgpt.common.tokenizers import beginning
from mlxgpt.common.tokenizers.padding import without_padding
from mlxgpt.common.tokenizers.protocol import Tokenizer


def classify_command(args: argparse.Namespace) -> int:
    """``classify --model DIR [--adapter DIR] --text TEXT | --file FILE [--json]``."""
    rows = _rows(args)
    backend = backends.load(args.backend)
    model, tokenizer = backend.load.load(
        args.model, adapter=base_and_adapters.parse_adapters(args.adapter) or None, device=args.device, force=args.force
    )
    labels, block_size = model.config.labels, model.config.block_size
    base_and_adapters.expect_task(model.config, args.model, "classify")
    tokenizer = base_and_adapters.expect_tokenizer(tokenizer, args.model)
    for row in rows:
        if row.label is not None and row.label not in labels:
            raise UserError(f"{row.where}: label {row.label!r}: expected one of the model's, {', '.join(labels[:8])}")
    pad = last_token.passed_over(base_and_adapters.find_base(args.model)[0], tokenizer)
    texts = [without_padding(beginning.wrap(tokenizer, ids), pad) for ids in _encoded(rows, tokenizer)]
    cut = sum(len(ids) > block_size for ids in texts)
    texts = [ids if len(ids) <= block_size else beginning.wrap(tokenizer, ids, block_size) for ids in texts]
    shares = probabilities(backend, model, texts)
    sums = _confusions(rows, labels, shares)
    if args.json:
        found: dict[str, Any] = {"labels": list(labels), "rows": _as_dicts(rows, labels, shares), "cut": cut}
        print(json.dumps(found | (confusion.as_dict(sums, labels) if sums else {})))
        return 0
    for row, share in zip(rows, shares, strict=True):
        print(f"{labels[share.argmax()]}\t{share.max():.4f}\t{' '.join(row.text.split())}")
    if cut:
        longer = f"longer than the model's context of {block_size} tokens"
        print(f"{cut:,} texts are {longer}: truncated from the right")
    if sums:
        figures = confusion.figures(sums, len(labels))
        print("\n" + "\n".join(confusion.lines(sums, labels)))
        print(f"accuracy {figures['accuracy']:.4f}, macro-F1 {figures['macro_f1']:.4f}")
    return 0


def _rows(args: argparse.Namespace) -> list[Row]:
    """The texts of --text, then those of --file."""
    rows = [Row(f"--text {number}", text=text) for number, text in enumerate(args.text, 1)]
    if args.file:
        path, tune = Path(args.file).expanduser(), TuneConfig(text_key=args.text_key, label_key=args.label_key)
        if not path.is_file():
            raise UserError(f"--file {path}: no such file")
        if path.suffix.lower() == ".txt":
            rows += [Row(f"{path} row {n}", text=line) for n, line in enumerate(row_files.read_lines(path), 1)]
        elif path.suffix.lower() in row_files.SUFFIXES:
            rows += [row_formats.text_to_classify(value, where, tune) for where, value in row_files.read_values(path)]
        else:
            known = " ".join((".txt", *row_files.SUFFIXES))
            raise UserError(f"--file {path}: unknown format {path.suffix or 'without a suffix'}: expected {known}")
    if not rows:
        raise UserError("nothing to classify: expected --text TEXT, or --file FILE with texts")
    return rows


def _encoded(rows: list[Row], tokenizer: Tokenizer) -> list[np.ndarray]:
    made = []
    for row in rows:
        try:
            made.append(np.asarray(tokenizer.encode(row.text), np.int32))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
        if not len(made[-1]):
            raise UserError(f"{row.where}: empty: expected text")
    return made


def probabilities(backend: backends.Backend, model: Any, texts: list[np.ndarray]) -> np.ndarray:
    """(texts, labels) probabilities of tokenized texts."""
    found = last_token.logits(backend, model, texts)
    shares = np.exp(found - found.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def _confusions(rows: list[Row], labels: tuple[str, ...], shares: np.ndarray) -> dict[str, float]:
    """The counts of confusion.py over the texts whose label is known; {} if none is."""
    known = [n for n, row in enumerate(rows) if row.label is not None]
    if not known:
        return {}
    targets = np.array([[labels.index(str(rows[n].label))] for n in known], np.int32)
    batch = Batch(np.zeros_like(targets), targets, np.ones(targets.shape, np.float32))
    return confusion.count(batch, shares[known].argmax(axis=1)[:, None])


def _as_dicts(rows: list[Row], labels: tuple[str, ...], shares: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "text": row.text,
            "label": labels[share.argmax()],
            "probability": float(share.max()),
            "probabilities": dict(zip(labels, share.tolist(), strict=True)),
        }
        | ({} if row.label is None else {"given": row.label})
        for row, share in zip(rows, shares, strict=True)
    ]
