"""Why is a loss bad? What a run's numbers say, each with the number and with what to change.

Nothing here needs a framework: metrics, recipe and environment of a run folder, and of the corpus its tokens.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlxgpt.common.data.inspect import inspect_shards
from mlxgpt.common.data.shards import is_shards
from mlxgpt.common.data.token_source import open_data
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate import ngrams
from mlxgpt.common.files import read_json
from mlxgpt.common.model import params
from mlxgpt.common.plan.budget import BESIROGLU, HOFFMANN
from mlxgpt.common.recipes import build
from mlxgpt.common.runs.summary import Run
from mlxgpt.common.units import short

FILE = "diagnosis.json"

_TAIL = 0.1  # share of the steps, at the end, whose mean is "the training loss"
_LAW = 40e6  # parameters from which the scaling laws were fitted
_RARE = 10  # occurrences of a token below which its embedding hardly trains


class Finding(NamedTuple):
    """One line of the diagnosis."""

    level: str
    """``bad``, ``note`` or ``good``"""
    about: str
    """What was looked at, such as ``learning rate``"""
    found: str
    """The number"""
    change: str
    """What to do; empty where nothing is to be done"""


@dataclass
class Corpus:
    """What counting the tokens of a run's corpus gives; the losses are nats a token of its validation text."""

    losses: list[float]  # of the 1-gram to 5-gram models
    train_tokens: int
    counted: int  # training tokens that the models were made from
    rare: float  # share of the vocabulary that occurs fewer than ten times in them
    documents: int | None = None
    duplicates: int | None = None


def count_corpus(run: Run, say: Callable[[str], None]) -> Corpus | None:
    """Counts the run's corpus; None for a fine-tuning, and where the corpus is not here or was changed (said)."""
    if "tune" in run.recipe:
        return None
    try:
        recipe = build(run.recipe, str(run.path / "recipe.toml"))
        source, _ = open_data(recipe.data, recipe.model.block_size, recipe.train, run.path, say)
    except (UserError, OSError) as error:
        say(f"the corpus cannot be counted: {error}")
        return None
    if run.state.get("data", source.digest) != source.digest:
        say(f"the corpus cannot be counted: {recipe.data.source} is not what the run trained on any more")
        return None
    train, val = source.text("train", ngrams.TRAIN), source.text("val", ngrams.VAL)
    n_vocab = max(recipe.model.vocab_size, source.vocab_size)
    counts = np.bincount(train, minlength=source.vocab_size)
    found = Corpus(
        losses=ngrams.cross_entropies(train, val, n_vocab),
        train_tokens=source.n_train_tokens,
        counted=len(train),
        rare=float((counts < _RARE).mean()),
    )
    if is_shards(source.folder):
        shown = inspect_shards(source.folder)
        found.documents, found.duplicates = shown["documents"], shown["duplicates"]
    return found


def read_corpus(run: Run) -> Corpus | None:
    """What an earlier ``diagnose`` counted and left in the run's folder; None if none did, or it cannot be read."""
    try:
        return Corpus(**read_json(run.path / FILE)["corpus"])
    except (UserError, KeyError, TypeError):
        return None


def diagnose(run: Run, corpus: Corpus | None = None) -> list[Finding]:
    """All findings, the worst first; without a ``corpus``, what the run's folder alone tells.

    Raises:
        UserError: the run has no step yet.
    """
    if not len(run.train["step"]):
        raise UserError(f"{run.path}: no step in metrics.jsonl yet: expected a run that has trained")
    parts = (_ladder, _gap, _high, _low, _amount, _vocabulary, _trained, _copies, _law)
    if run.aligned:
        parts = (_gap, _high, _trained)  # the others know what a loss of tokens can be
    if run.recipe.get("rl"):
        parts = (_trained,)  # nothing is validated, and the loss says nothing
    found = [finding for part in parts for finding in part(run, corpus)]
    return sorted(found, key=lambda finding: ("bad", "note", "good").index(finding.level))


def training_loss(run: Run, until: float = math.inf) -> float:
    """Mean of the training loss over the last tenth of the steps ``until`` one, at least ten of them."""
    losses = _losses(run)[run.train["step"] <= until]
    tail = losses[-max(10, int(len(losses) * _TAIL)) :]
    return float(np.nanmean(tail)) if np.isfinite(tail).any() else math.nan


def _losses(run: Run) -> np.ndarray:
    """Training losses by step; of a run whose losses are all not finite there is no column."""
    return run.train.get("loss", np.full(len(run.train["step"]), np.nan))


def _validation(run: Run) -> float:
    losses = run.val.get("loss", np.array([]))
    return float(losses[-1]) if len(losses) else math.nan


def _last(run: Run) -> tuple[float, str]:
    """The loss that counts and its name."""
    loss = _validation(run)
    return (loss, "validation loss") if math.isfinite(loss) else (training_loss(run), "training loss")


def _held_out(run: Run) -> dict[str, Any]:
    data = run.segments[-1].get("data") if run.segments else None
    return data.get("held_out", {}) if isinstance(data, dict) else {}


def _ladder(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """The loss between ln V, which knows nothing, and the corpus's own n-gram models."""
    loss, name = _last(run)
    n_vocab = int(run.recipe.get("model", {}).get("vocab_size", 0))
    if not math.isfinite(loss):
        yield Finding("bad", "loss", f"{name} is not finite", "a lower optim.lr, optim.clip = 1, a longer optim.warmup")
        return
    labels = len(run.recipe.get("model", {}).get("labels", ()))
    if not (labels or n_vocab):
        return
    chance = math.log(2 if labels == 1 else labels or n_vocab)
    if loss > 0.98 * chance:
        change = "a higher optim.lr or more steps; if the curve is flat from the start, look at mlxgpt data inspect"
        of = f"ln {labels} for {labels} labels" if labels else "ln V"
        of = "ln 2 for pairs" if labels == 1 else of
        yield Finding("bad", "loss", f"{name} {loss:.3f}: chance, {of}, is {chance:.3f}: nothing was learned", change)
        return
    if "tune" in run.recipe:
        return
    losses = corpus.losses if corpus else [_held_out(run)["unigram"]["val"]["other"]] if _held_out(run) else []
    steps = f"ln V {chance:.3f}" + "".join(f", {k}-gram {nats:.3f}" for k, nats in enumerate(losses, 1))
    if not losses:
        yield Finding("note", "loss", f"{name} {loss:.3f}; {steps}", "")
    elif loss > losses[0]:
        change = "more steps or a higher optim.lr: how often each token occurs is learned first"
        yield Finding("bad", "loss", f"{name} {loss:.3f}, above counting single tokens; {steps}", change)
    elif len(losses) > 1 and loss > min(losses):
        best = 1 + int(np.argmin(losses))
        change = "more steps, a higher optim.lr or a larger model: counting does better in a second"
        yield Finding("bad", "loss", f"{name} {loss:.3f}, above a {best}-gram model of the corpus; {steps}", change)
    else:
        below = "below every n-gram model of the corpus" if len(losses) > 1 else "below counting single tokens"
        yield Finding("good", "loss", f"{name} {loss:.3f}, {below}; {steps}", "")


def _gap(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """Training against validation: memorizing, or two different texts."""
    evaluated = run.val.get("step", np.array([]))
    at = float(evaluated[-1]) if len(evaluated) else math.inf  # a run that goes on has trained since
    train, val = training_loss(run, at), _validation(run)
    if not (math.isfinite(train) and math.isfinite(val)):
        if not len(evaluated):
            yield Finding("note", "validation", "none in this run", "train.eval_every, to see memorizing")
        return
    best = run.best
    assert best
    past = best[0] < run.step and val - best[1] > max(0.01, 0.01 * best[1])
    unigram = _held_out(run).get("unigram", {}).get("val")
    apart = unigram["other"] - unigram["own"] if unigram else 0.0
    said = f"training loss {train:.3f}, validation {val:.3f}: gap {val - train:+.3f}"
    if past:
        change = "stop there (train.early_stop), more text, train.dropout = 0.1 to 0.2, or a smaller model"
        said += f"; validation was best at step {best[0]:,} ({best[1]:.3f})"
        yield Finding("bad", "memorizing", said, change)
    elif apart > 0.2 and val - train > 0.2:
        change = "a mixed corpus, or another data.val_fraction: the two texts differ, not what was learned of them"
        said += f"; counts of the training text alone cost {apart:.2f} nats a token more there than its own"
        yield Finding("bad", "validation text", said, change)
    elif val - train > 0.15 * train:
        yield Finding("note", "gap", said, "more text, train.dropout, or a smaller model")
    else:
        yield Finding("good", "gap", said, "")


def _high(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """Signs of a learning rate that is too high."""
    losses, norms = _losses(run), run.train.get("grad_norm", np.array([]))
    lr, clip = (float(run.recipe.get("optim", {}).get(key, 0)) for key in ("lr", "clip"))
    warmup = int(run.recipe.get("optim", {}).get("warmup", 0))
    lower = f"optim.lr = {lr / 3:.1g} (now {lr:.1g}), or a longer optim.warmup"
    if run.skipped:
        yield Finding("bad", "learning rate", f"updates that were not finite and were skipped: {run.skipped}", lower)
    spiked = spikes(losses)
    if spiked:
        where = ", ".join(f"{int(run.train['step'][at]):,}" for at in spiked[:3])
        level = "bad" if len(spiked) > 2 else "note"
        count = f"{len(spiked)} spike{'s' * (len(spiked) > 1)} of the loss (steps {where})"
        yield Finding(level, "learning rate", count, lower + ", or a lower optim.beta2 (0.95)")
    after = norms[warmup:]
    if clip and len(after) >= 20:
        share = float((after > clip).mean())
        if share > 0.5:
            change = f"optim.clip = {float(np.nanmedian(after)) * 1.5:.2g}, or {lower}"
            yield Finding(
                "note", "clipping", f"{share:.0%} of the updates after warmup were clipped to {clip:g}", change
            )
    finite = losses[np.isfinite(losses)]
    if len(finite) >= 20:
        lowest = float(np.min(np.convolve(finite, np.ones(10) / 10, "valid")))
        if training_loss(run) > lowest + max(0.1, 0.05 * lowest):
            text = f"training loss rose again: {training_loss(run):.3f} after {lowest:.3f}"
            yield Finding("bad", "learning rate", text, lower)


def spikes(losses: np.ndarray) -> list[int]:
    """Where the loss leaps above the 20 before it: by more than 8 of their median absolute deviations, and by 10 %."""
    width = 20
    if len(losses) <= width:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(losses, width)[:-1]
    known = np.isfinite(windows).any(axis=1)
    middle = np.nanmedian(windows[known], axis=1)
    spread = np.nanmedian(np.abs(windows[known] - middle[:, None]), axis=1)
    leaps = losses[width:][known] > middle + np.maximum(8 * spread, 0.1 * np.abs(middle))
    found: list[int] = []
    for at in (np.flatnonzero(known)[leaps] + width).tolist():
        if not found or at - found[-1] > width:
            found.append(at)
    return found


def _low(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """Signs of a rate that is too low, or of a run that is too short."""
    losses = _losses(run)
    lr = float(run.recipe.get("optim", {}).get("lr", 0))
    part = max(10, len(losses) // 10)
    if len(losses) < 4 * part or not np.isfinite(losses[-2 * part :]).all():
        return
    fall = float(losses[-2 * part : -part].mean() - losses[-part:].mean())
    spread = float(losses[-2 * part :].std()) / math.sqrt(part)
    if fall > max(0.01 * training_loss(run), 3 * spread):
        text = f"training loss still fell by {fall:.3f} in the last tenth of the steps"
        yield Finding("note", "steps", text, f"more steps, or optim.lr = {3 * lr:.1g} (now {lr:.1g})")


def _amount(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """Text for the parameters, and how often it was seen."""
    data = run.segments[-1].get("data") if run.segments else None
    whole = int(data.get("train_tokens", 0)) if isinstance(data, dict) else 0
    seen = int(run.train["tokens"][-1]) if len(run.train.get("tokens", ())) else 0
    if "tune" in run.recipe or not whole or not run.parameters:
        return
    passes, each = seen / whole, whole / run.parameters
    text = f"{short(whole)} tokens for {short(run.parameters)} parameters ({each:.2g} each), seen {passes:.2g} times"
    if passes > 4:
        change = (
            "more text or fewer steps: after 4 passes a repeated token is worth much less (Muennighoff et al. 2023)"
        )
        yield Finding("bad" if passes > 16 else "note", "amount of text", text, change)
    elif passes < 1:
        steps = math.ceil(run.step / passes) if passes else 0
        yield Finding("note", "amount of text", text, f"more steps: one pass over the text takes {steps:,}")
    elif each < 1:
        change = "more text, or a smaller model: about 20 tokens a parameter are compute-optimal (Hoffmann et al. 2022)"
        yield Finding("note", "amount of text", text, change)
    else:
        yield Finding("good", "amount of text", text, "")


def _vocabulary(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """A vocabulary that the corpus cannot teach."""
    if "tune" in run.recipe or not run.parameters:
        return
    recipe = build(run.recipe, str(run.path))
    size, n_embd = recipe.model.vocab_size, recipe.model.n_embd
    share = size * n_embd * (1 if recipe.model.tied else 2) / params.count(recipe.model)
    change = "a smaller data.vocab_size, or more text"
    if corpus and corpus.counted == corpus.train_tokens and corpus.rare > 0.3:
        text = f"{corpus.rare:.0%} of {size:,} tokens occur fewer than {_RARE} times in the training text"
        yield Finding("bad" if corpus.rare > 0.6 else "note", "vocabulary", text, change)
    elif share > 0.6:
        yield Finding("note", "vocabulary", f"{share:.0%} of the parameters are embeddings of {size:,} tokens", change)


def _trained(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """Fine-tuning: how much of the rows is trained."""
    data = run.segments[-1].get("data") if run.segments else None
    if not isinstance(data, dict) or "trained_share" not in data:
        return
    share, rows = float(data["trained_share"]), data.get("splits", {}).get("train", {})
    passes = run.step / data["steps_per_epoch"] if data.get("steps_per_epoch") else 0.0
    seen = f"{rows.get('rows', 0):,} rows, seen {passes:.2g} times"
    classes = bool(run.recipe.get("model", {}).get("labels"))  # one target a row: its share says nothing
    about, what = ("rows", "labels") if classes else ("trained tokens", "answers")
    text = seen if classes else f"{share:.0%} of the tokens are answers, {seen}"
    lost = int(rows.get("dropped", 0)) + int(rows.get("unanswerable", 0))
    if lost > 0.05 * max(1, rows.get("rows", 0) + lost):
        yield Finding("bad", "rows", f"{lost:,} rows were dropped as too long", "a larger tune.block_size")
    if share < 0.1 and not classes:
        change = "look at mlxgpt data inspect --model: prompts are long, or tune.template hides the answers"
        yield Finding("note", about, text, change)
    elif passes > 5:
        yield Finding("note", about, text, f"fewer steps: more than 3 to 5 passes mostly memorize the {what}")
    else:
        yield Finding("good", about, text, "")
    near = data.get("near_duplicates") or []
    if near:
        text = f"{len(near)} validation rows nearly repeat a training row"
        yield Finding("note", "duplicates", text, "take them out: the validation loss is better than it should be")


def _copies(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """Documents that occur more than once."""
    if corpus and corpus.duplicates and corpus.documents:
        share = corpus.duplicates / corpus.documents
        text = f"{corpus.duplicates:,} of {corpus.documents:,} documents are exact copies of others ({share:.0%})"
        yield Finding("bad" if share > 0.2 else "note", "duplicates", text, "take them out of the corpus")


def _law(run: Run, corpus: Corpus | None) -> Iterator[Finding]:
    """What a scaling law expects, where it was fitted: from 44 M parameters on."""
    seen = float(run.train["tokens"][-1]) if len(run.train.get("tokens", ())) else 0.0
    if "tune" in run.recipe or run.parameters < _LAW or not seen:
        return
    low, high = sorted(law.loss(run.parameters, seen) for law in (HOFFMANN, BESIROGLU))
    loss, name = _last(run)
    text = (
        f"{name} {loss:.3f}; {low:.2f} to {high:.2f} is the law for {short(run.parameters)} parameters and "
        f"{short(seen)} tokens of web text with a vocabulary of 32,000"
    )
    yield Finding("note", "scaling law", text, "")
