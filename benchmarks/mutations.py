"""What `mlxgpt verify` says of each thing that goes wrong in conversions, as a Markdown table; exit 1 if one is missed.

    python -m benchmarks.mutations [--only NAME] [--report] [--frameworks mlx,torch]

The mutations are the tests' own (tests/mutations.py): a model is written in a foreign format, converted, and the
folder broken on purpose; then it is compared with its source. --report prints each full report.
"""

import argparse
import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from convert.verify import processes as verify_runs
from convert.verify import text as verify_text
from convert.verify import verify
from convert.verify.report import Report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
HEAD = ("what was done", "from", "on the files", "logits", "diverges first", "gradients")


def cells(name: str, source: str, report: Report) -> list[str]:
    """One row: the first findings of the files, and the worst of each other rung."""

    def said(rung: str) -> str:
        return next((finding.name for finding in report.findings if finding.rung == rung), "")

    files = [f for f in report.findings if f.rung in ("tensors", "config", "tokenizer")]
    first = f"{files[0].rung}: {files[0].name}: {files[0].message}" if files else "nothing"
    first = re.sub(r"B: \S+: ", "", first).replace("|", "\\|")
    more = f" (+{len(files) - 1})" if len(files) > 1 else ""
    worst = max((figure.value for figure in report.figures if figure.rung == "logits"), default=None)
    logits = "not run" if worst is None else f"{worst:.1e}" if said("logits") else "agree"
    count = sum(finding.rung == "gradients" for finding in report.findings)
    gradients = said("gradients") + (f" (+{count - 1})" if count > 1 else "")
    return [
        name,
        source,
        (first if len(first) <= 160 else f"{first[:157]}...") + more,
        logits,
        said("activations"),
        gradients,
    ]


def main() -> int:
    """Prints the table; 0 if everything was named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose name holds this")
    parser.add_argument("--report", action="store_true", help="also the report of each")
    parser.add_argument("--frameworks", default="mlx", help="of mlx,torch")
    args = parser.parse_args()

    # the tests' modules are no package
    mutations: Any = importlib.import_module("mutations")
    verify_runs.run_framework = importlib.import_module("in_process").run_framework
    words, missed, pairs = mutations.tokenizer(), 0, {}
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        for base in mutations.BASES:
            (top / base).mkdir()
            pairs[base] = mutations.pair(base, top / base, words)
            agrees = verify(*pairs[base], frameworks=args.frameworks.split(",")).agrees
            missed += not agrees
            print(f"{base}, from {mutations.BASES[base][1]}: {'agrees' if agrees else 'DOES NOT AGREE'}")
        print(f"\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
        for name, mutation in mutations.MUTATIONS.items():
            if args.only not in name:
                continue
            source, converted = pairs[mutation.base]
            place = shutil.copytree(converted, top / "broken")
            mutation.change(place)
            report = verify(source, place, frameworks=args.frameworks.split(","))
            named = any(f.rung == mutation.rung and mutation.name in f.name for f in report.findings)
            missed += report.agrees or not named
            form = f"{mutation.base}, {mutations.BASES[mutation.base][1]}"
            print(f"| {' | '.join(cells(name, form, report))} |{'' if named else ' MISSED'}", flush=True)
            if args.report:
                verify_text.show(report, sys.stdout)
            shutil.rmtree(place)
    print(f"\n{missed} missed" if missed else "\neach is named")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
