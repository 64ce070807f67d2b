"""Questions to a model: examples before them, metrics with their errors, groups, ties, and the verb."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import tiny, weights
from task_rows import write_jsonl, write_published
from task_scorer import Said, from_text

from mlxgpt import cli
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders.model_folder import write_model
from mlxgpt.common.tasks import metrics, requests, shots, show
from mlxgpt.common.tasks.task import Asked, Metric, Question, Task
from mlxgpt.common.tokenizers.load import train_tokenizer


def cloze(count: int, **settings) -> Task:
    questions = [Question(f"row {n}", f"t{n}", target=f" a{n}") for n in range(count)]
    return Task("t", "cloze", questions, **{"before_target": "", "between": "|", **settings})


def drawn(task: Task, count: int | None = None) -> list[list[int]]:
    """The numbers of the examples before each of the first questions."""
    made = shots.before(task, task.questions[:count])
    return [[int(part.split()[0][1:]) for part in each.split("|") if part] for each in made]


# ---- examples


def test_examples_are_drawn_as_lm_evaluation_harness_draws() -> None:
    generator = random.Random(1234)
    others = [[n for n in generator.sample(range(10), 4) if n != question][:3] for question in range(10)]
    assert drawn(cloze(10, shots=3)) == others
    assert drawn(cloze(10, shots=3), 2) == others[:2]
    generator = random.Random(1234)
    any_of_them = [generator.sample(range(10), 3) for _ in range(10)]
    assert drawn(cloze(10, shots=3, leave_out=False)) == any_of_them
    assert any(question in found for question, found in enumerate(any_of_them))  # and so itself, at times


def test_the_first_examples_are_the_first_but_for_the_question() -> None:
    assert drawn(cloze(5, shots=2, first=True)) == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]
    assert drawn(cloze(5, shots=2, first=True, leave_out=False)) == [[0, 1]] * 5


def test_a_question_that_is_there_twice_is_no_example_of_itself() -> None:
    task = cloze(4, shots=2)
    twice = replace(task, questions=[*task.questions, replace(task.questions[0], where="row 4")])
    for found in (drawn(twice)[0], drawn(twice)[4]):
        assert len(found) == 2 and 0 not in found
    apart = [
        replace(question, key=str(n)) for n, question in enumerate(twice.questions)
    ]  # they differ in another column
    assert any(0 in drawn(replace(twice, questions=apart, shots=shots))[4] for shots in (1, 2, 3))


def test_too_few_examples_are_refused() -> None:
    assert len(drawn(cloze(4, shots=3))) == 4
    for task, message in [
        (cloze(4, shots=4), "t: 4 examples before each question: found 4: expected at least 5"),
        (cloze(4, shots=5, leave_out=False), "found 4: expected at least 5"),
        (replace(cloze(4, shots=2), questions=[*cloze(1).questions] * 4), "found 0 besides the question"),
        (replace(cloze(4, shots=2), kind="answer", examples=[Question("row 9", "q")] * 3), "row 9: no answer"),
    ]:
        with pytest.raises(UserError, match=message):
            shots.before(task, task.questions)


def test_groups_that_stand_apart_draw_for_themselves() -> None:
    task = cloze(6, shots=2, apart=True, description="D: ")
    task = replace(task, questions=[replace(each, group="ab"[n % 2]) for n, each in enumerate(task.questions)])
    made = shots.before(task, task.questions)
    alone = replace(task, questions=[each for each in task.questions if each.group == "b"])
    assert made[1::2] == shots.before(alone, alone.questions) and all(text.startswith("D: ") for text in made)
    with pytest.raises(UserError, match="before each question of a: found 3: expected at least 4"):
        shots.before(replace(task, shots=3), task.questions)
    assert [each.where for each in requests.first(task, 1)] == ["row 0", "row 1"]


# ---- metrics


def test_choices_are_compared_whole_and_by_their_length() -> None:
    told = {" ab": -4.0, " \u00e9\u00e9\u00e9": -4.5, " abcdefgh": -6.5}
    question = Question("row 1", "Q", (" ab", " \u00e9\u00e9\u00e9", " abcdefgh"), gold=(1,))
    for right, expected in ((0, (1, 0, 0, 0)), (1, (0, 0, 1, 0)), (2, (0, 1, 0, 1))):
        task = Task("t", "choice", [replace(question, gold=(right,))], before_target="")
        found = requests.ask(task, Said(told)).metrics
        values = tuple(int(found[name].value) for name in ("acc", "acc_norm", "acc_per_byte", "acc_per_token"))
        assert values == expected
    # by characters the accents are one each, by bytes two
    told = {"aaa": -3.0, "\u00e9\u00e9": -2.5}
    task = Task("t", "choice", [Question("row 1", "Q", tuple(told), gold=(1,))], before_target="")
    found = requests.ask(task, Said(told)).metrics
    assert (found["acc_norm"].value, found["acc_per_byte"].value) == (0, 1)
    several = replace(task, questions=[replace(task.questions[0], gold=(0, 1))])
    assert requests.ask(several, Said(told)).metrics["acc_norm"].value == 1


def test_of_choices_that_are_equally_likely_the_first_counts_and_is_said() -> None:
    task = Task("t", "choice", [Question("row 1", "Q", ("a", "b"), gold=(1,))], before_target="")
    outcome = requests.ask(task, Said({"a": -1.0, "b": -1.0}))
    assert outcome.metrics["acc"].value == 0
    assert outcome.notes == ("1 of 1 questions have several likeliest choices: the first counts",)
    pair = Task("p", "pair", [Question("row 1", choices=("a", "b"))])
    outcome = requests.ask(pair, Said({"a": -1.0, "b": -1.0}))
    assert outcome.metrics["pct_stereotype"].value == 0 and "1 of 1 pairs are equally likely" in outcome.notes[0]


def test_pairs_texts_and_cloze_by_hand() -> None:
    pairs = Task("p", "pair", [Question("row 1", choices=("a", "b")), Question("row 2", choices=("b", "a"))])
    found = requests.ask(pairs, Said({"a": -1.0, "b": -3.5})).metrics
    assert found["pct_stereotype"] == Metric(0.5, 0.5) and found["likelihood_diff"] == Metric(2.5, 0.0)
    texts = ["one two\nthree", "\u00e9t\u00e9"]
    found = requests.ask(Task("t", "text", [Question(text, text) for text in texts]), Said()).metrics
    total = sum(from_text(text).logprob for text in texts)
    assert found["word_perplexity"] == Metric(found["word_perplexity"].value, None)
    assert found["word_perplexity"].value == pytest.approx(math.exp(-total / 4))
    assert found["byte_perplexity"].value == pytest.approx(math.exp(-total / 18))
    assert found["bits_per_byte"].value == pytest.approx(-total / 18 / math.log(2))
    outcome = requests.ask(cloze(2), Said({" a0": -1.0, " a1": -2.0}))
    assert outcome.metrics["acc"] == Metric(1.0, 0.0)
    assert outcome.metrics["perplexity"].value == pytest.approx(math.exp(1.5))
    assert outcome.each["logprob"].tolist() == [-1.0, -2.0]


def test_standard_errors_are_those_of_lm_evaluation_harness() -> None:
    values = np.array([-1.0, -2.5, -0.25, -4.0])
    assert metrics.mean_error(values) == pytest.approx(0.8315084184781294)  # its mean_stderr
    assert metrics.mean_error(values[:1]) is None
    error = metrics.of({"logprob": values})["perplexity"].stderr
    assert error == pytest.approx(7.418221917048942)  # its bootstrap_stderr(perplexity, ..., iters=100000)
    assert metrics.pooled([0.2, 0.1, 0.3], [5, 9, 4]) == pytest.approx(0.09813067629253164)
    assert metrics.pooled([0.2, None], [5, 1]) is None


def test_the_bootstrap_draws_as_random_choices_does() -> None:
    values = np.arange(7.0)
    expected = []
    for seed in range(3):
        generator = random.Random(seed)
        expected += [np.mean(generator.choices(values.tolist(), k=7)) for _ in range(1000)]
    found = metrics.bootstrapped(values, lambda samples: samples.mean(axis=1), 3000)
    assert found == pytest.approx(np.std(expected, ddof=1), rel=1e-12)


def test_groups_are_scored_apart_and_within_their_whole() -> None:
    names = ["x/b", "y", "x/a", "x/b"]
    task = Task("t", "choice", [Question(f"row {n}", group=name) for n, name in enumerate(names)])
    asked = Asked({"acc": np.array([1.0, 0.0, 0.0, 0.0])}, [{}] * 4, ["n"])
    outcome = metrics.summed_up(task, task.questions, asked)
    assert list(outcome.groups) == ["x", "x/b", "x/a", "y"]
    assert {name: found["acc"].value for name, found in outcome.groups.items()} == {
        "x": 1 / 3,
        "x/b": 0.5,
        "x/a": 0,
        "y": 0,
    }
    assert outcome.sizes == {"x": 3, "x/b": 2, "x/a": 1, "y": 1} and outcome.metrics["acc"].value == 0.25
    assert outcome.metrics["acc"].stderr == pytest.approx(0.25)
    # subjects all right and all wrong: no variance within them, as lm-evaluation-harness pools it
    apart = replace(task, apart=True, questions=[Question(f"row {n}", group="ab"[n // 2]) for n in range(4)])
    outcome = metrics.summed_up(apart, apart.questions, Asked({"acc": np.array([1.0, 1.0, 0.0, 0.0])}, [{}] * 4, []))
    assert outcome.metrics["acc"] == Metric(0.5, 0.0)


def test_what_is_not_finite_breaks_the_run_and_names_the_row() -> None:
    with pytest.raises(RunError, match=r"row 1: the model's log-probability is nan"):
        requests.ask(cloze(2), Said({" a0": -1.0, " a1": math.nan}))


def test_an_answer_that_the_context_does_not_hold_is_refused() -> None:
    scorer = Said()
    scorer.context = 3
    assert requests.ask(cloze(10), scorer).questions == 10
    with pytest.raises(UserError, match=r"row 10: an answer of 4 tokens: expected at most 3, the model's context"):
        requests.ask(cloze(11), scorer)


def test_rows_that_are_cut_are_counted() -> None:
    outcome = requests.ask(cloze(12), Said(longest=5))
    assert outcome.cut == 2
    assert "  2 rows longer than the context: their first tokens were left out" in show.lines(outcome)


# ---- the verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("eval")
    write_published(place / "data")
    tokenizer = train_tokenizer("bpe", ["the cat sat on the mat, the end. caf\u00e9 " * 20], 290)
    config = tiny(family="llama", vocab_size=tokenizer.n_vocab, block_size=128)
    write_model(place / "m", config, weights(config, scale=3.0))
    tokenizer.save(place / "m")
    rows = [{"text": f"the cat {n}", "choices": ["sat on", "the mat", "end"], "answer": n % 3} for n in range(5)]
    write_jsonl(place / "mine.jsonl", [{**row, "group": "ab"[n % 2]} for n, row in enumerate(rows)])
    return place


def test_eval_prints_the_scores_of_tasks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["--task", str(folder / "mine.jsonl"), "--task", "piqa", "--data", str(folder / "data"), "--shots", "1"]
    common = ["eval", "-m", str(folder / "m"), "--device", "cpu", *tasks, "--limit", "4"]
    found = {}
    for backend in ("mlx", "torch"):
        log = folder / f"{backend}.jsonl"
        assert cli.main([*common, "--backend", backend, "--json", "--log", str(log)]) == 0
        out, err = capsys.readouterr()
        found[backend] = json.loads(out), [json.loads(line) for line in log.read_text().splitlines()]
        assert err == ""
    (values, rows), (others, other_rows) = found["mlx"], found["torch"]
    assert values == others and list(values) == ["tasks", "limit", "begins_with", "begins_with_text"]
    mine = values["tasks"]["mine"]
    assert list(mine) == ["task", "kind", "questions", "shots", "metrics", "groups", "cut", "notes"]
    assert (mine["questions"], mine["shots"], values["limit"]) == (4, 1, 4)
    assert mine["groups"]["a"]["questions"] == 2 and set(mine["metrics"]["acc"]) == {"value", "stderr"}
    assert [row["task"] for row in rows] == ["mine"] * 4 + ["piqa"] * 4
    assert np.mean([row["acc"] for row in rows[:4]]) == mine["metrics"]["acc"]["value"]
    for row, other in zip(rows, other_rows, strict=True):
        assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-3) and row["picked"] == other["picked"]
    assert cli.main([*common, "--backend", "mlx"]) == 0
    out = capsys.readouterr().out
    acc = mine["metrics"]["acc"]
    assert "mine: 4 questions, 1 example before each\n" in out and "begins with    nothing\n" in out
    assert f"  acc            {acc['value']:.4f} +- {acc['stderr']:.4f}\n" in out
    assert "  group  questions  acc " in out and "piqa: 4 questions, 1 example before each\n" in out


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "expected --data PATH, --task FILE.jsonl, FILE.yaml or NAME, or --prompts"),
        (["--task", "mine.jsonl", "--stride", "8"], "--stride: does nothing with --task"),
        (["--task", "mine.jsonl", "--set", "a=b"], "--set: does nothing with --task"),
        (["--task", "mine.jsonl", "--text-key", "b"], "--text-key: does nothing with --task"),
        (["--data", "mine.jsonl", "--limit", "8"], "--limit: does nothing with --data without --task"),
        (["--data", "mine.jsonl", "--shots", "0"], "--shots: does nothing with --data without --task"),
        (["--data", "mine.jsonl", "--log", "x"], "--log: does nothing with --data without --task"),
        (["--task", "mine.jsonl", "--log", "mine.jsonl"], "--log mine.jsonl: exists already: expected a new file"),
        (["--task", "mine.jsonl", "--data", "data"], "--data data: mine.jsonl names its own file"),
        (["--task", "mine.jsonl", "--task", "mine.jsonl"], "there is a task mine already"),
        (["--task", "mine.jsonl", "--shots", "5"], "mine: 5 examples before each question: found 5"),
        (["--task", "mine.jsonl", "--limit", "0"], "'0': expected a positive whole number"),
        (["--task", "hellaswog", "--data", "data"], "(did you mean 'hellaswag'?)"),
        (["--task", "mine.jsonl", "--model", "none"], "none"),
    ],
)
def test_wrong_usage_is_one_line(
    more: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["eval", "-m", "/nowhere", *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
