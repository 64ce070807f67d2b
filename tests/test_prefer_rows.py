"""Preference data: its forms, what is refused, and batches that are trl's row for row."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import align_cases
import numpy as np
import pytest
from align_cases import BATCH, CASES, CUT, Case
from models import tiny
from small_rows import small_tokenizer

from mlxgpt.common.align import kto, source
from mlxgpt.common.align.source import PairSource
from mlxgpt.common.align_config import PreferConfig
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import TrainConfig, TuneConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.rows.preferences import open_preferences
from mlxgpt.common.sft import encode, pack
from mlxgpt.common.sft.template import with_chatml
from mlxgpt.common.tokenizers import beginning


def said(*texts: str, key: str = "role", value: str = "content") -> list[dict[str, str]]:
    roles = ("user", "assistant") if key == "role" else ("human", "gpt")
    return [{key: roles[n % 2], value: text} for n, text in enumerate(texts)]


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, loss: str = "dpo", batch: int = 2, task: str = "prefer", say: Any = print, **tune: Any) -> Any:
    settings = TuneConfig(task=task, source=str(path), date="2026-11-25", **tune)
    model = tiny(family="llama", block_size=256, vocab_size=400)
    train, prefer = TrainConfig(batch_size=batch, seed=5), PreferConfig(loss=loss)
    return source.open_source(settings, prefer, train, small_tokenizer(), model, say)


TALK = [*said("first", "one", "second")]
FORMS = {
    "texts": {"prompt": "q ", "chosen": "yes", "rejected": "no"},
    "messages": {"prompt": said("q"), "chosen": said("q", "yes")[1:], "rejected": said("q", "no")[1:]},
    "conversations": {"chosen": said("q", "yes"), "rejected": said("q", "no")},
    "ultrafeedback": {"prompt": "q", "prompt_id": "1", "chosen": said("q", "yes"), "rejected": said("q", "no")},
    "whole behind a prompt": {"prompt": said("q"), "chosen": said("q", "yes"), "rejected": said("q", "no")},
    "one message": {"conversations": said("q", key="from", value="value"), "chosen": {"from": "gpt", "value": "yes"},
                    "rejected": {"from": "gpt", "value": "no"}},
    "a text behind messages": {"prompt": said("q"), "chosen": "yes", "rejected": "no"},
    "a text before messages": {"prompt": "q", "chosen": said("q", "yes")[1:], "rejected": said("q", "no")[1:]},
    "alpaca": {"instruction": "q", "input": "", "output": "x", "chosen": "yes", "rejected": "no"},
    "a cell of a table": {"prompt": json.dumps(said("q")), "chosen": json.dumps(said("q", "yes")[1:]),
                          "rejected": json.dumps(said("q", "no")[1:])},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_a_prompt_and_two_answers(tmp_path: Path, form: str) -> None:
    row = FORMS[form]
    found = open_preferences(TuneConfig(task="prefer", source=str(write(tmp_path, [row, {**row, "margin": 2}]))))
    items = found.splits["train"]
    assert [item.margin for item in items] == [0.0, 2.0]
    better, worse = items[0].rows
    if form == "texts":
        assert found.format == "completion" and (better.text, better.answer, worse.answer) == ("q ", "yes", "no")
        return
    assert found.format == "chat"
    for one, answer in ((better, "yes"), (worse, "no")):
        assert list(one.messages) == said("q", answer)
        assert not one.train or one.train == (False, True)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: red?\nA: it is", "Q: red?\nA: no", "Q: red?\nA:"),  # the space belongs to the answers
        ("is blueish", "is bluebell", "is blue"),
        ("A: Yes. Sure", "A: Yes", "A: Ye"),  # something is left of both
        ("yes", "no", ""),
    ],
)
def test_what_both_texts_begin_with_is_the_prompt_as_in_trl(
    tmp_path: Path, chosen: str, rejected: str, prompt: str
) -> None:
    rows = [{"chosen": chosen, "rejected": rejected}] * 2
    (item, _) = open_preferences(TuneConfig(task="prefer", source=str(write(tmp_path, rows)))).splits["train"]
    assert [row.text for row in item.rows] == [prompt, prompt]
    assert [row.text + (row.answer or "") for row in item.rows] == [chosen, rejected]


def test_earlier_answers_are_not_judged(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": TALK, "chosen": said("x", "yes")[1:], "rejected": said("x", "no")[1:]}] * 2
    rows += [{"instruction": "q", "history": [["a", "b"]], "chosen": "yes", "rejected": "no"}]
    made = opened(write(tmp_path, rows))
    for row in made.examples["train"]:
        asked = np.flatnonzero(row.weights)
        assert (np.diff(asked) == 1).all() and len(asked) <= 6  # one answer and its end


GOOD = {"prompt": "q", "chosen": "yes", "rejected": "no"}
JUDGED = {"prompt": "q", "completion": "yes", "label": True}


@pytest.mark.parametrize(
    ("rows", "loss", "told"),
    [
        ([{**GOOD, "rejected": "yes"}, GOOD], "dpo", "row 1: chosen equals rejected"),
        ([{**GOOD, "rejected": "  "}], "dpo", "row 1: rejected is empty"),
        ([{**GOOD, "rejected": 3}], "dpo", "row 1: rejected is int '3'"),
        ([{**GOOD, "margin": "far"}], "dpo", "row 1: margin is str 'far': expected a finite number"),
        ([{"prompt": "q", "chosen": "yes"}], "dpo", "row 1: no key 'rejected'"),
        ([GOOD, {"chosen": "a b", "rejected": "a c"}], "dpo", "row 2: chosen and rejected are whole texts"),
        ([JUDGED], "dpo", "row 1: one answer with a label: expected --set prefer.loss=kto"),
        ([JUDGED], "kto", "one good answer, to train on: expected good and bad ones"),
        ([JUDGED, {**JUDGED, "prompt": "r"}], "kto", "to train on: expected good and bad ones"),
        ([{**JUDGED, "label": "maybe"}], "kto", "row 1: label is str 'maybe': expected true or false"),
        ([{"text": "a"}], "dpo", "row 1: keys 'text': expected chosen and rejected"),
        (
            [{"chosen": said("q", "a"), "rejected": said("r", "b")}],
            "dpo",
            "part in message 1, where chosen has a user's",
        ),
        ([{"chosen": said("q", "a")[1:], "rejected": said("q", "b")[1:]}], "dpo", "row 1: no prompt"),
        ([{"chosen": said("q", "a"), "rejected": "b"}], "dpo", "expected one form"),
    ],
)
def test_what_is_no_preference_is_refused(tmp_path: Path, rows: list[Any], loss: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        opened(write(tmp_path, rows), loss)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_kto_needs_two_rows_a_batch(tmp_path: Path) -> None:
    rows = [{**JUDGED, "prompt": f"q{n}", "label": n % 2} for n in range(30)]
    assert opened(write(tmp_path, rows), "kto").single
    with pytest.raises(UserError, match="batch_size = 1"):
        opened(write(tmp_path, rows), "kto", batch=1)


def test_a_few_equal_answers_are_left_out_and_said(tmp_path: Path) -> None:
    rows: list[Any] = [{**GOOD, "prompt": f"q{n}"} for n in range(30)]
    rows[7]["rejected"] = "yes"
    lines: list[str] = []
    made = opened(write(tmp_path, rows), say=lines.append)
    assert sum(map(len, made.examples.values())) == 2 * 29
    assert any("row 8: chosen equals rejected, in 1 of 30 rows: left out" in line for line in lines)


def test_answers_that_a_template_makes_equal_are_left_out(tmp_path: Path) -> None:
    rows = [{"chosen": said(f"q{n}", "yes"), "rejected": said(f"q{n}", "no")} for n in range(30)]
    rows[7]["rejected"] = said("q7", "yes ")
    template = tmp_path / "strips.jinja"
    turn = "{{ '<|im_start|>' + m.role + m.content.strip() + '<|im_end|>' }}"
    asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    template.write_text(f"{{% for m in messages %}}{turn}{{% endfor %}}{asked}")
    path, lines = write(tmp_path, rows), list[str]()
    tokenizer = with_chatml(small_tokenizer())
    model = tiny(family="llama", block_size=256, vocab_size=400)
    tune = TuneConfig(task="prefer", source=str(path), date="2026-11-25", template=str(template))
    made = source.open_source(tune, PreferConfig(), TrainConfig(batch_size=2), tokenizer, model, lines.append)
    assert sum(map(len, made.examples.values())) == 2 * 29
    assert any("row 8: chosen equals rejected as the model reads them, in 1 of 30 rows" in line for line in lines)


def test_a_batch_of_pairs_that_are_cut_alike_is_idle(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} ", "chosen": "stone " * 30 + "a", "rejected": "stone " * 30 + "b"} for n in range(30)]
    lines: list[str] = []
    made = opened(write(tmp_path, rows), "simpo", block_size=20, overflow="start", say=lines.append)
    assert made.batch(1).idle and any("pairs are cut to the same tokens" in line for line in lines)
    assert not opened(write(tmp_path, rows), "simpo").batch(1).idle
    assert not opened(write(tmp_path, rows), "orpo", block_size=20, overflow="start").batch(1).idle


def test_the_instruction_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "shared/data/instruction/instruction-data-with-preference.json"
    if not path.is_file():
        pytest.skip("the file is not here")
    made = opened(path, batch=4)
    assert len(made.examples["train"]) > 1900 and made.template is not None


def long_rows(count: int = 40) -> list[dict[str, str]]:
    return [{"prompt": f"{n} " + "the quick river " * (n % 9 + 1), "chosen": "stone " * (n % 5 + 1),
             "rejected": "paper " * ((3 * n) % 14 + 2)} for n in range(count)]  # fmt: skip


@pytest.mark.parametrize("overflow", ["drop", "truncate", "start"])
def test_longer_pairs_stay_or_go_as_one_and_keep_one_prompt(tmp_path: Path, overflow: str) -> None:
    lines: list[str] = []
    made = opened(write(tmp_path, long_rows()), block_size=60, overflow=overflow, say=lines.append)
    cut = 0
    for split, rows in made.examples.items():
        assert made.counts[split].rows - made.counts[split].dropped == len(rows) // 2 == len(made.margins[split])
        for better, worse in zip(rows[0::2], rows[1::2], strict=True):
            assert better.where.removesuffix("chosen") == worse.where.removesuffix("rejected")
            assert np.array_equal(better.prompt, worse.prompt)
            assert max(len(better), len(worse)) <= 60 - (overflow == "start")
            cut += max(len(better), len(worse)) > 60 - 8
    assert made.counts["train"].dropped and any("dropped" in line for line in lines) if overflow != "truncate" else cut
    assert sum(made.counts["train"].__dict__[name] for name in ("dropped", "cut", "truncated"))
    assert opened(write(tmp_path, long_rows()), block_size=200).counts["train"].dropped == 0


def test_a_batch_is_a_function_of_seed_and_step_and_is_split_between_pairs(tmp_path: Path) -> None:
    one, two = (opened(write(tmp_path, long_rows()), "simpo", batch=3) for _ in range(2))
    steps = 2 * one.steps_per_epoch + 1
    for step in range(steps, 0, -1):
        made, other = one.batch(step), two.batch(steps + 1 - step)
        again = two.batch(step)
        assert np.array_equal(made.tokens, again.tokens) and made.row_ids == again.row_ids
        assert len(other.tokens) % 2 == 0 and other.weight == len(other.tokens) / 2
        for part in made.split(2):
            names = [name.rpartition(" ")[0] for name in part.row_ids]
            assert len(part.tokens) in (2, 4) and names[0::2] == names[1::2]
    seen = [name for step in range(1, one.steps_per_epoch + 1) for name in one.batch(step).row_ids]
    assert len(set(seen)) == len(seen) == len(one.examples["train"])


# as trl has them


def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches in the order of the data, as trl's sequential ones."""

    def plan(lengths: np.ndarray, order: np.ndarray, rows: int) -> list[pack.Plan]:
        return [[(row,) for row in range(at, min(at + rows, len(order)))] for at in range(0, len(order), rows)]

    monkeypatch.setattr(pack, "padded_plan", plan)
    monkeypatch.setattr(pack, "shuffled", lambda plan, seed, epoch: plan)


def like_trl(name: str, folder: Path) -> PairSource:
    """The source of a case's rows."""
    case, lines = CASES[name], []
    for each in align_cases.pairs():
        alone = {"completion": each["chosen" if each["label"] else "rejected"]}
        keys = ("prompt", "label") if case.trainer == "KTO" else ("prompt", "chosen", "rejected", "margin")
        lines.append({key: each[key] for key in keys} | (alone if case.trainer == "KTO" else {}))
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "rows" / "valid.jsonl").write_text(json.dumps(lines[0]) + "\n")
    recipe = align_cases.recipe(case)
    assert recipe.prefer
    size = {"block_size": CUT, "overflow": "start"} if case.cut else {}
    tune = TuneConfig(task="prefer", source=str(folder / "rows"), date="2026-11-25", **size)
    train = TrainConfig(batch_size=BATCH)
    return source.open_source(tune, recipe.prefer, train, align_cases.tokenizer(), recipe.model, lambda line: None)


def same(ours: Batch, theirs: Batch) -> bool:
    """Whether two batches ask the same of the same tokens, padding apart."""
    width = min(ours.tokens.shape[1], theirs.tokens.shape[1])
    if len(ours.tokens) != len(theirs.tokens) or ours.weights[:, width:].any() or theirs.weights[:, width:].any():
        return False
    asked = ours.weights[:, :width] > 0
    same = np.array_equal(ours.weights[:, :width], theirs.weights[:, :width])
    same &= np.array_equal(ours.targets[:, :width][asked], theirs.targets[:, :width][asked])
    until = np.cumsum(asked[:, ::-1], axis=1)[:, ::-1] > 0  # what the targets may see
    same &= np.array_equal(ours.tokens[:, :width][until], theirs.tokens[:, :width][until])
    held = ("nll", "good")
    return same and all(
        np.allclose(ours.beside[name][..., :width], theirs.beside[name][..., :width], rtol=1e-6)
        for name in held
        if name in theirs.beside
    )


def agrees(case: Case, made: PairSource) -> bool:
    """Whether all steps have trl's batches, and KTO's mismatches."""
    names = ("train", "train kl")
    made.reference = {name: np.zeros(len(made.examples["train"]), np.float32) for name in names}
    made.policy = lambda batch: np.ones(len(batch.tokens))
    found = [made.batch(step + 1) for step in range(align_cases.STEPS)]
    good = all(same(ours, theirs) for ours, theirs in zip(found, align_cases.batches(case), strict=True))
    if case.trainer == "KTO":
        for step, theirs in enumerate(align_cases.mismatched(case)):
            rows = list(range(step * BATCH, step * BATCH + BATCH))
            good &= same(made.padded(made.mismatched("train", rows), range(BATCH)), theirs)
    return good


@pytest.mark.parametrize("name", ["dpo", "cut", "sft", "kto", "orpo"])
def test_batches_are_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    in_order(monkeypatch)
    assert agrees(CASES[name], like_trl(name, tmp_path))


@pytest.mark.parametrize("fault", ["end", "prompt", "cut", "micro", "likelihood"])
def test_other_batches_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Mutations: an end that is not trained, a prompt that is, another cut, KTO's pairs within a micro-batch, ..."""
    in_order(monkeypatch)
    name = {"cut": "cut", "micro": "kto", "likelihood": "orpo"}.get(fault, "dpo")
    if fault == "end":
        monkeypatch.setattr(beginning, "end", lambda tokenizer, ids: ids)
    elif fault == "prompt":
        plain = encode.Encoder._plain
        monkeypatch.setattr(
            encode.Encoder, "_plain", lambda self, rows: [(a, ids, mask | True) for a, ids, mask in plain(self, rows)]
        )
    elif fault == "micro":
        others = kto.others

        def within(plans: list[pack.Plan], count: int) -> np.ndarray:
            return others([plan[at : at + 2] for plan in plans for at in range(0, len(plan), 2)], count)

        monkeypatch.setattr(kto, "others", within)
    elif fault == "likelihood":
        monkeypatch.setattr(PairSource, "_real", lambda self, split, rows, batch: batch.weights)
    made = like_trl(name, tmp_path)
    if fault == "cut":  # one token wider than trl's
        tune = dataclasses.replace(made.encoder.tune, block_size=CUT + 1)
        recipe = align_cases.recipe(CASES[name])
        assert recipe.prefer
        made = source.open_source(
            tune, recipe.prefer, made.train, align_cases.tokenizer(), recipe.model, lambda line: None
        )
    assert not agrees(CASES[name], made)


def test_ktos_mismatch_is_the_same_in_every_epoch_and_never_the_row_itself(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}\n", "completion": "stone " * (n % 7 + 1), "label": n % 3 == 0} for n in range(21)]
    for name in ("train", "valid"):
        write(tmp_path, rows).rename(tmp_path / f"{name}.jsonl")
    made = opened(tmp_path, "kto", batch=4)
    others = made._other("train")
    assert (others != np.arange(len(others))).all() and len(others) % 4 == 1  # the last batch has a single row
    batches = [{frozenset(row for (row,) in plan) for plan in made._plan(epoch)} for epoch in range(3)]
    assert batches[0] == batches[1] == batches[2]
    assert made._plan(0) != made._plan(1)
    for batch in batches[0]:
        if len(batch) > 1:
            assert set(others[list(batch)]) == batch


def test_kto_of_pairs_has_a_good_and_a_bad_answer_of_each(tmp_path: Path) -> None:
    made = opened(write(tmp_path, long_rows()), "kto", batch=4)
    for split, rows in made.examples.items():
        kinds = np.array([row.where.endswith("chosen") for row in rows], np.float32)
        assert np.array_equal(made.good[split], kinds)
    assert made.good["train"].mean() == 0.5
