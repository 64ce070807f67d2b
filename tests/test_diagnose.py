"""mlxgpt diagnose: n-gram models against counting by hand, and each finding on a run made to have it, and only it."""

import dataclasses
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxgpt import cli
from mlxgpt.commands.look import report
from mlxgpt.common.evaluate import diagnose, ngrams
from mlxgpt.common.plan.budget import BESIROGLU, HOFFMANN
from mlxgpt.common.recipes import build, to_toml
from mlxgpt.common.runs.summary import read_run

STEPS = 200


def by_hand(train: list[int], context: list[int], word: int, n_vocab: int) -> float:
    """Witten-Bell as its formula reads."""
    if context and context[0] < 0:
        return by_hand(train, context[1:], word, n_vocab)
    size = len(context)
    after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for at in range(size, len(train)):
        after[tuple(train[at - size : at])][train[at]] += 1
    lower = by_hand(train, context[1:], word, n_vocab) if context else 1 / n_vocab
    seen = after[tuple(context)]
    if not seen:
        return lower
    return (seen[word] + len(seen) * lower) / (seen.total() + len(seen))


def test_ngrams_are_witten_bells_and_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 5, 60) ** 2 // 4, rng.integers(0, 6, 12)
    found = ngrams.probabilities(train, val, 6, 4)
    for order, at in itertools.product(range(1, 5), range(len(val))):
        context = val[max(0, at - order + 1) : at].tolist()
        expected = by_hand(train.tolist(), context, int(val[at]), 6)
        assert math.isclose(found[order - 1][at], expected, rel_tol=1e-12), (order, at)
    for context in ([0, 1, 0], [5, 5, 5], val[:3].tolist()):
        whole = [ngrams.probabilities(train, np.array([*context, word]), 6, 4)[3][3] for word in range(6)]
        assert math.isclose(sum(whole), 1, rel_tol=1e-12)
    assert ngrams.cross_entropies(train, val, 6, 4)[1] == -np.log(found[1][3:]).mean()


def learned(step: int) -> float:
    return 2.0 + 2.0 * math.exp(-step / 20)


def make(
    place: Path,
    loss: Callable[[int], float | None] = learned,
    val: Callable[[int], float] = learned,
    norm: Callable[[int], float] = lambda step: 0.5,
    tokens: int = 1000,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> Path:
    """A run of STEPS steps whose curves are ``loss`` and ``val``; by default one without a fault."""
    place.mkdir(parents=True)
    (place / "checkpoints").mkdir()
    settings = {"vocab_size": 100, "n_embd": 64, "n_layer": 4, "n_head": 4} | (model or {})
    (place / "recipe.toml").write_text(to_toml(build({"model": settings, "train": {"steps": STEPS}}, "test")))
    with open(place / "metrics.jsonl", "w") as file:
        for step in range(1, STEPS + 1):
            now = loss(step)
            line = {"step": step, "split": "train", "loss": now, "lr": 1e-3, "grad_norm": norm(step)}
            line |= {"tokens": tokens * step, "seconds": 0.1} | ({"skipped": True} if now is None else {})
            file.write(json.dumps(line) + "\n")
            if step % 20 == 0:
                file.write(json.dumps({"step": step, "split": "val", "loss": val(step)}) + "\n")
    held_out = {"share": 0.1, "documents": 5, "cut": 0, "longest": {"document": "a", "tokens": 9, "share": 0.2}}
    held_out["unigram"] = {"train": {"own": 3.5, "other": 3.6}, "val": {"own": 3.5, "other": 3.6}}
    whole = {"train_tokens": 1_000_000, "val_tokens": 10_000, "val_bytes": 0, "held_out": held_out} | (data or {})
    (place / "environment.json").write_text(json.dumps([{"from_step": 0, "framework": "mlx", "data": whole}]))
    return place


def many(given: dict[str, Any]) -> dict[str, Any]:
    """With tokens enough for two passes."""
    return {"tokens": 10_000, **given}


CORPUS = diagnose.Corpus(losses=[3.6, 3.0, 2.5, 2.3, 2.2], train_tokens=1_000_000, counted=1_000_000, rare=0.1)
WORSE = diagnose.Corpus([3.6, 3.0, 2.5, 1.9, 1.8], 1_000_000, 1_000_000, 0.1)
RARE = diagnose.Corpus([3.6, 3.0, 2.5, 2.3, 2.2], 1_000_000, 1_000_000, 0.7)
COPIES = diagnose.Corpus([3.6, 3.0, 2.5, 2.3, 2.2], 1_000_000, 1_000_000, 0.1, documents=10, duplicates=5)
APART = {"unigram": {"train": {"own": 3.5, "other": 4.2}, "val": {"own": 3.5, "other": 4.2}}, "longest": {}}

FAULTS: dict[str, tuple[dict[str, Any], diagnose.Corpus, str, str]] = {
    "chance": ({"loss": lambda s: 4.6, "val": lambda s: 4.6}, CORPUS, "loss", "nothing was learned"),
    "below chance": ({"loss": lambda s: 4.0, "val": lambda s: 4.0}, CORPUS, "loss", "above counting single tokens"),
    "n-grams": ({}, WORSE, "loss", "above a 5-gram model"),
    "not finite": ({"loss": lambda s: None, "val": lambda s: math.nan}, CORPUS, "loss", "not finite"),
    "memorizing": (
        {"loss": lambda s: 1.8 + 2.0 * math.exp(-s / 20), "val": lambda s: 2.0 + abs(s - 100) / 300},
        CORPUS, "memorizing", "best at step 100",
    ),
    "two texts": (
        {"val": lambda s: learned(s) + 0.3, "data": {"held_out": APART}}, CORPUS, "validation text", "0.70 nats",
    ),
    "spikes": (
        {"loss": lambda s: learned(s) + 1.5 * (s in (60, 100, 140))}, CORPUS, "learning rate", "3 spikes of the loss",
    ),
    "rises again": ({"loss": lambda s: 2.0 + abs(s - 100) / 100}, CORPUS, "learning rate", "rose again"),
    "skipped": ({"loss": lambda s: None if s == 7 else learned(s)}, CORPUS, "learning rate", "were skipped: 1"),
    "few tokens": ({"tokens": 100_000}, CORPUS, "amount of text", "seen 20 times"),
    "rare": ({}, RARE, "vocabulary", "70% of 100 tokens occur fewer than 10"),
    "copies": ({}, COPIES, "duplicates", "5 of 10 documents"),
}  # fmt: skip
NOTES: dict[str, tuple[dict[str, Any], str, str]] = {
    "clipped": ({"norm": lambda s: 3.0}, "clipping", "100% of the updates"),
    "short": ({"loss": lambda s: 4 - 0.01 * s, "val": lambda s: 2.1}, "steps", "still fell by 0.2"),
    "not one pass": ({"tokens": 100}, "amount of text", "seen 0.02 times"),
    "little text": ({"tokens": 1000, "data": {"train_tokens": 100_000}}, "amount of text", "0.45 each"),
    "embeddings": ({"model": {"vocab_size": 10_000, "n_layer": 1}}, "vocabulary", "embeddings of 10,000"),
    "gap": ({"val": lambda s: learned(s) + 0.5}, "gap", "gap +0.500"),
}


def test_a_run_without_a_fault_has_no_finding_but_good_ones(tmp_path: Path) -> None:
    found = diagnose.diagnose(read_run(make(tmp_path / "run", tokens=10_000)), CORPUS)
    assert [finding.level for finding in found] == ["good"] * 3, found
    assert "below every n-gram model" in found[0].found


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_with_its_number(fault: str, tmp_path: Path) -> None:
    given, corpus, about, text = FAULTS[fault]
    run = read_run(make(tmp_path / "run", **many(given)))
    bad = [f for f in diagnose.diagnose(run, corpus) if f.level in ("bad", "note") and f.about == about]
    assert any(text in finding.found and finding.change for finding in bad), diagnose.diagnose(run, corpus)


@pytest.mark.parametrize("note", NOTES)
def test_each_note_is_made_with_its_number(note: str, tmp_path: Path) -> None:
    given, about, text = NOTES[note]
    found = diagnose.diagnose(read_run(make(tmp_path / "run", **many(given))), CORPUS)
    assert any(f.level == "note" and f.about == about and text in f.found and f.change for f in found), found


def test_the_gap_is_that_of_one_step(tmp_path: Path) -> None:
    """A run that was stopped after its last validation has trained since."""
    run = read_run(make(tmp_path / "run", loss=lambda s: 4.0 - 0.5 * (s > 100), val=lambda s: 4.0))
    cut = {name: column[run.val["step"] <= 100] for name, column in run.val.items()}
    found = diagnose.diagnose(dataclasses.replace(run, val=cut))
    assert [each.found for each in found if each.about == "gap"] == [
        "training loss 4.000, validation 4.000: gap +0.000"
    ]


def test_a_scaling_law_is_named_from_where_it_was_fitted(tmp_path: Path) -> None:
    small = read_run(make(tmp_path / "small"))
    large = read_run(make(tmp_path / "large", model={"n_embd": 768, "n_layer": 7, "n_head": 12, "vocab_size": 1000}))
    assert not any(f.about == "scaling law" for f in diagnose.diagnose(small, CORPUS))
    assert any(f.about == "scaling law" for f in diagnose.diagnose(large, CORPUS))
    # Chinchilla's own point, 70 G parameters and 1.4 T tokens: both fits within a few hundredths of each other.
    assert math.isclose(HOFFMANN.loss(70e9, 1.4e12), 1.93, abs_tol=0.01)
    assert abs(HOFFMANN.loss(70e9, 1.4e12) - BESIROGLU.loss(70e9, 1.4e12)) < 0.05


def test_the_command_counts_the_corpus_and_the_report_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    text = "the quick brown fox jumps over the lazy dog\n" * 60
    (tmp_path / "a.txt").write_text(text)
    run = make(tmp_path / "run")
    recipe: dict[str, dict[str, Any]] = {"model": {"vocab_size": 100, "block_size": 16}, "train": {"steps": STEPS}}
    recipe["data"] = {"source": str(tmp_path / "a.txt"), "tokenizer": "char"}
    (run / "recipe.toml").write_text(to_toml(build(recipe, "test")))
    assert "mlxgpt diagnose RUN also counts" in report.render([read_run(run)])
    assert cli.main(["diagnose", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    losses = found["corpus"]["losses"]
    assert len(losses) == 5 and losses[0] > 2.5 and losses[4] < 0.2
    assert any("5-gram model" in finding["found"] for finding in found["findings"])
    page = report.render([read_run(run)])
    assert "5-gram" in page and "Why is the loss what it is?" in page and "also counts" not in page
    assert cli.main(["diagnose", str(run), "--quick"]) == 0
    assert "2-gram" not in capsys.readouterr().out
    (tmp_path / "a.txt").unlink()
    assert cli.main(["diagnose", str(run)]) == 0
    assert "cannot be counted" in capsys.readouterr().err


def test_a_fine_tuning_is_judged_by_its_rows(tmp_path: Path) -> None:
    data = {"trained_share": 0.05, "steps_per_epoch": 20, "near_duplicates": [1, 2]}
    data["splits"] = {"train": {"rows": 100, "dropped": 10, "unanswerable": 0}}
    run = make(tmp_path / "run", data=data)
    text = (run / "recipe.toml").read_text() + '\n[tune]\nmodel = "m"\n'
    (run / "recipe.toml").write_text(text)
    found = {f.about: f for f in diagnose.diagnose(read_run(run))}
    assert "5% of the tokens are answers" in found["trained tokens"].found
    assert found["rows"].level == "bad" and "10 rows were dropped" in found["rows"].found
    assert "2 validation rows" in found["duplicates"].found
    assert "loss" not in found and "vocabulary" not in found


@pytest.mark.parametrize(("loss", "level"), [(0.69, "bad"), (0.3, "good")])
def test_a_classifier_is_judged_by_its_labels(tmp_path: Path, loss: float, level: str) -> None:
    """Not by ln V, nor by the share of the tokens that train, which is one in a row."""
    data = {"trained_share": 0.02, "steps_per_epoch": 200, "splits": {"train": {"rows": 100}}}
    run = make(tmp_path / "run", loss=lambda s: loss, val=lambda s: loss, data=data, model={"labels": ["a", "b"]})
    (run / "recipe.toml").write_text((run / "recipe.toml").read_text() + '\n[tune]\nmodel = "m"\ntask = "classify"\n')
    found = diagnose.diagnose(read_run(run))
    assert found[0].level == level and {"rows", "gap"} <= {each.about for each in found}
    assert not [each for each in found if "answers" in each.found]
    assert ("chance, ln 2 for 2 labels, is 0.693" in found[0].found) == (level == "bad")


def test_a_run_without_steps_and_a_folder_that_is_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    assert cli.main(["diagnose", str(run), "--quick"]) == 2
    assert "no step in metrics.jsonl yet" in capsys.readouterr().err
    assert cli.main(["diagnose", str(tmp_path)]) == 2
    assert "not a run" in capsys.readouterr().err
