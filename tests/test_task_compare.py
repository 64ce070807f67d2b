"""Two models on the same questions: differences, their intervals, McNemar's test, and what is no comparison."""

import json
from pathlib import Path

import numpy as np
import pytest
from models import tiny, weights

from mlxgpt import cli
from mlxgpt.common import rng
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.tasks import compare, metrics
from mlxgpt.common.tasks.task import Question
from mlxgpt.common.tokenizers.load import train_tokenizer

FIRST = (rng.integers(1, "first", count=200, high=100) < 52).astype(float)
_OTHER = (rng.integers(1, "second", count=200, high=100) < 30).astype(float)
SECOND = np.where(rng.integers(1, "changed", count=200, high=100) < 30, _OTHER, FIRST)
NATS = rng.normal(1, "nats", shape=(80,), std=1.0).astype(float)
MORE = NATS + 0.1 + rng.normal(1, "apart", shape=(80,), std=0.3).astype(float)


@pytest.mark.parametrize(
    ("counts", "p"),  # scipy 1.16's binomtest and statsmodels 0.14's mcnemar(exact=True)
    [
        ((0, 0), 1.0),
        ((1, 0), 1.0),
        ((5, 1), 0.21875),
        ((12, 5), 0.143463134765625),
        ((5, 12), 0.143463134765625),
        ((30, 12), 0.007915897334896727),
        ((7, 7), 1.0),
        ((400, 520), 8.549170923883781e-05),
    ],
)
def test_mcnemar_is_that_of_scipy_and_statsmodels(counts: tuple[int, int], p: float) -> None:
    assert compare.mcnemar(*counts) == pytest.approx(p, rel=1e-12)


def test_a_difference_of_shares_has_counts_and_an_interval() -> None:
    found = compare.compare({"acc": FIRST}, {"acc": SECOND})["acc"]
    assert (found.first, found.second, found.only_first, found.only_second) == (0.47, 0.405, 24, 11)
    assert found.difference == pytest.approx(0.065) and found.p == pytest.approx(0.040959591511636986)
    # scipy's percentile bootstrap of the paired differences, 200,000 resamples
    assert (found.low, found.high) == pytest.approx((0.01, 0.125), abs=0.0051)
    other = compare.compare({"acc": SECOND}, {"acc": FIRST})["acc"]
    assert (other.difference, other.low, other.high) == pytest.approx((-found.difference, -found.high, -found.low))


def test_a_difference_of_perplexities_resamples_questions() -> None:
    found = compare.compare({"logprob": NATS}, {"logprob": MORE})["perplexity"]
    assert found.difference == pytest.approx(0.133627159159584) and found.p is found.only_first is None
    assert (found.low, found.high) == pytest.approx((0.0743, 0.1984), abs=0.003)  # scipy's, as above
    sizes = np.arange(80) % 7 + 1.0
    one, two = ({"logprob": values, "words": sizes, "bytes": sizes} for values in (NATS, MORE))
    bits = compare.compare(one, two)["bits_per_byte"]
    assert (bits.low, bits.high) == pytest.approx((0.0311, 0.0805), abs=0.002)
    for name, each in compare.compare(one, two).items():
        assert each.first == pytest.approx(metrics.of(one)[name].value)
        assert each.second == pytest.approx(metrics.of(two)[name].value)


def test_an_interval_is_the_same_again_and_covers_what_it_should() -> None:
    again = [compare.compare({"x": NATS}, {"x": MORE}, seed=seed, resamples=500)["x"] for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    inside = 0
    for number in range(200):  # the true difference is 0.1
        draw = rng.normal(2, "draw", number, shape=(60,), std=1.0).astype(float)
        found = compare.compare({"x": draw + 0.1}, {"x": np.zeros(60)}, resamples=300)["x"]
        inside += found.low <= 0.1 <= found.high
    assert 0.88 <= inside / 200 <= 0.98


def test_a_digest_is_of_what_is_asked() -> None:
    question = Question("a.jsonl row 1", "text", ("one", "two"), gold=(0,))
    same = Question("b.jsonl row 9", "text", ("one", "two"), gold=(0,), key="other")
    assert compare.digest(question) == compare.digest(same) != compare.digest(same, "an example\n\n")
    for other in (Question("", "text", ("one", "two"), gold=(1,)), Question("", "text", ("onet", "wo"), gold=(0,))):
        assert compare.digest(question) != compare.digest(other)


# ---- mlxgpt eval --against


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two models and a task of four questions."""
    place = tmp_path_factory.mktemp("compare")
    tokenizer = train_tokenizer("char", ["abcdefgh .\n"], 0)
    for name, scale in (("one", 6.0), ("two", 9.0)):
        config = tiny(family="llama", vocab_size=tokenizer.n_vocab)
        (place / name).mkdir()
        write_model(place / name, config, weights(config, scale=scale), tokenizer=tokenizer)
    rows = [{"text": text, "choices": [" ab", " cd", " eh"], "answer": 0} for text in ("a", "bb", "c h", "dada")]
    (place / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "one", place / "two", place / "quiz.jsonl"


def test_a_model_a_log_and_the_same_model(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, quiz = map(str, folders)
    log = str(tmp_path / "two.jsonl")
    assert cli.main(["eval", "-m", two, "--task", quiz, "--log", log, "--device", "cpu"]) == 0
    capsys.readouterr()
    made = []
    for against in (two, log, one):
        assert cli.main(["eval", "-m", one, "--task", quiz, "--against", against, "--json", "--device", "cpu"]) == 0
        made.append(json.loads(capsys.readouterr().out)["tasks"]["quiz"])
    assert made[0]["against"] == made[1]["against"]
    assert made[0]["against"]["acc"]["first"] == made[0]["metrics"]["acc"]["value"]
    for each in made[2]["against"].values():
        assert (each["difference"], each["low"], each["high"], each["only_first"], each["p"]) == (0, 0, 0, 0, 1)
    assert cli.main(["eval", "-m", one, "--task", quiz, "--against", log, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"quiz: {one} less {log}, 4 questions" in said and "right alone:" in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[:3], "from number 4 on (3 questions"),
        (lambda rows: rows[::-1], "from number 1 on"),
        (lambda rows: [{**row, "task": "other"} for row in rows], "nothing of the task quiz"),
        (lambda rows: [{"task": "quiz"} for row in rows], "rows without sha256"),
    ],
)
def test_other_questions_are_refused_before_a_model_is_loaded(
    change, expected: str, folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _, quiz = folders
    log, changed = tmp_path / "log.jsonl", tmp_path / "changed.jsonl"
    assert cli.main(["eval", "-m", str(one), "--task", str(quiz), "--log", str(log), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    changed.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    capsys.readouterr()
    assert cli.main(["eval", "-m", "nowhere", "--task", str(quiz), "--against", str(changed)]) == 2
    said = capsys.readouterr()
    assert expected in said.err and said.err.count("\n") == 1 and not said.out


def test_flags_that_do_nothing_are_refused(
    folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, _, quiz = folders
    for flags, expected in (
        (["--data", str(quiz), "--against", str(one)], "--against: does nothing with"),
        (["--task", str(quiz), "--run-code"], "--run-code: no task here has programs to run"),
        (["--task", str(quiz), "--max-tokens", "3"], "--max-tokens 3: no task here has answers to write"),
        (["--task", str(quiz), "--draws", "3"], "--draws: no task here has programs to run"),
    ):
        assert cli.main(["eval", "-m", str(one), *flags]) == 2
        assert expected in capsys.readouterr().err


def test_a_log_that_could_not_be_written_or_read_is_refused_before_a_model_is_loaded(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.jsonl").touch()
    (tmp_path / "one.log").touch()
    for flag, name, expected in (
        ("--log", "none/a.jsonl", "no such folder"),
        ("--log", "a.log", "expected a .jsonl"),
        ("--log", "there.jsonl", "exists already"),
        ("--against", "one.log", "expected a model, or a .jsonl that --log wrote"),
    ):
        assert cli.main(["eval", "-m", "nowhere", "--task", str(folders[2]), flag, str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        assert expected in said.err and said.err.count("\n") == 1 and not said.out
