"""The verb ``doctor``: what this machine is, and whether it computes what it should."""

import json
import sys
from argparse import Namespace
from pathlib import Path

from mlxgpt.common.doctor import examine, show
from mlxgpt.common.errors import UserError


def doctor_command(args: Namespace) -> int:
    """Prints the report.

    Args:
        args: framework (or None: those that are here), device, quick, json, out.

    Returns:
        1 if a rung of the ladder failed, else 0.

    Raises:
        UserError: no framework, or no such device; --out cannot be written.
    """
    out = Path(args.out) if args.out else None
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--out {out}: expected a file in a folder that exists")
    report = examine.examine(args.framework, args.device, args.quick, lambda text: print(text, file=sys.stderr))
    text = json.dumps(report) if args.json else "\n".join(show.lines(report))
    print(text)
    if out:
        out.write_text(f"{text}\n", encoding="utf-8")
    return int(report["verdict"] == "FAILED")
