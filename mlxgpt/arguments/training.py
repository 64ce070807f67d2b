"""The arguments of the verbs that train, and of plan."""

import argparse

from mlxgpt.arguments.shared import Once, add_backend, add_json, positive, positive_number

_SIZES = ("1m", "10m", "30m", "124m")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-n", "--steps", type=positive, metavar="N", help="length of the run and of its learning-rate schedule")
    add("--epochs", type=positive_number, metavar="X", help="the same in passes over the training data")
    add("--lr", type=positive_number, metavar="X", help="peak learning rate; the last one keeps its ratio to it")
    add("--batch-size", type=positive, metavar="N", help="sequences in an update")


def train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, or a .toml file; default: pydocs")
    add("-d", "--data", nargs="+", action="extend", metavar="PATH",
        help="a folder of texts, files, or what data prepare made; without RECIPE a recipe is made for it")  # fmt: skip
    add("--size", type=str.lower, choices=_SIZES, help="with --data: the model, by its parameters; default: 1m")
    add("-o", "--out", metavar="DIR", help="the run folder to make; default: runs/DATA or runs/RECIPE")
    _add_training(parser)
    add("--stop-after", type=positive, metavar="N", help="save at step N and exit; --resume continues from there")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--resume", metavar="RUN", help="resume a run from its newest checkpoint, whichever framework wrote it")
    add("--init-from", metavar="DIR", help="start from the weights of a run, a checkpoint, a model folder or a hub id")
    add(
        "--moments",
        action="store_true",
        help="with --init-from: also take its optimizer state, and start after its step",
    )
    add("--force", action="store_true", help="start even if the plan predicts too little memory")
    add_backend(parser)


def plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, or a .toml file; default: pydocs")
    add(
        "-m", "--model", metavar="DIR", help="instead: full training of a run, a checkpoint, a model folder or a hub id"
    )
    add("-d", "--data", action=Once, metavar="PATH", help="with --model: plan fine-tuning on this data")
    add("--method", choices=["lora", "dora", "full"], help="fine-tuning method; default with --data: lora")
    add("-n", "--steps", type=positive, metavar="N", help="length of the learning-rate schedule")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--chip", metavar="NAME", help="plan for this chip, such as m3-max or h100, and its memory")
    add(
        "--calibrate",
        action="store_true",
        help="time a few real steps on this machine and estimate the hours from them",
    )
    add("--measure", action="store_true", help="memory: run a few real steps of the true size, in a process of its own")
    add("--price", type=positive_number, metavar="X", help="price of an hour")
    add("--budget", metavar="MONEY", help="the reverse: the best model for '100 USD', with --price")
    add("--hours", type=positive_number, metavar="H", help="the same for a number of hours")
    add("--memory", metavar="SIZE", help="the same for a memory size such as 16GB; with --budget or --hours: the limit")
    add("-o", "--out", metavar="FILE.toml", help="write the recipe that was chosen")
    add("--plot", metavar="FILE", help="plot memory by component and loss against compute: .png or .svg")
    add_json(parser)
    add_backend(parser)


def rl(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", metavar="DIR", help="the model to train: a run, a checkpoint, a model folder or a hub id")
    add("--prompts", action=Once, metavar="FILE",
        help="rows with prompt (a text or messages), and what rewards read, such as answer")  # fmt: skip
    add("--reward", action="append", metavar="REWARD",
        help="FILE.py[:FUNCTION], a reward model's folder, exact, regex, length:N or tests; repeatable")  # fmt: skip
    add("--method", choices=["grpo", "dr_grpo", "dapo", "rloo", "best-of-n"],
        help="how it learns, default: grpo; or write the best completion of each prompt into a file")  # fmt: skip
    add("-o", "--out", metavar="PATH", help="the run folder to make, default: runs/PROMPTS-METHOD; or the file")
    add("-n", "--steps", type=positive, metavar="N", help="updates; default: 200")
    add("--lr", type=positive_number, metavar="X", help="learning rate; default: 1e-5, of all weights 1e-6")
    add("--adapter", metavar="DIR", help="continue training this adapter: a run, PEFT or mlx-lm")
    add("--config", metavar="FILE", help="settings: .toml")
    add("--replay", metavar="RUN", help="train on the completions and rewards of this run, or of its rollouts.jsonl")
    add("--check", action="store_true", help="with --replay: draw as well, and say where the first token differs")
    add("--run-code", action="store_true", help="allow --reward tests to run what the model writes")
    add("--stop-after", type=positive, metavar="N", help="save at step N and exit; --resume continues from there")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--resume", metavar="RUN", help="resume a run from its newest checkpoint, whichever framework wrote it")
    add(
        "--force",
        action="store_true",
        help="start even if memory is too small, or --adapter was trained on other weights",
    )
    add_backend(parser)


def finetune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", metavar="DIR", help="the model to fine-tune: a run, a checkpoint, a model folder or a hub id")
    add("-d", "--data", action=Once, metavar="PATH",
        help="pydocs-qa, a folder with train.jsonl, or a .jsonl .json .csv .parquet")  # fmt: skip
    add("-o", "--out", metavar="DIR", help="the run folder to make; default: runs/DATA-METHOD")
    add("--method", choices=["lora", "dora", "full"], help="train low-rank adapters or all weights; default: lora")
    add("--rank", type=positive, metavar="N", help="rank of the adapter; default: 8")
    add("--config", metavar="FILE", help="settings: .toml, or a .yaml for mlx_lm.lora, unchanged")
    _add_training(parser)
    add("--adapter", metavar="DIR", help="continue training this adapter: a run, PEFT or mlx-lm")
    add("--train-on-prompt", action="store_true", help="compute the loss on every token, not only the assistant's")
    add("--task", choices=["lm", "classify", "prefer", "reward"],
        help="generate answers, classify texts, prefer the better of two, or score answers; default: lm")  # fmt: skip
    add("--stop-after", type=positive, metavar="N", help="save at step N and exit; --resume continues from there")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--resume", metavar="RUN", help="resume a run from its newest checkpoint, whichever framework wrote it")
    add(
        "--force",
        action="store_true",
        help="start even if memory is too small, or --adapter was trained on other weights",
    )
    add_backend(parser)
