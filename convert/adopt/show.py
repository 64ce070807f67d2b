"""What ``mlxgpt adopt`` prints: the table of tensors, the choices with their verdicts, what the model lands in."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from convert.adopt.landing import Landing
from convert.adopt.rules import Map, Proposal, matching
from convert.adopt.search import Found
from convert.adopt.verdicts import Verdict
from mlxgpt.common.config import ModelConfig

SIZES = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "block_size", "vocab_size")
_HOW = {"": "as it is", "i o": "transposed"}


def mapping(found: Map, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """A row a rule: theirs, ours, shape of one tensor, how it lies, how sure and why; then what is left out."""
    rows = []
    for rule in found.rules:
        names = [name for name in shapes if matching(rule.theirs).fullmatch(name)]
        rows.append({
            "theirs": rule.theirs, "ours": list(rule.to), "shape": list(shapes[names[0]]) if names else [],
            "tensors": len(names), "axes": rule.axes, "sure": rule.sure, "why": rule.why,
        })  # fmt: skip
    return rows


def how(rule: Mapping[str, Any]) -> str:
    """How a tensor lies, in words where there are some."""
    axes, pieces = rule["axes"], len(rule["ours"])
    words = [_HOW.get(axes, axes)]
    if pieces > 1:
        words = [f"split in {pieces}"] + ([f"as {axes}"] if axes not in ("(p o) i", "(p o)") else [])
    if "{h}" in rule["theirs"]:
        words.append("one a head")
    return ", ".join(words)


def choices(proposal: Proposal, found: Found | None, given: Sequence[str]) -> list[dict[str, Any]]:
    """A row a choice: name, value, verdict, margin, options, and what would tell."""
    if found and found.verdicts:
        return [_row(verdict) for verdict in found.verdicts if verdict.verdict != "idle"]
    word = "open" if found is None else "tried"
    return [
        {
            "name": choice.name,
            "value": choice.options[0].label,
            "verdict": "given" if choice.name in given else word,
            "margin": None,
            "options": [option.label for option in choice.options],
            "tell": choice.why,
        }
        for choice in proposal.choices
    ]


def _row(verdict: Verdict) -> dict[str, Any]:
    margin = verdict.margin if math.isfinite(verdict.margin) else None
    return {
        "name": verdict.name, "value": verdict.value, "verdict": verdict.verdict, "margin": margin,
        "options": list(verdict.options), "tell": verdict.tell,
    }  # fmt: skip


def sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes of a model."""
    return {name: getattr(config, name) for name in SIZES}


def table(rows: Sequence[Mapping[str, Any]], left: Mapping[str, str], out: TextIO) -> None:
    """The tensors: a line a rule, folded where the terminal is narrow; then what is left out."""
    from rich.console import Console
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("theirs", "ours", "shape", "how", "sure"):
        made.add_column(head, overflow="fold")
    for row in rows:
        sure = row["sure"] if row["sure"] == "sure" or not row["why"] else f"{row['sure']}: {row['why']}"
        shape = "x".join(map(str, row["shape"])) or "()"
        made.add_row(row["theirs"], "\n".join(row["ours"]), shape, how(row), sure)
    for name, why in left.items():
        made.add_row(name, "left out", "", "", why)
    Console(file=out, highlight=False, markup=False, soft_wrap=False, width=None if out.isatty() else 100).print(made)


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The choices, a line each."""
    wide = max((len(row["name"]) for row in rows), default=0)
    made = []
    for row in rows:
        said = row["verdict"]
        if said == "proved":
            said = f"proved: the nearest other is off {_times(row['margin'])} as much as rounding"
        elif said == "undetermined":
            said = f"undetermined: {' and '.join(row['options'])} give the same numbers; {row['tell']} would tell"
        elif said in ("open", "tried"):
            said = f"{said}: {', '.join(row['options'])}"
        made.append(f"  {row['name']:<{wide}}  {row['value']:<12}  {said}")
    return made


def _times(margin: float | None) -> str:
    return "without end" if margin is None else f"{margin:,.0f} times"


def verdict(found: Found) -> str:
    """What the search says, in a line."""
    tried = f"{found.candidates} candidates in {found.seconds:.1f} s"
    far = f"off by {found.error:.1e} of the largest logit"
    if found.fits:
        return f"the sample's logits agree: {far} (gate {found.gate:.1e}, rounding {found.floor:.1e}); {tried}"
    return f"no candidate gives the sample's logits: the best is {far} (gate {found.gate:.1e}); {tried}"


def landed(landing: Landing) -> str:
    """What is written, in a line."""
    kind = "published architecture" if landing.published else "model_type"
    return f"lands in: {kind} {landing.config.family}: {landing.why}"
