"""The rungs that run models: which program runs which side, its messages, and which results are compared."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats import adapter as adapter_format
from convert.formats import hf
from convert.formats.opened import Opened, Options
from convert.verify import logits as verify_logits
from convert.verify import own as verify_own
from convert.verify import processes as verify_runs
from convert.verify import tensors as verify_tensors
from convert.verify import tokenizer as verify_tokenizer
from convert.verify.own import Own
from convert.verify.processes import JUDGES, Plan, Runs
from convert.verify.report import Checked, Report
from mlxgpt.common.inference.probe import SCALES, spell
from mlxgpt.common.model import families
from mlxgpt.common.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class Side:
    """A or B: the model as read here, and what judges it: a library, ``module`` for the user's ``own`` class, or ''."""

    label: str
    opened: Opened
    judge: str
    own: Own | None = None


Sides = tuple[Side, Side]
Tokenizers = tuple[Tokenizer | None, Tokenizer | None]


def plan_of(
    sides: Sides,
    tokenizers: Tokenizers,
    running: list[str],
    data: Path | str | None,
    work: Path,
    report: Report,
) -> Plan:
    configs = [side.opened.config for side in sides]
    text = Path(data).expanduser() if data else None
    ids = verify_runs.token_ids(configs, tokenizers[0] or tokenizers[1], text, report.notes)
    adapted = any(side.opened.format == adapter_format.FORMAT for side in sides)
    if adapted and "gradients" in running:
        report.skip("gradients", "a side is a base and an adapter, whose matrices are not those of the other", False)
        running.remove("gradients")
    return verify_runs.write_plan(ids, work, "gradients" in running, "greedy" in running, adapted)


def run(
    sides: Sides,
    outcome: verify_tensors.Outcome,
    chosen: list[str],
    explicit: bool,
    plan: Plan,
    work: Path,
    report: Report,
) -> tuple[Runs, list[str]]:
    """Every program on every side that it is for; a side that is rounded also as it was."""
    runs, programs = Runs(), []
    folders: dict[str, Path] = {}
    for side, changes in zip(sides, outcome.rounding, strict=True):
        if side.judge:
            continue
        if changes:
            folders[f"{side.label} rounded"] = _written(verify_tensors.rounded(side.opened, changes), work, side.label)
        folders[side.label] = _folder(side, work)
    # the floor is measured on the first
    folders = dict(sorted(folders.items(), key=lambda item: not item[0].endswith("rounded")))
    for name in chosen if folders else ():
        if not verify_runs.installed(name):
            report.skip(f"{name}", f"not installed: pip install {name}", explicit)
            continue
        verify_runs.run_framework(name, folders, plan, work, runs)
        programs.append(name)
    if explicit and not folders:
        report.skip(", ".join(chosen), "both sides are judged by libraries", True)
    for side in sides:
        if side.own:
            verify_own.run(side.own, side.label, side.opened, plan, report.notes, runs)
        elif side.judge and not verify_runs.installed(JUDGES[side.judge][0]):
            report.skip(side.judge, f"not installed: pip install {side.judge}", True)
        elif side.judge:
            probes = verify_tokenizer.TEXTS if side.judge == "transformers" else ()
            verify_runs.run_judge(side.judge, side.label, side.opened, plan, probes, work, runs)
    for program, said in runs.failed.items():
        report.find("logits", program, f"could not run: {said}")
    return runs, programs


def _folder(side: Side, work: Path) -> Path:
    """What the frameworks load of a side: itself, or what it converts to."""
    as_it_is = side.opened.format in ("hf", adapter_format.FORMAT)  # an adapter is added by the framework itself
    return side.opened.path if as_it_is else _written(side.opened, work, f"{side.label}-hf")


def _written(opened: Opened, work: Path, name: str) -> Path:
    place = work / name
    hf.write(dataclasses.replace(opened, moments=None), place, Options(hash=False))
    return place


def judged(sides: Sides, runs: Runs, report: Report) -> tuple[Any, Any]:
    """What a library said of a folder's tensors, as findings; the ids of its tokenizer."""
    ids: list[Any] = [None, None]
    for number, side in enumerate(sides):
        arrays = runs.arrays.get((side.judge, side.label))
        if arrays is None or side.own:
            continue
        said = json.loads(arrays["report"].item())
        for kind, names in said["said"].items():
            for name in names:
                report.find("tensors", name, f"{side.judge}: {kind.replace('_', ' ')}")
        wrong = [
            name for name, digest in said["sha256"].items() if digest != _float_digest(side.opened.tensors[name].read())
        ]
        for name in wrong:
            report.find("tensors", name, f"{side.judge} reads other values from {side.opened.path} than mlxgpt")
        count = len(said["sha256"])
        report.checked.append(Checked("tensors", f"{side.judge} reads {count - len(wrong)} of {count} as mlxgpt does"))
        ids[number] = said["ids"]
        if side.judge == "mlx-lm":
            report.notes += families.mlx_lm_deviations(side.opened.config)
    return ids[0], ids[1]


def _float_digest(array: np.ndarray) -> str:
    return verify_tensors.sha256(array.astype(np.float32))


def compare(
    sides: Sides,
    outcome: verify_tensors.Outcome,
    runs: Runs,
    programs: list[str],
    running: list[str],
    report: Report,
) -> None:
    """The rungs that were asked for, on every pair of programs that ran."""
    by = [[side.judge] if side.judge else programs for side in sides]
    rounds = [
        f"{side.label} rounded" if changes else side.label
        for side, changes in zip(sides, outcome.rounding, strict=True)
    ]
    keys = (rounds[0], rounds[1])
    plain = ("A", "B")
    base = keys[0] if not sides[0].judge else keys[1]
    floors = verify_logits.Floors(runs, base)
    if floors.measured:
        ran = [name for name in map(spell, SCALES) if f"logits.{name}" in runs.exact]
        costs = " and ".join(f"{floors.of(f'logits.{name}'):.1e} ({name})" for name in ran)
        report.notes.append(
            f"gates: 1e-5 of the largest value, or 4 times what float32 costs torch: {costs} for logits"
        )
    else:
        report.notes.append("gates: 1e-5 of the largest value; torch did not run, so no floor is measured")
    found = list(verify_logits.pairs(runs, (by[0], by[1]), keys))
    if not found:
        report.skip(", ".join(running), "no program ran on both sides", True)
    for pair in found:
        if outcome.steps:
            continue
        if any(side.own for side in sides):
            floors.angles = verify_own.angles(pair, sides[0].opened.config)
            floors.wide = 4.0 if sides[0].opened.config.position == "rope" else 1.0
        if "logits" in running:
            verify_logits.compare_logits(pair, floors, report)
        if "activations" in running:
            verify_logits.compare_activations(pair, floors, report)
        if "gradients" in running:
            verify_logits.compare_gradients(pair, floors, report)
        if "greedy" in running:
            verify_logits.compare_greedy(pair, floors, report)
    if keys != plain:
        _distances(runs, (by[0], by[1]), keys, outcome, running, report)


def _distances(
    runs: Runs,
    by: tuple[list[str], list[str]],
    keys: tuple[str, str],
    outcome: verify_tensors.Outcome,
    running: list[str],
    report: Report,
) -> None:
    """How far rounding moved the logits; with another quantization than ours that is the gate, twice."""
    kinds = ", ".join(sorted(outcome.kinds))
    for number, pair in enumerate(verify_logits.pairs(runs, by, ("A", "B"))):
        value, mean, _ = verify_logits.worst(pair.b["logits.x1"], pair.a["logits.x1"])
        same = float((pair.a["logits.x1"].argmax(-1) == pair.b["logits.x1"].argmax(-1)).mean())
        moved = f"{value:.2e} of the largest at most, {mean:.2e} in the mean, top-1 agreement {same:.1%}"
        if not number:
            report.notes.append(f"{kinds}: against the model before rounding, {pair.name}, the logits move by {moved}")
        if outcome.steps and "logits" in running:
            own = _own_rounding(runs, by, keys)
            verify_logits.compare_logits(pair, verify_logits.Floors(Runs(), ""), report, 2 * own)
    if outcome.steps:
        rest = [rung for rung in running if rung != "logits"]
        if rest:
            reason = "quantized otherwise than here: there are no weights to hold them against"
            report.skip(", ".join(rest), reason, not report.demanded.isdisjoint(rest))


def _own_rounding(runs: Runs, by: tuple[list[str], list[str]], keys: tuple[str, str]) -> float:
    """What our own quantization of the same weights does to the logits, at the worse scale."""
    side = 0 if keys[0] != "A" else 1
    plain = "AB"[side]
    found = [
        verify_logits.worst(runs.arrays[name, keys[side]][what], runs.arrays[name, plain][what])[0]
        for name in by[side]
        for what in ("logits.x1", "logits.x8")
        if (name, plain) in runs.arrays and what in runs.arrays[name, plain]
    ]
    return max(found, default=0.0)
