"""The verbs ``convert``, ``fuse``, ``quantize`` and ``verify``."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from convert import adapters
from convert.conversion import convert, line
from convert.formats.rounding import Rounding
from convert.fuse import fuse
from convert.quantize import run as quantizing
from convert.verify import html as verify_html
from convert.verify import text as verify_text
from convert.verify import verify
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters


def convert_command(args: argparse.Namespace) -> int:
    """Converts and says in the last line what was written.

    Args:
        args: src, dst, to, map, tokenizer, dtype, bits, gguf_type, group_size, max_shard, version, n_head, config,
            no_hash, allow_nan, verify, force, json.
    """
    if adapters.is_adapter(args.src):
        return _adapter(args)
    if args.to == "peft" or args.model:
        found = "is no adapter" if Path(args.src).exists() else "does not exist"
        raise UserError(f"{'--to peft' if args.to == 'peft' else '--model'}: {args.src} {found}")
    names = ("dtype", "bits", "gguf_type", "group_size", "max_shard", "version")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.tokenizer:
        options["tokenizer"] = Path(args.tokenizer).expanduser()
    if args.no_hash:
        options["hash"] = False
    if args.allow_nan:
        options["allow_nan"] = True
    n_head = args.n_head or 0
    for name in ("to", "n_head", "config", "tokenizer") if args.map else ():
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} and --map: expected one of them")
    report = convert(
        args.src, args.dst, args.to,
        force=args.force, verify=args.verify, n_head=n_head, config=args.config, by_map=args.map, **options,
    )  # fmt: skip
    if args.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
        return 0
    for note in report.notes:
        print(f"note: {note}")
    print(line(report))
    return 0


def _adapter(args: argparse.Namespace) -> int:
    """Moves an adapter between layouts."""
    for name in (
        "dtype",
        "bits",
        "gguf_type",
        "group_size",
        "max_shard",
        "version",
        "n_head",
        "tokenizer",
        "verify",
        "allow_nan",
    ):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: {args.src} is an adapter: expected --to, --model or --force")
    adapter, notes = adapters.convert(args.src, args.dst, args.to, args.model, args.force)
    if args.json:
        print(
            json.dumps({"path": args.dst, "method": adapter.method, "targets": sorted(adapter.targets), "notes": notes})
        )
        return 0
    for note in notes:
        print(f"note: {note}")
    print(adapters.line(adapter, args.dst))
    return 0


def fuse_command(args: argparse.Namespace) -> int:
    """Fuses and says in the last line what was written.

    Args:
        args: model, adapter, out, dtype, dequantize, force, json.
    """
    rounding = Rounding()
    report, loss = fuse(
        args.model, base_and_adapters.parse_adapters(args.adapter), args.out,
        dtype=args.dtype, dequantize=args.dequantize, force=args.force,
        rounding=rounding,
    )  # fmt: skip
    if args.json:
        made = dataclasses.asdict(report) | {"loss": dataclasses.asdict(loss) if loss else None}
        made["rounding"] = rounding.to_json()
        print(json.dumps(made, default=str))
        return 0
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    for told in filter(None, (loss, str(rounding))):
        print(told)
    print(line(report))
    return 0


def quantize_command(args: argparse.Namespace) -> int:
    """Quantizes and says in the last line what was written.

    Args:
        args: src, dst, bits, method, data, eval_data, text_key, tokens, adapter, group_size, dtype, hessians, force,
            json, backend, device.
    """
    for name in ("text_key", "tokens"):
        if getattr(args, name) is not None and not (args.data or args.eval_data):
            raise UserError(f"--{name.replace('_', '-')}: does nothing without --data or --eval-data")
    live = sys.stderr.isatty() and not args.json

    def say(place: str) -> None:
        if live:
            print(f"\r{place}\033[K", end="", file=sys.stderr, flush=True)

    report = quantizing.quantize(
        args.src, args.dst, args.bits, args.method,
        data=args.data, eval_data=args.eval_data, adapters=base_and_adapters.parse_adapters(args.adapter),
        group_size=args.group_size, dtype=args.dtype, hessians=args.hessians,
        tokens=args.tokens or quantizing.TOKENS, text_key=args.text_key or "text", force=args.force,
        backend=args.backend, device=args.device, say=say,
    )  # fmt: skip
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    if args.json:
        print(quantizing.to_json(report))
        return 0
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(quantizing.show(report))
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """Prints the report; exit code 0 only if everything agrees.

    Args:
        args: a, b, html, weights_only, rungs, frameworks, data, n_head, config, kwargs, json.
    """
    page = Path(args.html).expanduser() if args.html else None
    if page and not page.parent.is_dir():
        raise UserError(f"{page.parent}: no such folder")
    report = verify(
        args.a,
        args.b,
        frameworks=_listed(args.frameworks),
        rungs=_listed(args.rungs),
        weights_only=args.weights_only,
        data=args.data,
        n_head=args.n_head or 0,
        config=args.config,
        kwargs=args.kwargs,
    )
    if page:
        verify_html.write_page(report, page)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        verify_text.show(report, sys.stdout)
    return 0 if report.agrees else 1


def _listed(text: str | None) -> list[str] | None:
    """``a,b`` as a list."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
