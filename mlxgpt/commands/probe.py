"""The verb ``probe``."""

import argparse
import importlib
from dataclasses import replace
from pathlib import Path

from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference.probe import request_of, write_arrays


def probe_command(args: argparse.Namespace) -> int:
    """Writes 0.npz, 1.npz ... into --out, one a folder; with --exact also 0.exact.npz, the first in float64."""
    request, out = request_of(vars(args)), Path(args.out)
    if not out.is_dir():
        raise UserError(f"{out}: no such folder")
    probe = importlib.import_module(f"{PACKAGES[args.backend]}.probe").probe
    jobs = [(f"{number}.npz", folder, False) for number, folder in enumerate(args.folder)]
    for name, folder, exact in [*jobs, ("0.exact.npz", args.folder[0], True)][: len(jobs) + args.exact]:
        write_arrays(
            out / name, probe(folder, replace(request, exact=exact, greedy=0 if exact else args.greedy), args.device)
        )
        print(out / name)
    return 0
