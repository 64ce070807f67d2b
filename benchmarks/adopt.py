"""The zoo of home-made GPTs through `mlxgpt adopt`, as a Markdown table; exit 1 if one is not adopted rightly.

    python -m benchmarks.adopt [--only NAME] [--backend mlx|torch] [--wrong]

Of each animal (tests/zoo) the verb is given the state dict and 32 tokens with their logits, now and then hidden states.
Then the folder is compared with what the animal is, on four times the tokens, and written back. --wrong prints those
alone of which something is wrong.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
HEAD = ("animal", "what it is", "lands in", "candidates", "seconds", "proved", "undetermined", "error MLX",
        "error torch", "wrong")  # fmt: skip


def described(spec: Any) -> str:
    """What sets the animal apart, in a few words."""
    gate = "" if spec.mlp == "plain" else f" gated ({spec.mlp})"
    return (
        f"{spec.norm}, {spec.placement}, {spec.position}, {spec.act}{gate}, {spec.heads} kv heads, q k v {spec.qkv},"
        f" {spec.matrix}{', stacked' if spec.stacked else ''}, {spec.dtype} {spec.file}"
    )


def row(spec: Any, made: Any) -> list[str]:
    """The cells of an animal."""
    report = made.report
    rows = report.get("choices", ())
    proved = sum(one["verdict"] == "proved" for one in rows)
    errors = [f"{made.errors[name]:.0e}" if name in made.errors else "" for name in ("mlx", "torch")]
    family = (report.get("landing") or {}).get("family", "")
    faults = "; ".join(made.faults).replace("|", "\\|")
    return [spec.name, described(spec), family, str(report.get("candidates", "")), f"{made.seconds:.1f}", str(proved),
            ", ".join(made.undetermined), *errors, faults]  # fmt: skip


def main() -> int:
    """Prints the table; 0 if every animal was adopted rightly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose name holds one of these, with commas between")
    parser.add_argument("--backend", default="torch", choices=["mlx", "torch"], help="what runs the candidates")
    parser.add_argument("--wrong", action="store_true", help="print those alone of which something is wrong")
    args = parser.parse_args()
    # the tests' modules are no package of ours
    adopting: Any = importlib.import_module("zoo.adopting")
    animals: Any = importlib.import_module("zoo.animals")
    choices: Any = importlib.import_module("zoo.choices")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    seconds, candidates, right, opened = list[float](), list[int](), 0, 0
    for spec in choices.animals():
        if not any(part in spec.name for part in args.only.split(",")):
            continue
        with tempfile.TemporaryDirectory() as place:
            made = adopting.adopt(animals.make(spec, Path(place) / "zoo"), Path(place) / "model", args.backend)
        right += not made.faults
        opened += bool(made.undetermined)
        seconds.append(made.seconds)
        candidates.append(made.report.get("candidates", 0))
        if made.faults or not args.wrong:
            print(f"| {' | '.join(row(spec, made))} |", flush=True)
    print(
        f"\n{right} of {len(seconds)} adopted rightly, of {opened} the sample leaves a choice open and it is named;"
        f" median {sorted(seconds)[len(seconds) // 2]:.1f} s and {sorted(candidates)[len(candidates) // 2]} candidates,"
        f" worst {max(seconds):.1f} s and {max(candidates)}"
    )
    return int(right < len(seconds))


if __name__ == "__main__":
    sys.exit(main())
