"""Scores on tasks beside lm-evaluation-harness: its hf model in PyTorch, and mlx_lm.evaluate's in MLX, on the CPU.

    python -m benchmarks.tasks --python VENV/bin/python [--rounds 5] [--questions 200] [--size 10M] [--json]

VENV has lm_eval on top of this environment: ``python -m venv VENV``, a line with this environment's site-packages in
VENV/lib/python3.*/site-packages/base.pth, ``VENV/bin/pip install lm_eval==0.4.13``; or MLXGPT_LM_EVAL names the python.

Four tasks from the docstrings of Python's standard library, a YAML each, which all contenders read: endings as
HellaSwag asks (no examples), ARC (5 examples, the same before each question), MMLU's letters (5), LAMBADA's last words.
A random llama in float32, of 10 M (width 256, 10 layers) or 29 M (width 512, 8 layers), vocabulary 8192, with BOS. The
model is loaded and the tasks are read before the clock starts, but for the rows that time whole commands.
Every contender must find the same accuracies, log-probabilities within 1e-4 of hf's, and so must other batch sizes.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.pairs import Contender, commands, race, row
from benchmarks.report import Row, finish
from benchmarks.serving.model import SIZES

GATE = 1e-4  # of a question's log-probability
NAMES = ("endings", "arc", "mmlu", "lastword")
OURS, PEERS = ("mlxgpt", "torch_ref"), ("hf, batch 1", "hf, batch 8", "mlx_lm")
_CHOICES = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
YAML: dict[str, dict[str, Any]] = {
    "endings": _CHOICES | {"doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
    "arc": _CHOICES
    | {"doc_to_text": "Question: {{text}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    | {"num_fewshot": 5, "fewshot_config": {"sampler": "first_n"}},
    "mmlu": _CHOICES
    | {
        "doc_to_text": "{{text}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "{{answer}}",
        "num_fewshot": 5,
        "fewshot_config": {"sampler": "first_n"},
    },
    "lastword": {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{choices[0]}}"}
    | {"metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]},
}


def sentences() -> Iterator[list[str]]:
    """Words of the docstrings that have enough of them."""
    from mlxgpt.common.data import pydocs

    for _, text in pydocs.documents():
        words = text.split()
        if len(words) >= 80:
            yield words[:80]


def questions(name: str, count: int) -> list[dict[str, Any]]:
    """Contexts with four ways to go on, the right one at another place each time; the same for every contender."""
    before, after = {"endings": (40, 14), "arc": (20, 5), "mmlu": (30, 8), "lastword": (70, 1)}[name]
    texts = list(sentences())
    made = []
    for number in range(count):
        words = texts[number % len(texts)]
        others = [texts[(number + 101 * k) % len(texts)][k : k + after] for k in (1, 2, 3)]
        choices = [" ".join(each) for each in others]
        choices.insert(number % 4, " ".join(words[before : before + after]))
        if name == "lastword":
            choices = [words[before]]
        if len(set(choices)) == len(choices):
            made.append({"text": " ".join(words[:before]), "choices": choices, "answer": number % 4})
    return made


def write_tasks(folder: Path, count: int) -> None:
    """A YAML and the rows of each task."""
    import yaml

    for name in NAMES:
        rows = questions(name, count + 20)
        for split, part in (("train", rows[:10]), ("test", rows[10 : 10 + count])):
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in part))
        files = {split: str(folder / f"{name}-{split}.jsonl") for split in ("train", "test")}
        given = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        given |= {"test_split": "test", "fewshot_split": "train"} | YAML[name]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(given))


def write_folder(folder: Path, size: str) -> None:
    """A random llama with a tokenizer that puts BOS before a text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    from mlxgpt.common import recipes
    from mlxgpt.common.folders.model_folder import write_model
    from mlxgpt.common.model import params
    from mlxgpt.common.tokenizers.load import load_tokenizer

    config = recipes.build({"model": {"family": "llama", "tied": True, **SIZES[size]}}).model
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(each) for each in sentences()], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    source = folder.parent / "tokenizer"
    source.mkdir()
    backend.save(str(source / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"clean_up_tokenization_spaces": False}))
    write_model(folder, config, params.init_params(config, 0), tokenizer=load_tokenizer(source))


def ours(package: str, folder: str, names: str, rows: str = "64") -> Callable[[], int]:
    """mlxgpt eval --task, in either framework."""
    from mlxgpt.common import backend as backends
    from mlxgpt.common.tasks import named, requests
    from mlxgpt.common.tasks.scorer import ModelScorer

    backend = backends.load({"mlxgpt": "mlx", "torch_ref": "torch"}[package])
    model, tokenizer = backend.load.load(Path(folder) / "model", device="cpu")
    assert tokenizer
    tasks = named.read_all([str(Path(folder) / f"{name}.yaml") for name in names.split(",")])
    scorer = ModelScorer(backend, model, tokenizer, rows=int(rows))

    def run() -> int:
        found: dict[str, dict[str, Any]] = {}
        for task in tasks:
            log: list[dict[str, Any]] = []
            outcome = requests.ask(task, scorer, log=log.append)
            each = [row["logprobs"] if "logprobs" in row else [row["logprob"]] for row in log]
            found[task.name] = {"acc": outcome.metrics["acc"].value, "logprobs": each}
        return keep(folder, f"{package}, {rows} rows", found)

    return run


def hf(folder: str, names: str, rows: str) -> Callable[[], int]:
    """lm_eval's own model, transformers in PyTorch."""
    import torch
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    given = {"device": "cpu", "dtype": torch.float32, "batch_size": int(rows)}
    return harness(folder, names, f"hf, batch {rows}", HFLM(pretrained=str(Path(folder) / "model"), **given))


def mlx_lm(folder: str, names: str) -> Callable[[], int]:
    """The class behind mlx_lm.evaluate."""
    from mlxgpt import blas  # noqa: F401  (the same BLAS, before MLX)

    # isort: split
    import mlx.core as mx
    from mlx_lm.evaluate import MLXLM

    mx.set_default_device(mx.Device(mx.cpu))
    return harness(folder, names, "mlx_lm", MLXLM(str(Path(folder) / "model")))


def harness(folder: str, names: str, who: str, model: Any) -> Callable[[], int]:
    """lm_eval with one of its models; no samples of a bootstrap, which would take longer than the model."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=folder, include_defaults=False)
    asked = names.split(",")

    def run() -> int:
        made = lm_eval.simple_evaluate(model=model, tasks=asked, task_manager=manager, bootstrap_iters=0)
        found = {}
        for name in asked:
            rows = sorted(made["samples"][name], key=lambda row: row["doc_id"])
            each = [[float(one[0]) for one in row["filtered_resps"]] for row in rows]
            found[name] = {"acc": made["results"][name]["acc,none"], "logprobs": each}
        return keep(folder, who, found)

    return run


def keep(folder: str, who: str, found: dict[str, dict[str, Any]]) -> int:
    """Writes down what was found; returns the number of questions."""
    (Path(folder) / f"found by {who}.json").write_text(json.dumps(found))
    return sum(len(task["logprobs"]) for task in found.values())


def compared(folder: Path) -> list[str]:
    """The largest difference of a log-probability from hf's with one row at a time, for each contender and task.

    Raises:
        SystemExit: it is over the gate, or an accuracy is another one.
    """
    import numpy as np

    paths = sorted(folder.glob("found by *.json"))
    expected = json.loads((folder / "found by hf, batch 1.json").read_text())
    lines, wrong = [], []
    for path in paths:
        who = path.stem.removeprefix("found by ")
        for name, task in json.loads(path.read_text()).items():
            pairs = zip(task["logprobs"], expected[name]["logprobs"], strict=True)
            gap = max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)
            same = task["acc"] == expected[name]["acc"]
            line = f"{name}: {who}: {gap:.1e} from hf; acc {task['acc']:.4f}{'' if same else ' is another'}"
            lines.append(line)
            if who.split(",")[0] in OURS and (gap > GATE or not same):
                wrong.append(line)
    if wrong:
        raise SystemExit("not what lm_eval's hf model says: " + "; ".join(wrong))
    return lines


def measure(python: str, rounds: int, count: int, size: str, sets: list[str], peers: list[str]) -> list[Row]:
    """Everybody in turn, in processes of their own."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(folder / "model", size)
        write_tasks(folder, count)
        for names in sets:
            rows += raced(python, rounds, folder, names, size, peers)
        for number in ("1", "7"):
            for package in OURS:
                ours(package, str(folder), sets[-1], number)()
        if "hf, batch 1" in peers:
            print("\n".join(compared(folder)), file=sys.stderr)
        if "hf, batch 8" in peers:
            rows += whole(python, folder, max(1, rounds // 2), size)
    return rows


def raced(python: str, rounds: int, folder: Path, names: str, size: str, peers: list[str]) -> list[Row]:
    """Some tasks, in seconds of CPU time, which a busy neighbor disturbs least."""
    given = (str(folder), names)
    sides = {
        "mlxgpt": Contender("mlxgpt", "tasks", "ours", ("mlxgpt", *given)),
        "torch_ref": Contender("torch_ref", "tasks", "ours", ("torch_ref", *given)),
        "hf, batch 1": Contender("hf, batch 1", "tasks", "hf", (*given, "1"), python=python),
        "hf, batch 8": Contender("hf, batch 8", "tasks", "hf", (*given, "8"), python=python),
        "mlx_lm": Contender("mlx_lm", "tasks", "mlx_lm", given, python=python),
    }
    pairs = [("mlxgpt" if peer == "mlx_lm" else "torch_ref", peer) for peer in peers]
    race([sides[name] for name in dict.fromkeys(name for pair in pairs for name in pair)], rounds)
    what = f"{len(NAMES)} tasks" if "," in names else names
    return [
        row(
            f"{'MLX' if ours == 'mlxgpt' else 'torch'}, {what}, {size}",
            "mlx_lm.evaluate" if peer == "mlx_lm" else f"lm_eval {peer}",
            "questions/s of CPU",
            sides[ours],
            sides[peer],
            "worse quartile >= 3" if peer == "mlx_lm" else "",
            "cpu",
        )
        for ours, peer in pairs
    ]


def whole(python: str, folder: Path, rounds: int, size: str) -> list[Row]:
    """Whole commands, start-up included."""
    model, names = str(folder / "model"), ",".join(NAMES)
    task = [word for name in NAMES for word in ("--task", str(folder / f"{name}.yaml"))]
    command = [sys.executable, "-m", "mlxgpt", "eval", "--model", model, "--device", "cpu", *task, "--backend"]
    given = f"pretrained={model},dtype=float32"
    peer = [python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", given, "--tasks", names, "--device", "cpu"]
    peer += ["--include_path", str(folder), "--batch_size", "8"]
    what = f"whole command, four tasks, {size}"
    return [
        commands(f"{name}, {what}", "lm_eval run --model hf, batch 8", [*command, backend], peer, rounds)
        for name, backend in (("MLX", "mlx"), ("torch", "torch"))
    ]


def main() -> None:
    """Prints the table, or with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("MLXGPT_LM_EVAL", ""), help="an interpreter with lm_eval")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument("--size", choices=tuple(SIZES), default="10M")
    parser.add_argument("--sets", nargs="+", default=[*NAMES, ",".join(NAMES)], help="tasks together, with commas")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.python:
        raise SystemExit("--python: expected an interpreter that has lm_eval: see --help")
    finish(measure(args.python, args.rounds, args.questions, args.size, args.sets, args.peers), args.json)


if __name__ == "__main__":
    main()
