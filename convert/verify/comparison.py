"""What ``verify`` does, in order: tensors, config and tokenizer from the files, then the rungs that run models."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from convert.formats.registry import open_model
from convert.verify import config as verify_config
from convert.verify import models as verify_models
from convert.verify import own as verify_own
from convert.verify import tensors as verify_tensors
from convert.verify import tokenizer as verify_tokenizer
from convert.verify.models import Side
from convert.verify.processes import JUDGES
from convert.verify.report import ON_FILES, RUNGS, Checked, Report
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.errors import TensorError, UserError, nearest
from mlxgpt.common.model import families
from mlxgpt.common.model.family.own_config import NOTE


def verify(
    a: Path | str,
    b: Path | str,
    *,
    frameworks: Sequence[str] | None = None,
    rungs: Sequence[str] | None = None,
    weights_only: bool = False,
    data: Path | str | None = None,
    n_head: int = 0,
    config: Path | str | None = None,
    kwargs: str | None = None,
) -> Report:
    """Holds ``b`` against ``a``; each is what ``open_model`` reads, or ``transformers:DIR`` or ``mlx-lm:DIR``.

    One of them may be ``module:FILE.py:Class``, which executes the user's own code: see own.py.

    A side whose tensors are not those that its config asks for is a finding; one that is damaged is an error.

    Args:
        a: the source, as it is said in the report.
        b: what should be the same model, maybe rounded or quantized.
        frameworks: of mlx and torch; default: those installed. One that is asked for and missing is no agreement.
        rungs: of tensors, config, tokenizer, logits, activations, gradients, greedy; default: all that the two sides
            can answer. One that is asked for and does not run on every pair of programs is no agreement.
        weights_only: only the first three; else a report without logits does not agree.
        data: a text for the logits; default: Python's language reference.
        n_head: heads, for files that do not say it.
        config: a config.json, for weights that have none beside them.
        kwargs: JSON of what the user's class is built with.

    Raises:
        UserError: a side cannot be read, or there is no such rung, framework or text.
    """
    asked = _asked("rung", rungs, ON_FILES if weights_only else RUNGS)
    if weights_only and (data or frameworks or set(asked) - set(ON_FILES)):
        raise UserError("--weights-only runs no model: expected no --data, no --frameworks, and rungs of files alone")
    chosen = _asked("framework", frameworks, tuple(PACKAGES))
    report = Report(str(a), str(b), demanded=frozenset(asked if rungs is not None else ()))
    one, other = _sides(a, b, n_head, config, kwargs, report)
    if one is None or other is None:
        report.skip(", ".join(asked), f"{'A' if one is None else 'B'} has other tensors than its config asks for", True)
        return report
    sides = one, other
    headed = next((side.opened.config for side in sides if side.opened.config.labels), None)
    if headed and not weights_only:
        left = [rung for rung in asked if rung not in ON_FILES]
        report.skip(", ".join(left), f"{headed.kind} predicts no tokens: files alone are compared", rungs is not None)
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        work = Path(name)
        outcome = verify_tensors.compare(one.opened, other.opened, report)
        if "tensors" not in asked:
            report.findings = [finding for finding in report.findings if finding.rung != "tensors"]
        else:
            equal = sum(row.agrees for row in report.tensors)
            kinds = f" ({', '.join(sorted(outcome.kinds))})" if outcome.kinds else ", bit for bit"
            report.checked.append(Checked("tensors", f"{equal} of {len(report.tensors)} agree{kinds}"))
            verify_tensors.compare_moments(one.opened.moments, other.opened.moments, report)
        if "config" in asked:
            verify_config.compare(one.opened, other.opened, report)
        tokenizers = (
            verify_tokenizer.tokenizer_of(one.opened, work / "A-tokenizer"),
            verify_tokenizer.tokenizer_of(other.opened, work / "B-tokenizer"),
        )
        judged = (None, None)
        if not weights_only and not headed:
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


def _judged(side: Side) -> Side:
    """``side``, whose judge must know its family."""
    if side.judge in ("transformers", "mlx-lm") and families.family_of(side.opened.config).own:
        raise UserError(f"{side.judge}:{side.opened.path}: {NOTE}")
    return side


def _sides(
    a: Path | str, b: Path | str, n_head: int, config: Path | str | None, kwargs: str | None, report: Report
) -> tuple[Side | None, Side | None]:
    """Both sides; a user's class is opened by what the other one has.

    Raises:
        UserError: see ``_side``; both are classes; or --kwargs without one.
    """
    own = [str(each).startswith(f"{verify_own.PREFIX}:") for each in (a, b)]
    if all(own):
        raise UserError(f"{a} and {b}: expected a model folder on one side, whose map says how their tensors lie")
    if kwargs and not any(own):
        raise UserError("--kwargs: expected module:FILE.py:Class on one side")
    sides = [None if mine else _side("AB"[n], (a, b)[n], n_head, config, report) for n, mine in enumerate(own)]
    if any(own):
        n = own.index(True)
        there = sides[1 - n]
        if there is not None:
            opened, made = verify_own.open_side(str((a, b)[n]), kwargs, there.opened)
            sides[n] = Side("AB"[n], opened, verify_own.PREFIX, made)
    return sides[0], sides[1]


def _side(label: str, given: Path | str, n_head: int, config: Path | str | None, report: Report) -> Side | None:
    """Opens one side; None and a finding where its tensors are not those of its config.

    Raises:
        UserError: see ``open_model``.
    """
    judge, colon, rest = str(given).partition(":")
    if not colon or judge not in JUDGES:
        judge, rest = "", str(given)
    try:
        try:
            return _judged(Side(label, open_model(rest), judge))
        except UserError:
            if not n_head and config is None:
                raise
            return _judged(Side(label, open_model(rest, n_head, config), judge))
    except TensorError as error:
        report.find("tensors", error.name, f"{label}: {error}")
        return None
