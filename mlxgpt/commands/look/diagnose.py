"""The verb ``diagnose``: why a run's loss is what it is, each reason with its number and what to change."""

import dataclasses
import json
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

from mlxgpt.common.evaluate import diagnose
from mlxgpt.common.files import atomic_write
from mlxgpt.common.runs import summary

_MARK = {"bad": "!!", "note": " .", "good": "ok"}


def diagnose_command(args: Namespace) -> int:
    """Prints the findings, worst first; they are kept in the run for its report."""
    run = summary.read_run(Path(args.run))
    corpus = None if args.quick else diagnose.count_corpus(run, lambda line: print(line, file=sys.stderr))
    found = diagnose.diagnose(run, corpus)
    counted = dataclasses.asdict(corpus) if corpus else None
    kept = {"step": run.step, "findings": [finding._asdict() for finding in found], "corpus": counted}
    if corpus:
        with atomic_write(run.path / diagnose.FILE) as file:
            file.write(json.dumps(kept, indent=1).encode())
    if args.json:
        print(json.dumps({"run": str(run.path), **kept}))
        return 0
    print(f"{run.name}: step {run.step:,} of {run.steps:,}, {run.status}")
    for finding in found:
        head = f"{_MARK[finding.level]} {finding.about}: "
        print(textwrap.fill(head + finding.found, 100, subsequent_indent="   "))
        if finding.change:
            print(textwrap.fill(f"   change: {finding.change}", 100, subsequent_indent="           "))
    return 0
