"""The parity ladder's figures on this machine: rungs 2 to 5 and 9 as Markdown tables; exit 1 if one is over its gate.

    python -m benchmarks.parity [--rungs 2,3,4,5,9] [--seeds 3] [--verbose]

The measurements are the tests' own (tests/ladder.py); rungs 0 and 1 are exact and have no figures. It runs on the CPU.
"""

import argparse
import contextlib
import importlib
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
FAMILIES = ("gpt2", "llama", "qwen3")


def machine() -> str:
    """What the figures depend on."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "torch", "transformers", "numpy"))
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    return (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}, threads: {threads}"
    )


def main() -> int:
    """Prints the tables; 0 if every figure is within its gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", default="2,3,4,5,9", help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3, help="rung 9: seeds a family")
    parser.add_argument("--verbose", action="store_true", help="also print the worst element of every tensor")
    args = parser.parse_args()
    rungs = {int(rung) for rung in args.rungs.split(",")}

    # the tests' modules are no package, and importing them imports both frameworks
    ladder, cases = importlib.import_module("ladder"), importlib.import_module("models").CASES
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    failed = 0

    def cell(figure: Any) -> str:
        nonlocal failed
        failed += not figure.agrees
        return f"{figure.value:.1e}" + ("" if figure.agrees else " **over**")

    def show(figures: list[Any]) -> None:
        for figure in figures:
            if figure.rung in rungs:
                print(f"| {figure.rung} | {figure.what} | {cell(figure)} | {figure.gate:.1e} |", flush=True)

    quiet = contextlib.nullcontext if args.verbose else lambda: contextlib.redirect_stdout(None)
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        if rungs & {2, 3}:
            print("\n| rung | model | cost of float32 | MLX | torch | transformers | gate |")
            print("|---|---|---|---|---|---|---|", flush=True)
            for case, config in cases.items():
                for scale in (1.0, 8.0):
                    with quiet():
                        figures = ladder.compare(case, config, scale, Path(place) / f"{case} {scale}")
                    for rung, what in ((2, "logits"), (3, "gradients")):
                        if rung in rungs:
                            shown = [figure for figure in figures if "in chunks" not in figure.what]
                            own = [figure for figure in shown if figure.what.endswith(f", {what}")]
                            failed += sum(
                                not figure.agrees for figure in figures if figure.rung == rung and figure not in own
                            )
                            cells = " | ".join(cell(figure) for figure in own)
                            print(f"| {rung} | {case} x{scale:g}, {what} | {cells} | {own[-1].gate:.1e} |", flush=True)
        if rungs & {4, 5, 9}:
            print("\n| rung | what | figure | gate |\n|---|---|---|---|", flush=True)
        for family in FAMILIES if rungs & {4, 5} else ():
            for dropout in (0.0, 0.2):
                case, recipe = f"{family}, dropout {dropout:g}", ladder.training_recipe(family, dropout=dropout)
                saving = ladder.training_recipe(family, dropout=dropout, checkpoint_activations=True)
                (Path(place) / case).mkdir()
                with quiet():
                    whole, figures = ladder.crossing(case, recipe, Path(place) / case)
                    figures = ladder.same_curve(f"{case}, MLX - torch", whole["mlxgpt"], whole["torch_ref"]) + figures
                    recomputed = ladder.curve(ladder.trained("mlxgpt", saving))
                    what = f"{case}, MLX with activation checkpointing - torch without"
                    figures += ladder.same_curve(what, recomputed, whole["torch_ref"])
                show(figures)
        for family in FAMILIES if 9 in rungs else ():
            with quiet():
                figures = ladder.distance(family, range(1, args.seeds + 1))
            show(figures)
    print(f"\n{failed} over the gate" if failed else "\nevery figure is within its gate")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
