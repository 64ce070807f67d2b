"""The verb ``convert``."""

import argparse
import dataclasses
import json
from pathlib import Path

from convert import adapters
from convert.conversion import Report, convert
from mlxgpt.common.errors import UserError


def convert_command(args: argparse.Namespace) -> int:
    """Converts and says in the last line what was written.

    Args:
        args: src, dst, to, tokenizer, dtype, bits, group_size, max_shard, version, n_head, no_hash, allow_nan, verify,
            force, json.
    """
    if adapters.is_adapter(args.src):
        return _adapter(args)
    if args.to == "peft" or args.model:
        found = "is no adapter" if Path(args.src).exists() else "does not exist"
        raise UserError(f"{'--to peft' if args.to == 'peft' else '--model'}: {args.src} {found}")
    names = ("dtype", "bits", "group_size", "max_shard", "version")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.tokenizer:
        options["tokenizer"] = Path(args.tokenizer).expanduser()
    if args.no_hash:
        options["hash"] = False
    if args.allow_nan:
        options["allow_nan"] = True
    n_head = args.n_head or 0
    report = convert(args.src, args.dst, args.to, force=args.force, verify=args.verify, n_head=n_head, **options)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
        return 0
    for note in report.notes:
        print(f"note: {note}")
    print(line(report))
    return 0


def _adapter(args: argparse.Namespace) -> int:
    """Moves an adapter between layouts."""
    for name in ("dtype", "bits", "group_size", "max_shard", "version", "n_head", "tokenizer", "verify", "allow_nan"):
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


def line(report: Report) -> str:
    """What was written."""
    agreed = ", agrees with the source" if report.verified else ""
    size = f"{report.size / 2**20:.1f} MiB" if report.size >= 2**20 else f"{report.size:,} bytes"
    return (
        f"{report.path}: {report.format}, from {report.source_format} {report.source}: "
        f"{report.parameters:,} parameters, "
        f"{size} in {report.seconds:.1f} s{agreed}"
    )
