"""``verify A B``: are two models one? Tensors, config and tokenizer from the files; then what frameworks make of them.

from convert import convert
from convert.verify import verify

convert("out/ckpt.pt", "model")                  # there
report = verify("out/ckpt.pt", "model")          # every rung, in every framework that is installed
assert report.agrees, report.findings
convert("model", "back.pt", to="nanogpt")        # and back
assert verify("out/ckpt.pt", "back.pt", weights_only=True).agrees    # files alone

verify("model", "transformers:model").to_json()  # transformers is the judge of what the folder means
convert("model", "model-q4", to="mlx-lm", bits=4)
report = verify("model", "model-q4", rungs=["tensors", "logits"], frameworks=["mlx"])
assert report.agrees, report.findings            # up to what 4 bits round, which report.notes say
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from convert import verify_config, verify_html, verify_models, verify_tensors, verify_text, verify_tokenizer
from convert.formats import open_model
from convert.verify_models import Side
from convert.verify_report import ON_FILES, RUNGS, Checked, Report
from convert.verify_runs import JUDGES
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.config import nearest
from mlxgpt.common.errors import TensorError, UserError


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

    A side whose tensors are not those that its config asks for is a finding; one that is damaged is an error.

    Args:
        a: the source, as it is said in the report.
        b: what should be the same model, maybe rounded or quantised.
        frameworks: of mlx and torch; default: those installed. One that is asked for and missing is no agreement.
        rungs: of tensors, config, tokenizer, logits, activations, gradients, greedy; default: all that the two sides
            can answer. One that is asked for and does not run on every pair of programs is no agreement.
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
    report = Report(str(a), str(b), demanded=frozenset(asked if rungs is not None else ()))
    one, other = _side("A", a, n_head, report), _side("B", b, n_head, report)
    if one is None or other is None:
        report.skip(", ".join(asked), f"{'A' if one is None else 'B'} has other tensors than its config asks for", True)
        return report
    sides = one, other
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        work = Path(name)
        outcome = verify_tensors.compare(one.opened, other.opened, report)
        if "tensors" not in asked:
            report.findings = [finding for finding in report.findings if finding.rung != "tensors"]
        else:
            equal = sum(row.agrees for row in report.tensors)
            kinds = f" ({', '.join(sorted(outcome.kinds))})" if outcome.kinds else ", bit for bit"
            report.checked.append(Checked("tensors", f"{equal} of {len(report.tensors)} agree{kinds}"))
        if "config" in asked:
            verify_config.compare(one.opened, other.opened, report)
        tokenizers = (
            verify_tokenizer.of(one.opened, work / "A-tokenizer"),
            verify_tokenizer.of(other.opened, work / "B-tokenizer"),
        )
        judged = (None, None)
        if not weights_only:
            running = [rung for rung in asked if rung not in ON_FILES]
            if "logits" not in running:
                report.skip("logits", "not among the rungs; --weights-only accepts that", True)
            if running and not outcome.finite:
                report.skip(", ".join(running), "values are not finite", True)
            elif running:
                plan = verify_models.plan_of(sides, tokenizers, running, data, work, report)
                explicit = frameworks is not None
                runs, programs = verify_models.run(sides, outcome, chosen, explicit, plan, work, report)
                judged = verify_models.judged(sides, runs, report)
                verify_models.compare(sides, outcome, runs, programs, running, report)
                del runs
        if "tokenizer" in asked:
            verify_tokenizer.compare(one.opened, other.opened, tokenizers, judged, report)
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


def _side(label: str, given: Path | str, n_head: int, report: Report) -> Side | None:
    """Opens one side; None and a finding where its tensors are not those of its config.

    Raises:
        UserError: see ``open_model``.
    """
    judge, colon, rest = str(given).partition(":")
    if not colon or judge not in JUDGES:
        judge, rest = "", str(given)
    try:
        try:
            return Side(label, open_model(rest), judge)
        except UserError:
            if not n_head:
                raise
            return Side(label, open_model(rest, n_head), judge)
    except TensorError as error:
        report.find("tensors", error.name, f"{label}: {error}")
        return None


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
