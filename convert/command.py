"""The verb ``convert``."""

import argparse
import dataclasses
import json
from pathlib import Path

from convert.conversion import Report, convert


def convert_command(args: argparse.Namespace) -> int:
    """Converts and says in the last line what was written.

    Args:
        args: src, dst, to, tokenizer, dtype, bits, group_size, max_shard, version, n_head, no_hash, allow_nan, verify,
            force, json.
    """
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
    print(_line(report))
    return 0


def _line(report: Report) -> str:
    """What was written."""
    agreed = ", agrees with the source" if report.verified else ""
    size = f"{report.size / 2**20:.1f} MiB" if report.size >= 2**20 else f"{report.size:,} bytes"
    return (
        f"{report.path}: {report.format}, from {report.source_format} {report.source}: "
        f"{report.parameters:,} parameters, "
        f"{size} in {report.seconds:.1f} s{agreed}"
    )
