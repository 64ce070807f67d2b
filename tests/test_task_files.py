"""Task files: a .jsonl of one's own, and a YAML of lm-evaluation-harness: what they mean, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from task_rows import YAMLS, write_jsonl, write_yamls
from task_scorer import Said

from mlxgpt.common.errors import UserError
from mlxgpt.common.tasks import named, requests
from mlxgpt.common.tasks.task import Task


def own(tmp_path: Path, *rows: dict[str, Any]) -> Task:
    write_jsonl(tmp_path / "mine.jsonl", rows)
    return named.read(str(tmp_path / "mine.jsonl"))


def asked(task: Task, limit: int | None = None) -> list[list[str]]:
    scorer = Said()
    requests.ask(task, scorer, limit)
    return scorer.asked


# ---- a .jsonl of one's own

CHOICE = {"text": "2 + 2 =", "choices": ["four", "five", "six"], "answer": "four"}


@pytest.mark.parametrize("answer, gold", [(0, (0,)), ("five", (1,)), ("C", (2,)), ([0, "B"], (0, 1)), (["A", 0], (0,))])
def test_an_answer_is_an_index_a_text_a_letter_or_several(answer: Any, gold: tuple, tmp_path: Path) -> None:
    task = own(tmp_path, {**CHOICE, "answer": answer})
    assert (task.kind, task.name, task.questions[0].gold) == ("choice", "mine", gold)


def test_what_the_rows_of_each_kind_ask(tmp_path: Path) -> None:
    assert asked(own(tmp_path, CHOICE)) == [["2 + 2 =", f" {choice}"] for choice in CHOICE["choices"]]
    question = {"question": "What is it?", "choices": ["a", "b"], "answer": 0}
    assert asked(own(tmp_path, question))[1] == ["Question: What is it?\nAnswer:", " b"]
    lines = own(tmp_path, {**CHOICE, "text": "2 + 2\n"}, {**CHOICE, "text": "3\n"})
    assert asked(lines)[0] == ["2 + 2\n", "four"]
    cloze = [{"text": "The sky is", "answer": "blue"}, {"text": "A\n", "answer": "b"}, {"text": "x", "answer": " y"}]
    assert asked(own(tmp_path, *cloze)) == [["The sky is", " blue"], ["A\n", "b"], ["x", " y"]]
    assert asked(own(tmp_path, {"more": "They lie.", "less": "We lie."})) == [["", "They lie."], ["", "We lie."]]
    assert asked(own(tmp_path, {"text": "A whole text."})) == [["A whole text."]]
    answer = own(tmp_path, {"prompt": "Say one:", "answer": ["one", "1"]})
    assert (answer.kind, answer.questions[0].target, answer.questions[0].choices) == ("answer", "one", ("1",))
    assert own(tmp_path, {"prompt": "def f():", "tests": "f()"}).kind == "code"


def test_choices_that_bring_their_own_space_get_no_second_one(tmp_path: Path) -> None:
    task = own(tmp_path, {"text": "The sky is", "choices": [" blue", " red"], "answer": 0}, {**CHOICE, "text": ""})
    assert asked(task)[:2] == [["The sky is", " blue"], ["The sky is", " red"]]
    task = own(tmp_path, {"text": "The sky is", "choices": [" blue", "red"], "answer": 0})
    assert asked(task) == [["The sky is", "  blue"], ["The sky is", " red"]]


def test_an_answer_has_room_for_a_token_a_byte(tmp_path: Path) -> None:
    task = own(tmp_path, {"prompt": "Say hello:", "answer": "\u4f60\u597d\u4e16\u754c\U0001f525"})
    assert task.sample.max_tokens == 3 * 4 + 4 + 8


def test_numbers_in_a_table_are_those_of_tables(tmp_path: Path) -> None:
    yaml = {"dataset_path": "csv", "dataset_kwargs": {"data_files": {"test": "t.csv"}}, "test_split": "test"}
    yaml |= {"output_type": "loglikelihood", "doc_to_text": "{{a}} {{b}} {{c}} {{d}}", "doc_to_target": " x"}
    (tmp_path / "t.yaml").write_text(json.dumps(yaml))
    (tmp_path / "t.csv").write_text("a,b,c,d\n1_000,\u0663,7,1\n2,3,07,1.5\n", encoding="utf-8")
    assert [context for context, _ in asked(named.read(str(tmp_path / "t.yaml")))] == [
        "1_000 \u0663 7 1.0",
        "2 3 7 1.5",
    ]


def test_examples_come_from_the_other_rows(tmp_path: Path) -> None:
    rows = [{"text": f"{n} is", "answer": str(n), "group": "even" if n % 2 == 0 else "odd"} for n in range(4)]
    own(tmp_path, *rows)
    task = named.read(str(tmp_path / "mine.jsonl"), shots=3)
    for number, (context, answer) in enumerate(asked(task)):
        *examples, last = context.split("\n\n")
        assert (last, answer) == (f"{number} is", f" {number}")
        assert sorted(examples) == [f"{n} is {n}" for n in range(4) if n != number]
    assert requests.ask(task, Said()).sizes == {"even": 2, "odd": 2}


def test_keys_that_are_not_read_are_said(tmp_path: Path) -> None:
    assert own(tmp_path, {**CHOICE, "id": 3, "source": "x"}).notes == ("keys that are not read: id, source",)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a", "choices": ["b", "c"]}, "row 2: no answer: expected the index, the text or the letter"),
        ({"text": "a", "choices": ["b", "c"], "awnser": 0}, "row 2: no answer; awnser (did you mean 'answer'?)"),
        ({**CHOICE, "answer": None}, "row 2: answer is null: expected the index"),
        ({**CHOICE, "answer": True}, "row 2: answer is bool 'True'"),
        ({**CHOICE, "answer": 3}, "row 2: answer 3: expected 0 to 2, the index of a choice"),
        ({**CHOICE, "answer": -1}, "row 2: answer -1: expected 0 to 2"),
        ({**CHOICE, "answer": "seven"}, "row 2: answer 'seven': expected the index"),
        ({**CHOICE, "answer": "D"}, "row 2: answer 'D'"),
        ({**CHOICE, "answer": []}, "row 2: answer is []"),
        ({"text": "a", "choices": ["B", "A"], "answer": "A"}, "'A': the text of choice 1 and the letter of choice 0"),
        ({**CHOICE, "choices": ["x", "y", "x"]}, "row 2: choices 0 and 2 are both 'x': expected different ones"),
        ({**CHOICE, "choices": ["x"]}, "row 2: choices is list \"['x']\": expected a list of at least two texts"),
        ({**CHOICE, "choices": "x"}, "row 2: choices is str 'x'"),
        ({**CHOICE, "choices": ["x", 3]}, "row 2: choice 1 is int '3': expected text"),
        ({**CHOICE, "choices": ["x", " "]}, "row 2: choice 1 is str ' ': expected text"),
        ({**CHOICE, "question": "b"}, "row 2: text and question: expected one"),
        ({"text": "a", "answer": "b"}, "row 2: keys of kind cloze: expected choice, as in the rows before"),
        ({"id": 3}, "row 2: keys 'id': expected {text|question, choices, answer}"),
    ],
)
def test_a_row_that_is_no_question_is_refused(row: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        own(tmp_path, CHOICE, row)
    assert "mine.jsonl" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a", "answer": ""}, "answer is empty"),
        ({"text": "a", "answer": 7}, "answer is int '7': expected a string"),
        ({"more": "a", "less": "a"}, "more and less are both 'a'"),
        ({"prompt": "a", "answer": []}, "answer is []"),
        ({"prompt": "a", "answer": ["b", None]}, "answer is null"),
        ({"prompt": "a", "answer": ["b", "c\n\nd"]}, "answer has an empty line"),
        ({"prompt": "a", "tests": ""}, "tests is empty"),
    ],
)
def test_a_row_of_another_kind_that_is_none_is_refused(row: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        own(tmp_path, row)
    assert f"mine.jsonl row 1: {message}" in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "task.txt").touch()
    for name, message in [
        ("empty.jsonl", "empty.jsonl: empty: expected a question a line"),
        ("broken.jsonl", "broken.jsonl row 2: not JSON"),
        ("none.jsonl", "none.jsonl: no such file"),
        ("none.yaml", "none.yaml: No such file"),
        ("task.txt", "task.txt: expected a .jsonl of questions or a YAML"),
    ]:
        with pytest.raises(UserError) as caught:
            named.read(str(tmp_path / name))
        assert message in str(caught.value)
    write_jsonl(tmp_path / "pairs.jsonl", [{"more": "a", "less": "b"}])
    with pytest.raises(UserError, match="--shots 1: pairs is of kind pair: expected 0"):
        named.read(str(tmp_path / "pairs.jsonl"), shots=1)
    pairs = str(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="there is a task pairs already"):
        named.read_all([pairs, pairs])
    with pytest.raises(UserError, match="--data x: .* names its own file"):
        named.read_all([pairs], "x")


# ---- a YAML of lm-evaluation-harness

# sha256 of what lm-evaluation-harness 0.4.13 asks with 0 and 2 examples: tests/lm_eval_requests.py
ASKED = {
    "plain": ("0333d3ff57a70f9d", "3b3200a783cc8bbf"),
    "itself": ("712e3c9094e903ea", "1e03707fc90c2534"),
    "first": ("bf44863f3deae65b", "343f0e813a279ee8"),
    "table": ("74de4628e5112b31", "6020f7327e9865a9"),
    "partial": ("939290491086e7a3", "fdf5eb4e85cd7fb1"),
    "samples": ("bbe1435566ac4f76", "8dc457625be8c5cb"),
    "parquet": ("bbe1435566ac4f76", "19b9dc863e58aab0"),
    "csv": ("e1bb67bc221ca572", "e6f1ca767dd92244"),
    "cloze": ("5f43f302ef0ad84e", "8941867be12ba50d"),
    "answer": ("8e5edf31f50cb5e8", "80cecd641261389a"),
    "text": ("905cbaa33a309659",),
}


@pytest.fixture(scope="module")
def yamls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yamls")
    write_yamls(folder)
    return folder


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_asks_what_it_asks_in_lm_evaluation_harness(name: str, yamls: Path) -> None:
    for shots, digest in zip((0, 2), ASKED[name], strict=False):
        found = asked(named.read(str(yamls / f"{name}.yaml"), shots=shots))
        assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == digest, found[0]


def test_some_of_them_to_read(yamls: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = {name: asked(named.read(str(yamls / f"{name}.yaml"), shots=2))[0] for name in ("itself", "partial", "csv")}
    examples = "Is it 3?\nblue\u00e9 3\n#\nIs it 0?\nred 0\n#\n"
    assert first["itself"] == [f"About 2.\n{examples}Is it 2?", "\nred 2"]
    assert first["partial"] == ["Is it 3? 1 and 3 0.5\n\nIs it 0? 1 and 0 2.0\n\nIs it 2? 1", " and 2 2.0"]
    assert first["csv"][0].startswith("1 4.5 True 3 Q3 False no\n\n0 0.0 False 0 Q0 True a0\n\n")
    write_jsonl(tmp_path / "test.jsonl", [{"q": "Here?", "word": "yes"}])  # the working directory comes first
    monkeypatch.chdir(tmp_path)
    assert asked(named.read(str(yamls / "cloze.yaml"))) == [["Here?", " yes"]]


def test_what_else_a_yaml_says(yamls: Path) -> None:
    table, answer = (named.read(str(yamls / f"{name}.yaml")) for name in ("table", "answer"))
    assert (table.name, table.kind, table.shots, table.metrics) == ("table", "choice", 1, ())
    assert (answer.kind, answer.stop, answer.sample.max_tokens, answer.sample.temperature) == ("answer", ("\n",), 12, 0)
    assert answer.filters["num"]("so 17 or 18") == "17" and answer.filters["num"]("none") == "[invalid]"
    assert answer.alike("xAx") == "a"


BASE = "dataset_path: json\ndataset_kwargs: {data_files: test.jsonl}\ntest_split: train\noutput_type: multiple_choice\n"
BASE += "doc_to_text: q\ndoc_to_choice: opts\ndoc_to_target: label\n"


def test_metrics_have_our_names(yamls: Path) -> None:
    listed = "metric_list: [{metric: acc_bytes}, {metric: acc_norm, aggregation: mean, higher_is_better: true}]"
    (yamls / "listed.yaml").write_text(BASE + listed)
    outcome = requests.ask(named.read(str(yamls / "listed.yaml")), Said())
    assert list(outcome.metrics) == ["acc_norm", "acc_per_byte"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("process_docs: !function utils.process", "process_docs: !function utils.process: is code, which is never run"),
        ("fewshot_config: {samples: !function utils.list}", "fewshot_config: !function utils.list: is code"),
        ("process_results: x", "process_results: is code"),
        ("metadata: &m {a: [*m, *m], b: !function x.y}", "metadata: !function x.y: is code"),
        ("doc_to_text: \"{{ 'a' * 10**15 }}\"", "row 1: doc_to_text: "),
        ("gen_prefix: x", "gen_prefix: is not supported"),
        ("group: x", "group: expected a --task for each task"),
        ("doc_to_txt: x", "unknown key doc_to_txt (did you mean 'doc_to_text'?)"),
        ("repeats: 3", "repeats = 3: expected 1"),
        ("dataset_name: main", "dataset_name = 'main': expected None"),
        ("dataset_path: Rowan/hellaswag", "dataset_path = 'Rowan/hellaswag': expected json, csv"),
        ("dataset_kwargs: {data_dir: x}", "dataset_kwargs.data_dir: not supported: expected data_files alone"),
        ("dataset_kwargs: {data_files: 'https://a/b.jsonl'}", "'https://a/b.jsonl': expected files on disk"),
        ("dataset_kwargs: {data_files: none.jsonl}", "data_files: none.jsonl: no such file"),
        ("dataset_kwargs: {data_files: table.csv}", "table.csv: expected .jsonl or .json, as dataset_path says"),
        ("test_split: test", "test_split = 'test': dataset_kwargs.data_files has train"),
        ("test_split: null", "no test_split or validation_split"),
        ("output_type: choice", "output_type = 'choice': expected multiple_choice"),
        ("output_type: loglikelihood", "doc_to_choice: does nothing with output_type loglikelihood"),
        ("doc_to_choice: null", "no key doc_to_choice"),
        ("num_fewshot: many", "num_fewshot = 'many': expected 0 or a positive whole number"),
        ("fewshot_config: {sampler: balanced}", "fewshot_config.sampler = 'balanced': expected default, first_n"),
        ("fewshot_config: {doc_to_text: x}", "fewshot_config.doc_to_text: not supported"),
        ("metric_list: [{metric: f1}]", "metric 'f1': not supported: expected acc, acc_norm, acc_bytes"),
        ("metric_list: [{metric: acc, aggregation: median}]", "acc: aggregation = 'median': expected mean"),
        ("metric_list: [{metric: acc, weight: 2}]", "acc: weight: not supported"),
        ("generation_kwargs: {until: x}", "generation_kwargs: does nothing with output_type multiple_choice"),
        ("doc_to_target: 7", "test.jsonl row 1: doc_to_target is int '7': expected 0 to 2"),
        ("doc_to_target: word2", "row 1: doc_to_target is str 'word2'"),
        ("doc_to_target: '{{word2}}'", "row 1: doc_to_target: 'word2' is undefined"),
        ("doc_to_text: '{{q'", "row 1: doc_to_text: unexpected end of template"),
        ("doc_to_text: '{{hint}}'", "test.jsonl row 2: doc_to_text: a value that is null would be written as None"),
        ("doc_to_text: '{{q.__class__.__mro__}}'", "row 1: doc_to_text: access to attribute '__class__'"),
        ("doc_to_text: hint", "row 2: doc_to_text is null: expected text"),
        ("doc_to_choice: '{{q}}'", "row 1: doc_to_choice: 'Is it 2?': expected a list of texts"),
        ("doc_to_choice: [yes, no]", "row 1: choice 0 is bool 'True': expected text (YAML's yes and no need quotes)"),
        ("doc_to_choice: [a, b, a]", "row 1: choices 0 and 2 are both 'a'"),
        ("description: opts", "row 1: description is list"),
        ("description: [a]", "description = ['a']: expected text"),
        ("dataset_kwargs: test.jsonl", "dataset_kwargs = 'test.jsonl': expected data_files"),
        ("dataset_kwargs: {data_files: {train: []}}", "dataset_kwargs.data_files.train: empty"),
        ("include: 3", "include = 3: expected a file"),
        ('doc_to_choice: ["a", "\\ud800"]', "row 1: choice 1: '\\ud800' at character 0: half of a surrogate pair"),
        ("doc_to_choice: [a]", "row 1: doc_to_choice is list \"['a']\": expected a list of at least two texts"),
        ("include: broken.yaml", "broken.yaml: includes itself"),
        ("include: none.yaml", "none.yaml: No such file"),
        ("- a", "not YAML"),
    ],
)
def test_what_a_yaml_has_that_we_do_not_is_refused(text: str, message: str, yamls: Path) -> None:
    key = text.partition(":")[0]
    kept = [line for line in BASE.splitlines(keepends=True) if not line.startswith(f"{key}:")]
    (yamls / "broken.yaml").write_text("".join(kept) + text)
    with pytest.raises(UserError) as caught:
        named.read(str(yamls / "broken.yaml"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("generation_kwargs: {num_beams: 4}", "generation_kwargs: num_beams: not supported"),
        ("generation_kwargs: {until: [3]}", "generation_kwargs.until = [3]: expected texts"),
        ("generation_kwargs: {temperature: hot}", "generation_kwargs: temperature = 'hot': expected a number"),
        ("metric_list: [{metric: exact_match, regexes_to_ignore: ['(']}]", "exact_match: not a regular expression"),
        ("metric_list: [{metric: exact_match, ignore_case: 3}]", "exact_match: ignore_case = 3: expected a bool"),
        ("filter_list: [{name: a, filter: [{function: map}]}]", "filter 'a': expected a name, and take_first"),
        ("filter_list: [{name: a, filter: [{function: map}, {function: take_first}]}]", "function 'map': not supp"),
        (
            "filter_list: [{name: a, filter: [{function: regex, regex_pattern: '('}, {function: take_first}]}]",
            "filter a: not a regular expression",
        ),
    ],
)
def test_what_an_answer_has_that_we_do_not_is_refused(text: str, message: str, yamls: Path) -> None:
    (yamls / "broken.yaml").write_text(f"include: cloze.yaml\noutput_type: generate_until\n{text}")
    with pytest.raises(UserError) as caught:
        named.read(str(yamls / "broken.yaml"))
    assert message in str(caught.value)
