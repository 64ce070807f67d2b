"""Answers that a model writes: what of them is compared, as lm-evaluation-harness does for GSM8K."""

from collections.abc import Sequence

import pytest

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.tasks import answers, requests
from mlxgpt.common.tasks.task import Question, Task

# GSM8K's own, in lm-evaluation-harness 0.4.13
STRICT = answers.taking(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = answers.taking(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
ALIKE = answers.making_alike([",", r"\$", r"(?s).*#### ", r"\.$"], ignore_case=True)

# what was written -> (strict-match, flexible-extract), and whether 1,234 is what they take: by that release's own code
WRITTEN = {
    "So it is 1,000 + 234.\n#### 1,234": ("1,234", "1,234", True, True),
    "#### 1234 #### 99": ("1234", "99", True, False),
    "The answer is $1,234.": ("[invalid]", "$1,234.", False, True),
    "It is 7": ("[invalid]", "7", False, False),
    "#### -5.0": ("-5.0", "-5.0", False, False),
    "no number": ("[invalid]", "[invalid]", False, False),
    "#### 1234.": ("1234.", "1234.", True, True),
    "####1,234": ("[invalid]", "1,234", False, True),
    "": ("[invalid]", "[invalid]", False, False),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_filters_take_what_those_of_lm_eval_take(text: str) -> None:
    strict, flexible, *_ = WRITTEN[text]
    assert (STRICT(text), FLEXIBLE(text)) == (strict, flexible)


class Writes:
    """A model that writes what it is told to, and remembers what it was asked."""

    context, cut, chat = 100, 0, False

    def __init__(self, texts: Sequence[str]):
        self.texts, self.asked = list(texts), list[object]()

    def answers(
        self, contexts: Sequence[str], stop: Sequence[str], sample: SampleConfig, say: object = None
    ) -> list[str]:
        self.asked += [list(contexts), list(stop), sample]
        return self.texts


def test_each_filter_has_a_metric() -> None:
    questions = [Question(f"row {n}", "How many?", target="Adds up.\n#### 1,234") for n in range(len(WRITTEN))]
    filters = {"strict-match": STRICT, "flexible-extract": FLEXIBLE}
    task = Task("gsm8k", "answer", questions, description="Count.\n", stop=("Question:",), filters=filters, alike=ALIKE)
    writes, rows = Writes(list(WRITTEN)), list[dict[str, object]]()
    outcome = requests.ask(task, writes, log=rows.append)  # type: ignore[arg-type]
    strict, flexible = outcome.each["exact_match,strict-match"], outcome.each["exact_match,flexible-extract"]
    assert strict.tolist() == [float(right) for _, _, right, _ in WRITTEN.values()]
    assert flexible.tolist() == [float(right) for *_, right in WRITTEN.values()]
    assert outcome.metrics["exact_match,strict-match"].value == pytest.approx(3 / 9)
    assert outcome.metrics["exact_match,strict-match"].stderr == pytest.approx((1 / 3 * 2 / 3 / 8) ** 0.5)
    contexts, stop, sample = writes.asked
    assert contexts == ["Count.\nHow many?"] * 9 and stop == ["Question:"] and sample.temperature == 0  # type: ignore[union-attr]
    assert rows[0]["answer"] == next(iter(WRITTEN)) and rows[0]["exact_match,strict-match"] == 1.0


def test_without_a_filter_any_of_the_right_answers_counts_as_it_is() -> None:
    question = Question("row 1", "Where?", ("New York",), target="NYC")
    task = Task("own", "answer", [question] * 4)
    texts = ["NYC", "New York", " NYC", "nyc"]
    assert answers.matched(task, [question] * 4, texts)["exact_match"].tolist() == [1, 1, 0, 0]


def test_what_is_ignored_is_ignored_on_both_sides() -> None:
    alike = answers.making_alike(["the "], ignore_case=True, ignore_punctuation=True, ignore_numbers=True)
    assert alike("Is the END, 42") == alike("is end 7!") == "is end "
    assert answers.making_alike()("A, 1.") == "A, 1."
    # one after another: what the first leaves can match the second
    assert answers.making_alike(["b", "ac"])("abc") == ""
    assert answers.one_after_another([str.strip, answers.taking("[a-z]+"), str.upper])(" 1 one two") == "ONE"


def test_a_match_number_that_there_is_not_is_no_answer() -> None:
    assert answers.taking("[0-9]+", 1)("1 2") == "2" and answers.taking("[0-9]+", 2)("1 2") == "[invalid]"
    assert answers.taking("(a)|(b)|(c?)")("") == "[invalid]"
