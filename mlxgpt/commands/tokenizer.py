"""The verbs ``tokenizer train|inspect``; each returns its exit code."""

import json
from argparse import Namespace
from typing import Any

from mlxgpt.common.data import corpus as corpora
from mlxgpt.common.data import prepare as preparing
from mlxgpt.common.folders import resolve


def train_tokenizer(args: Namespace) -> int:
    """``tokenizer train SOURCE --kind K --vocab-size N --out DIR``: trained on the whole source."""
    out = resolve.new_path(args.out)
    corpus = corpora.open_corpus(args.source, args.text_key)
    scanned = corpora.scan(corpus)
    print(f"{corpus.name}: {scanned.documents:,} documents, {scanned.size:,} bytes")
    tokenizer = preparing.train(corpus, scanned, args.kind, args.vocab_size, 0.0, print)
    out.mkdir(parents=True)
    tokenizer.save(out)
    print(f"{out}: sha256 {tokenizer.digest[:16]}...; use it: --set data.tokenizer={out}")
    return 0


def inspect_tokenizer(args: Namespace) -> int:
    """``tokenizer inspect PATH [--text TEXT] [--json]``."""
    tokenizer = resolve.resolve_tokenizer(args.path)
    found: dict[str, Any] = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.n_vocab,
        "eos_id": tokenizer.eos_id,
        "eos": None if tokenizer.eos_id is None else tokenizer.decode([tokenizer.eos_id]),
        "sha256": tokenizer.digest,
        "before": tokenizer.before,
        "after": tokenizer.after,
        "named": tokenizer.named,
        "templates": sorted(tokenizer.templates),
        "notes": tokenizer.notes,
    }
    if args.text is not None:
        ids = tokenizer.encode(args.text)
        found |= {
            "text": args.text,
            "ids": ids,
            "pieces": [tokenizer.decode([i]) for i in ids],
            "tokens": len(ids),
            "bytes": len(args.text.encode()),
            "round_trip": tokenizer.decode(ids) == args.text,
        }
    if args.json:
        print(json.dumps(found))
        return 0
    eos = "none" if found["eos"] is None else f"{found['eos']} ({found['eos_id']})"
    print(f"{tokenizer.kind}, {tokenizer.n_vocab:,} tokens, end of text: {eos}, sha256 {tokenizer.digest[:16]}...")
    around = [f"{side} a text: {tokenizer.decode(found[side])}" for side in ("before", "after") if found[side]]
    named = [f"{name}: {token}" for name, token in tokenizer.named.items()]
    print("\n".join([*filter(None, [", ".join(named), ", ".join(around)]), *(f"note: {n}" for n in tokenizer.notes)]))
    if args.text is not None:
        print(" ".join(f"{piece!r}:{i}" for piece, i in zip(found["pieces"], found["ids"], strict=True)))
        exact = "decodes to the same text" if found["round_trip"] else "DECODES TO ANOTHER TEXT"
        print(f"{found['tokens']:,} tokens for {found['bytes']:,} bytes; {exact}")
    return 0
