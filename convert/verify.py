"""``verify A B``: are two models one? Tensors, config and tokenizer from the files; then what frameworks make of them.

from convert.verify import verify

convert("out/ckpt.pt", "model")
report = verify("out/ckpt.pt", "model")                  # every rung, in every framework that is installed
assert report.agrees, report.findings
verify("model", "transformers:model").to_json()          # transformers is the judge of what the folder means
verify("model", "model-q4", weights_only=True)           # files alone
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import (
    fuse,
    hf,
    verify_config,
    verify_html,
    verify_logits,
    verify_runs,
    verify_tensors,
    verify_text,
    verify_tokenizer,
)
from convert.formats import open_model
from convert.model import Opened, Options
from convert.verify_report import ON_FILES, RUNGS, Checked, Report
from convert.verify_runs import JUDGES, Plan, Runs
from mlxgpt.common import families
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.config import nearest
from mlxgpt.common.errors import UserError
from mlxgpt.common.probing import SCALES, spell
from mlxgpt.common.tokenizer import Tokenizer


@dataclass(frozen=True)
class Side:
    """A or B: the model as read here, and the library that judges it, or ''."""

    label: str
    opened: Opened
    judge: str


def verify(
    a: Path | str,
    b: Path | str,
    *,
    frameworks: Sequence[str] | None = None,
    rungs: Sequence[str] | None = None,
    weights_only: bool = False,
    data: Path | str | None = None,
    n_head: int = 0,
) -> Report:
    """Holds ``b`` against ``a``; each is what ``open_model`` reads, or ``transformers:DIR`` or ``mlx-lm:DIR``.

    Args:
        a: the source, as it is said in the report.
        b: what should be the same model, maybe rounded or quantised.
        frameworks: of mlx and torch; default: those installed. One that is asked for and missing is no agreement.
        rungs: of tensors, config, tokenizer, logits, activations, gradients, greedy; default: all.
        weights_only: only the first three; else a report without logits does not agree.
        data: a text for the logits; default: Python's language reference.
        n_head: heads, for files that do not say it.

    Raises:
        UserError: a side cannot be read, or there is no such rung, framework or text.
    """
    asked = _asked("rung", rungs, ON_FILES if weights_only else RUNGS)
    if weights_only and (data or frameworks or set(asked) - set(ON_FILES)):
        raise UserError("--weights-only runs no model: expected no --data, no --frameworks, and rungs of files alone")
    chosen = _asked("framework", frameworks, tuple(PACKAGES))
    sides = _side("A", a, n_head), _side("B", b, n_head)
    report = Report(str(a), str(b))
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        work = Path(name)
        outcome = verify_tensors.compare(sides[0].opened, sides[1].opened, report)
        if "tensors" not in asked:
            report.findings = [finding for finding in report.findings if finding.rung != "tensors"]
        else:
            equal = sum(row.agrees for row in report.tensors)
            kinds = f" ({', '.join(sorted(outcome.kinds))})" if outcome.kinds else ", bit for bit"
            report.checked.append(Checked("tensors", f"{equal} of {len(report.tensors)} agree{kinds}"))
        if "config" in asked:
            verify_config.compare(sides[0].opened, sides[1].opened, report)
        tokenizers = _tokenizer(sides[0], work), _tokenizer(sides[1], work)
        runs, judged = Runs(), (None, None)
        if not weights_only:
            running = [rung for rung in asked if rung not in ON_FILES]
            if "logits" not in running:
                report.skip("logits", "not among the rungs; --weights-only accepts that", True)
            if running and not outcome.finite:
                report.skip(", ".join(running), "values are not finite", True)
            elif running:
                plan = _plan(sides, tokenizers, running, data, work, report)
                runs, programs = _run(sides, outcome, chosen, frameworks is not None, plan, work, report)
                judged = _judged(sides, runs, report)
                _compare(sides, outcome, runs, programs, running, report)
                del runs
        if "tokenizer" in asked:
            explicit = rungs is not None
            verify_tokenizer.compare(sides[0].opened, sides[1].opened, tokenizers, judged, report, explicit)
    return report


def _asked(what: str, given: Sequence[str] | None, able: Sequence[str]) -> list[str]:
    """What was asked for, in its order; all where nothing was."""
    known = RUNGS if what == "rung" else tuple(PACKAGES)
    for name in given or ():
        if name not in known:
            raise UserError(f"{what} {name!r}{nearest(name, known)}: expected one of {', '.join(known)}")
    if given is not None and not given:
        raise UserError(f"no {what} given: expected one or more of {', '.join(known)}")
    return [name for name in (able if given is None else known) if given is None or name in given]


def _side(label: str, given: Path | str, n_head: int) -> Side:
    """Opens one side.

    Raises:
        UserError: see ``open_model``.
    """
    judge, colon, rest = str(given).partition(":")
    if not colon or judge not in JUDGES:
        judge, rest = "", str(given)
    try:
        return Side(label, open_model(rest), judge)
    except UserError:
        if not n_head:
            raise
        return Side(label, open_model(rest, n_head), judge)


def _tokenizer(side: Side, work: Path) -> Tokenizer | None:
    return verify_tokenizer.of(side.opened, work / f"{side.label}-tokenizer")


def _plan(
    sides: tuple[Side, Side],
    tokenizers: tuple[Tokenizer | None, Tokenizer | None],
    running: list[str],
    data: Path | str | None,
    work: Path,
    report: Report,
) -> Plan:
    configs = [side.opened.config for side in sides]
    text = Path(data).expanduser() if data else None
    ids = verify_runs.token_ids(configs, tokenizers[0] or tokenizers[1], text, report.notes)
    adapted = any(side.opened.format == fuse.FORMAT for side in sides)
    if adapted and "gradients" in running:
        report.skip("gradients", "a side is a base and an adapter, whose matrices are not those of the other", False)
        running.remove("gradients")
    return verify_runs.write_plan(ids, work, "gradients" in running, "greedy" in running, adapted)


def _run(
    sides: tuple[Side, Side],
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
        if side.judge and not verify_runs.installed(JUDGES[side.judge][0]):
            report.skip(side.judge, f"not installed: pip install {side.judge}", True)
        elif side.judge:
            probes = verify_tokenizer.TEXTS if side.judge == "transformers" else ()
            verify_runs.run_judge(side.judge, side.label, side.opened, plan, probes, work, runs)
    for program, said in runs.failed.items():
        report.find("logits", program, f"could not run: {said}")
    return runs, programs


def _folder(side: Side, work: Path) -> Path:
    """What the frameworks load of a side: itself, or what it converts to."""
    as_it_is = side.opened.format in ("hf", fuse.FORMAT)  # an adapter is added by the framework itself
    return side.opened.path if as_it_is else _written(side.opened, work, f"{side.label}-hf")


def _written(opened: Opened, work: Path, name: str) -> Path:
    place = work / name
    hf.write(dataclasses.replace(opened, moments=None), place, Options(hash=False))
    return place


def _judged(sides: tuple[Side, Side], runs: Runs, report: Report) -> tuple[Any, Any]:
    """What a library said of a folder's tensors, as findings; the ids of its tokenizer."""
    ids: list[Any] = [None, None]
    for number, side in enumerate(sides):
        arrays = runs.arrays.get((side.judge, side.label))
        if arrays is None:
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


def _compare(
    sides: tuple[Side, Side],
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
    """How far rounding moved the logits; with another quantisation than ours that is the gate, twice."""
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
        rest = ", ".join(rung for rung in running if rung != "logits")
        if rest:
            report.skip(rest, "quantised otherwise than here: there are no weights to hold them against", False)


def _own_rounding(runs: Runs, by: tuple[list[str], list[str]], keys: tuple[str, str]) -> float:
    """What our own quantisation of the same weights does to the logits, at the worse scale."""
    side = 0 if keys[0] != "A" else 1
    plain = "AB"[side]
    found = [
        verify_logits.worst(runs.arrays[name, keys[side]][what], runs.arrays[name, plain][what])[0]
        for name in by[side]
        for what in ("logits.x1", "logits.x8")
        if (name, plain) in runs.arrays and what in runs.arrays[name, plain]
    ]
    return max(found, default=0.0)


def verify_command(args: argparse.Namespace) -> int:
    """Prints the report; exit code 0 only if everything agrees.

    Args:
        args: a, b, html, weights_only, rungs, frameworks, data, n_head, json.
    """
    page = Path(args.html).expanduser() if args.html else None
    if page and not page.parent.is_dir():
        raise UserError(f"{page.parent}: no such folder")
    report = verify(
        args.a,
        args.b,
        frameworks=_listed(args.frameworks),
        rungs=_listed(args.rungs),
        weights_only=args.weights_only,
        data=args.data,
        n_head=args.n_head or 0,
    )
    if page:
        verify_html.write(report, page)
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        verify_text.show(report, sys.stdout)
    return 0 if report.agrees else 1


def _listed(text: str | None) -> list[str] | None:
    """``a,b`` as a list."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
