"""Rows of the published tasks' forms, made up: as files, and as lm-evaluation-harness's datasets hold them."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

_WORDS = ["river", "stone", "lamp", "cold", "bread", "green", "seven", "quiet", "horse", "window", "salt", "early"]
_WORDS += ["paper", "round", "gate"]


def _some(number: int, count: int = 3) -> str:
    return " ".join(_WORDS[(number * 7 + at * 4) % len(_WORDS)] for at in range(count))


def _hellaswag(first: int, count: int) -> Rows:
    marks = ["[header] How to {} [title] {}", "{}  {}", "{} [step] {}."]
    return [
        {
            "ind": n,
            "activity_label": _some(n, 2).title(),
            "ctx_a": marks[n % 3].format(_some(n), _some(n + 1)),
            "ctx_b": ["", "the " + _some(n + 2), "A Man"][n % 3],
            "endings": [f"{_some(n + at)} [substeps] {_some(at)}." for at in range(4)],
            "label": n % 4,
        }
        for n in range(first, first + count)
    ]


def _arc(first: int, count: int) -> Rows:
    made = []
    for n in range(first, first + count):
        labels = ("ABCD", "1234", "ABC")[n % 3]
        choices = {"text": [f"{_some(n + at)} caf\u00e9" for at in range(len(labels))], "label": list(labels)}
        made.append({"id": f"q{n}", "question": f"Why {_some(n)}?", "choices": choices, "answerKey": labels[n % 3]})
    return made


def _piqa(first: int, count: int) -> Rows:
    return [
        {"goal": f"To {_some(n)}", "sol1": f"{_some(n + 1)}, then stop", "sol2": _some(n + 2), "label": n % 2}
        for n in range(first, first + count)
    ]


def _winogrande(first: int, count: int) -> Rows:
    return [
        {"sentence": f"The {_some(n)} because _ was {_some(n + 5, 2)}.", "option1": "the lamp", "option2": "Ann"}
        | {"answer": str(1 + n % 2)}
        for n in range(first, first + count)
    ]


def _lambada(first: int, count: int) -> Rows:
    return [{"text": f"`` {_some(n, 9)} , '' said  {_some(n + 3, 2)}\u00e9"} for n in range(first, first + count)]


def _mmlu(first: int, count: int) -> Rows:
    return [
        {"question": f" What is {_some(n)}?\n({_some(n + 1)}) ", "choices": [_some(n + at) for at in range(4)]}
        | {"answer": n % 4}
        for n in range(first, first + count)
    ]


def _gsm8k(first: int, count: int) -> Rows:
    return [
        {"question": f"How many {_some(n)}?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1},000"}
        for n in range(first, first + count)
    ]


def _crows_pairs(count: int) -> Rows:
    kinds = ["age", "gender", "race-color"]
    return [
        {"sent_more": f"The {_some(n)}.", "sent_less": f"The {_some(n + 1)}.", "bias_type": kinds[n % 3]}
        for n in range(count)
    ]


def datasets() -> dict[str, tuple[str, dict[str, Rows]]]:
    """Task -> the file of lm-evaluation-harness 0.4.13 that describes it, and the rows of each split."""
    made = {
        "hellaswag": ("hellaswag/hellaswag.yaml", {"train": _hellaswag(0, 9), "validation": _hellaswag(20, 5)}),
        "arc_easy": ("arc/arc_easy.yaml", {"train": _arc(0, 9), "validation": _arc(30, 2), "test": _arc(20, 5)}),
        "arc_challenge": ("arc/arc_challenge.yaml", {"train": _arc(9, 9), "validation": [], "test": _arc(25, 5)}),
        "piqa": ("piqa/piqa.yaml", {"train": _piqa(0, 9) + _piqa(20, 1), "validation": _piqa(20, 5)}),
        "winogrande": ("winogrande/default.yaml", {"train": _winogrande(0, 9), "validation": _winogrande(20, 5)}),
        "lambada_openai": ("lambada/lambada_openai.yaml", {"test": _lambada(0, 9)}),
        "lambada_standard": ("lambada/lambada_standard.yaml", {"validation": _lambada(0, 9), "test": _lambada(20, 5)}),
        "mmlu_virology": ("mmlu/default/mmlu_virology.yaml", {"dev": _mmlu(0, 5), "test": _mmlu(20, 4)}),
        "mmlu_us_foreign_policy": (
            "mmlu/default/mmlu_us_foreign_policy.yaml",
            {"dev": _mmlu(5, 5), "test": _mmlu(30, 3)},
        ),
        "gsm8k": ("gsm8k/gsm8k.yaml", {"train": _gsm8k(0, 9), "test": _gsm8k(20, 5)}),
        "crows_pairs_english": ("crows_pairs/crows_pairs_english.yaml", {"test": _crows_pairs(7)}),
    }
    for row in [row for rows in made["hellaswag"][1].values() for row in rows]:
        row["label"] = str(row["label"])  # of the hub; the published files have numbers
    return made


def write_jsonl(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_hub(folder: Path) -> None:
    """The rows as the hub has them: a folder for each task, in it SUBSET/SPLIT.jsonl."""
    subsets = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "winogrande": "winogrande_xl", "gsm8k": "main"}
    for task, (_, splits) in datasets().items():
        place = folder / task / subsets.get(task, "data")
        if task.startswith("mmlu_"):
            place = folder / "mmlu" / task.removeprefix("mmlu_")
        for split, rows in splits.items():
            write_jsonl(place / f"{split}.jsonl", rows)


def write_published(folder: Path) -> None:
    """The rows as their authors published them."""
    made = {task: splits for task, (_, splits) in datasets().items()}
    for split, name in (("train", "train"), ("validation", "val")):
        rows = [{**row, "label": int(row["label"])} for row in made["hellaswag"][split]]
        write_jsonl(folder / f"hellaswag/hellaswag_{name}.jsonl", rows)
    for task, part in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")):
        for split in ("train", "test"):
            write_jsonl(
                folder / f"{task}/ARC-V1/{part}/{part}-{split.title()}.jsonl",
                [_nested(row) for row in made[task][split]],
            )
    for split, name in (("train", "train"), ("validation", "valid")):
        rows = made["piqa"][split]
        write_jsonl(
            folder / f"piqa/{name}.jsonl", [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in rows]
        )
        (folder / f"piqa/{name}-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows))
    for split, name in (("train", "train_xl"), ("validation", "dev")):
        write_jsonl(folder / f"winogrande/{name}.jsonl", [{"qID": "x", **row} for row in made["winogrande"][split]])
    write_jsonl(folder / "winogrande/train_s.jsonl", [])
    write_jsonl(folder / "lambada_openai/lambada_test.jsonl", made["lambada_openai"]["test"])
    for split, name in (("test", "test"), ("validation", "development")):
        file = folder / f"lambada_standard/lambada_{name}_plain_text.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(row["text"] + "\n" for row in made["lambada_standard"][split]), encoding="utf-8")
    for task in ("mmlu_virology", "mmlu_us_foreign_policy"):
        for split, rows in made[task].items():
            table = [[row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in rows]
            write_csv(folder / f"mmlu/data/{split}/{task.removeprefix('mmlu_')}_{split}.csv", table)
    for split in ("train", "test"):
        write_jsonl(folder / f"gsm8k/{split}.jsonl", made["gsm8k"][split])
    pairs = made["crows_pairs_english"]["test"]
    table = [[n, row["sent_more"], row["sent_less"], row["bias_type"], "[]"] for n, row in enumerate(pairs)]
    header = ["", "sent_more", "sent_less", "bias_type", "annotations"]
    write_csv(folder / "crows_pairs_english/crows_pairs_anonymized.csv", [header, *table])


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    choices = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    question = {"stem": row["question"], "choices": [{"text": text, "label": label} for text, label in choices]}
    return {"id": row["id"], "question": question, "answerKey": row["answerKey"]}


_CHOICES = """dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
output_type: multiple_choice
"""
YAMLS = {
    "plain": _CHOICES + 'test_split: test\ntraining_split: train\ndoc_to_text: "Q: {{q}}\\nA:"\n'
    "doc_to_choice: opts\ndoc_to_target: label\n",
    "itself": _CHOICES + "test_split: test\nfewshot_split: test\ndoc_to_text: q\n"
    'doc_to_choice: "{{opts}}"\ndoc_to_target: "{{digit}}"\ntarget_delimiter: "\\n"\nfewshot_delimiter: "\\n#\\n"\n'
    'description: "About {{id}}.\\n"\n',
    "first": _CHOICES + "validation_split: test\ntraining_split: train\nfewshot_config: {sampler: first_n}\n"
    "doc_to_text: \"{{q | upper | regex_replace('IS', 'is')}}{% if hint %} ({{hint}}){% endif %}\\n\"\n"
    'doc_to_choice: [x y, "no", z]\ndoc_to_target: label\ndescription: "Plain text.\\n\\n"\n',
    "table": _CHOICES + "test_split: test\nfewshot_split: train\ndoc_to_text: q\nnum_fewshot: 1\n"
    "doc_to_choice: {a: Yes sir, b: No sir, c: third}\n"
    "doc_to_target: \"{{['Yes sir', 'No sir', 'third'][label]}}\"\n",
    "partial": _CHOICES + "test_split: test\nfewshot_split: test\ndoc_to_text: label\n"
    "doc_to_choice: \"{{[q ~ ' 1', q ~ ' 2', q ~ ' 3']}}\"\ndoc_to_target: 'and {{id}} {{share}}'\n",
    "samples": _CHOICES + "test_split: test\ndoc_to_text: q\ndoc_to_choice: opts\ndoc_to_target: label\n"
    "fewshot_config: {samples: [{q: one, opts: [a, b], label: 0}, {q: two, opts: [c, d], label: 1}, "
    "{q: three, opts: [e, f], label: 0}]}\n",
    "parquet": _CHOICES.replace("json\n", "parquet\n").replace(".jsonl", ".parquet") + "test_split: test\n"
    "fewshot_split: train\ndoc_to_text: q\ndoc_to_choice: opts\ndoc_to_target: word\n",
    "csv": "dataset_path: csv\ndataset_kwargs: {data_files: table.csv}\ntest_split: train\n"
    "output_type: multiple_choice\n"
    'doc_to_text: "{{n}} {% if share is not none %}{{share}}{% endif %} {{yes}} {{b}} {{q}} {{note is none}}"\n'
    "doc_to_choice: \"{{[a, 'no']}}\"\ndoc_to_target: n\n",
    "cloze": "dataset_path: json\ndataset_kwargs: {data_files: test.jsonl}\ntest_split: train\n"
    'output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: " {{word}}"\n',
    "answer": "include: cloze.yaml\noutput_type: generate_until\ndoc_to_target: digit\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 12}\n'
    'metric_list: [{metric: exact_match, ignore_case: true, regexes_to_ignore: ["x"]}]\n'
    'filter_list: [{name: num, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}]\n',
    "text": "dataset_path: json\ndataset_kwargs: {data_files: {test: [test.jsonl]}}\ntest_split: test\n"
    'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}\\n{{word}}"\n',
}
"""Tasks of lm-evaluation-harness, by name, over the files that write_yamls writes."""


def _typed(first: int, count: int) -> Rows:
    """Rows with values of every type; every seventh is the same."""
    made = []
    for n in range(first, first + count):
        options = [f"{word} {n % 7}" for word in ("red", "blue\u00e9", "green")]
        row: dict[str, Any] = {"id": n % 7, "q": f"Is it {n % 7}?", "opts": options, "label": n % 7 % 3}
        row |= {"word": options[n % 7 % 3], "digit": str(n % 7 % 2), "hint": None if n % 7 % 2 else "really"}
        made.append({**row, "share": 0.5 if n % 7 % 2 else 2})
    return made


def write_yamls(folder: Path) -> None:
    """Writes YAMLS and their data."""
    import pyarrow
    import pyarrow.parquet

    for name, text in YAMLS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}", encoding="utf-8")
    for split, rows in (("train", _typed(0, 5)), ("test", _typed(2, 9))):
        write_jsonl(folder / f"{split}.jsonl", rows)
        whole = [{**row, "share": float(row["share"])} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), folder / f"{split}.parquet")
    table = [[n % 2, "" if n == 1 else n * 1.5, n > 1, f"Q{n}", f"a{n}", f"0{n}", ["NA", "x"][n % 2]] for n in range(6)]
    write_csv(folder / "table.csv", [["n", "share", "yes", "q", "a", "b", "note"], *table])
