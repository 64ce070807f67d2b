"""What ``mlxgpt adopt`` prints: the table of tensors, the choices with their verdicts, what the model lands in."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from convert.adopt.landing import Landing
from convert.adopt.proof.search import Found
from convert.adopt.proof.verdicts import Verdict
from convert.adopt.rules import Map, Proposal, matching
from mlxgpt.common.config import ModelConfig

SIZES = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "block_size", "vocab_size")
WIDTH = 80
_HOW = {"": "as it is", "i o": "transposed"}


def mapping(found: Map, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """A row a rule: theirs, ours, shape of one tensor, how many there are, how it lies, how sure and why."""
    rows = []
    for rule in found.rules:
        pattern = matching(rule.theirs)
        names = [name for name in shapes if pattern.fullmatch(name)]
        rows.append({
            "theirs": rule.theirs, "ours": list(rule.to), "shape": list(shapes[names[0]]) if names else [],
            "tensors": len(names), "axes": rule.axes, "sure": rule.sure, "why": rule.why,
        })  # fmt: skip
    return rows


def how(rule: Mapping[str, Any]) -> str:
    """How a tensor lies, in words where there are some."""
    axes, pieces = rule["axes"], len(rule["ours"])
    words = [str(_HOW.get(axes, axes))]
    if pieces > 1:
        words = [f"split in {pieces}"] + ([f"as {axes}"] if axes not in ("(p o) i", "(p o)") else [])
    if "{h}" in rule["theirs"]:
        words.append("one a head")
    return ", ".join(words)


def choices(proposal: Proposal, found: Found | None, given: Sequence[str]) -> list[dict[str, Any]]:
    """A row a choice: name, value, verdict, margin, options, and what would tell."""
    if found and found.verdicts:
        return [_row(verdict) for verdict in found.verdicts if verdict.verdict != "idle"]
    rows = []
    for n, choice in enumerate(proposal.choices):
        value = found.values[n] if found else choice.options[0].label
        verdict = "given" if choice.name in given else "open" if found is None else "tried"
        options = tuple(option.label for option in choice.options)
        rows.append(_row(Verdict(choice.name, value, verdict, None, options, choice.why)))
    return rows


def _row(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.name, "value": verdict.value, "verdict": verdict.verdict, "margin": verdict.margin,
        "options": list(verdict.options), "tell": verdict.tell,
    }  # fmt: skip


def sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes of a model."""
    return {name: getattr(config, name) for name in SIZES}


def table(rows: Sequence[Mapping[str, Any]], left: Mapping[str, str], out: TextIO) -> None:
    """The tensors: a line a rule, a weight and its bias in one, folded in a narrow terminal; then what is left out."""
    from rich.console import Console
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("theirs", "ours", "shape", "how", "sure"):
        made.add_column(head, overflow="fold", no_wrap=head in ("shape", "sure"))
    biases = {row["theirs"]: row for row in rows if all(name.endswith(".bias") for name in row["ours"])}
    weights = {tuple(row["ours"]): row for row in rows if row["theirs"] not in biases}
    shown = set()
    for row in rows:
        theirs = row["theirs"]
        if row["theirs"] in biases:
            weight = weights.get(tuple(f"{name.removesuffix('.bias')}.weight" for name in row["ours"]))
            if weight:
                continue
        bias = next((each for each in biases.values() if _beside(row, each)), None)
        leaves = [one["theirs"].rpartition(".")[2] for one in (row, bias) if one]
        if leaves in (["weight"], ["weight", "bias"]):
            theirs = theirs.rpartition(".")[0] or theirs
        elif bias:
            theirs = f"{theirs}, {leaves[1]}"
        made.add_row(theirs, "\n".join(map(_short, row["ours"])), _shape(row), how(row), row["sure"])
        shown.add(row["theirs"])
    console = Console(file=out, highlight=False, markup=False, width=None if out.isatty() else WIDTH)
    console.print(made)
    said: dict[str, list[str]] = {}
    for row in rows:
        if row["sure"] != "sure" and row["theirs"] in shown:
            said.setdefault(f"{row['sure']}: {row['why'] or 'by its place'}", []).append(row["theirs"])
    for name, why in left.items():
        said.setdefault(f"left out: {why}", []).append(name)
    for why, names in said.items():
        console.print(f"{why}: {', '.join(names)}", soft_wrap=False)


def _beside(weight: Mapping[str, Any], bias: Mapping[str, Any]) -> bool:
    """Whether a bias is that of a weight."""
    return [name.removesuffix(".bias") for name in bias["ours"]] == [
        name.removesuffix(".weight") for name in weight["ours"]
    ]


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _shape(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["shape"])) or "()"


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The choices, a line each, and below what is not proved its options."""
    wide = min(max((len(row["name"]) for row in rows), default=0), 24)
    made = []
    for row in rows:
        said = row["verdict"]
        if said == "proved":
            said = f"proved ({row['margin']:,.0f})"
        made.append(f"  {row['name']:<{wide}}  {row['value']}: {said}")
        if row["verdict"] in ("open", "tried"):
            made.append(f"    of {' | '.join(row['options'])}")
        if row["verdict"] == "undetermined":
            made.append(f"    {' | '.join(row['options'])} give the same numbers here; {row['tell']}")
    if any(row["verdict"] == "proved" for row in rows):
        made.append("  (how many times rounding the nearest candidate with another option is off)")
    return made


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
