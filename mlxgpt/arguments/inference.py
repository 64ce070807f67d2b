"""The arguments of the verbs that run a model."""

import argparse

from mlxgpt.arguments.shared import (
    Once,
    add_adapter,
    add_backend,
    add_drafts,
    add_json,
    add_kv_bits,
    add_model,
    add_sampling,
    add_stop_token,
    add_template_kwargs,
    natural,
    positive,
    positive_number,
)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 65535")
    return int(text)


def chat(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_adapter(parser)
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system prompt; /system changes it")
    add("--template", metavar="FILE", help="a jinja chat template; default: the tokenizer's")
    add_template_kwargs(parser)
    add_stop_token(parser)
    add_sampling(parser, max_tokens=1024)
    add_drafts(parser)
    add_kv_bits(parser)
    add_backend(parser)


def generate(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_adapter(parser)
    add = parser.add_argument
    add("-p", "--prompt", action="append", default=[], metavar="TEXT", help="the prompt; repeat it for a batch")
    add(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file that holds one prompt, - for stdin; repeatable",
    )
    add("--prompt-ids", action="append", default=[], metavar="IDS",
        help="a prompt in token ids, such as 1,2,3, taken as it is; repeatable")  # fmt: skip
    add("--raw", action="store_true", help="continue the text itself, also where the model has a chat template")
    add("--system", metavar="TEXT", help="the system prompt, for a model that has a chat template")
    add_template_kwargs(parser)
    add_sampling(parser)
    add("--logit-bias", default="{}", metavar="JSON",
        help="""what is added to the logits of tokens, by id, such as '{"42": -100}'""")  # fmt: skip
    add("--json-schema", metavar="FILE", help="a file with a JSON Schema, which the answers follow")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    add_stop_token(parser)
    add_drafts(parser)
    add("--logprobs", type=natural, metavar="N",
        help="with --json: the log-probability of each token, and the N likeliest tokens with theirs")  # fmt: skip
    add_kv_bits(parser)
    add_json(parser)
    add_backend(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add("--name", help="what requests call the model; default: its folder's name, or the hub's id")
    add("--adapter", action="append", default=[], metavar="NAME=DIR[:WEIGHT]",
        help="serve the model with this adapter, too, under this name; with several: NAME=DIR:0.5+DIR:0.5; "
        "repeatable")  # fmt: skip
    add("--force", action="store_true", help="apply an adapter that was trained on other base weights")
    add("--host", default="127.0.0.1", help="address to listen on; another than this machine's own needs a key")
    add("--port", type=_port, default=8000, help="default: 8000; 0: any that is free")
    add("--api-key-file", metavar="FILE", help="a file of keys, a line each; requests must give one of them")
    add("--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="a page that may ask from a browser, such as https://chat.example.com; repeatable")  # fmt: skip
    add("--max-batch", type=positive, default=16, metavar="N", help="answers that are written at once; default: 16")
    add("--max-queue", type=positive, default=64, metavar="N",
        help="requests that may wait for their turn; default: 64")  # fmt: skip
    add_drafts(parser)
    add("--max-body", default="4MiB", metavar="SIZE", help="what a request may have; default: 4MiB")
    add("--cache-bytes", metavar="SIZE",
        help="memory for prompts, so that a later request that begins alike starts sooner, such as 2GiB; 0: none; "
        "default: a fourth of what is free, at most 4GiB")  # fmt: skip
    add_kv_bits(parser)
    add("--grace", type=positive_number, default=30.0, metavar="SECONDS",
        help="how long answers may still run when the server is told to end; default: 30")  # fmt: skip
    add("--template", metavar="FILE", help="a jinja chat template; default: the tokenizer's")
    add_template_kwargs(parser)
    add_stop_token(parser)
    add_backend(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_adapter(parser)
    add = parser.add_argument
    add("-d", "--data", action=Once, metavar="PATH",
        help="a text or .jsonl file, shards, a flat .bin, or fine-tuning examples; "
        "with --task NAME: its files")  # fmt: skip
    add("--task", action="append", default=[], metavar="TASK",
        help="a .jsonl of questions, a YAML of lm-evaluation-harness, or a published task, such as hellaswag; "
        "repeatable")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="with --task or --prompts: the first N")
    add("--shots", type=natural, metavar="N", help="with --task: examples before each question; default: the task's")
    add("--log", action=Once, metavar="FILE", help="with --task: a new .jsonl, the outcome of each question")
    add("--max-tokens", type=positive, metavar="N",
        help="with --task or --prompts: tokens that an answer may have; default: the task's, 128")  # fmt: skip
    add("--against", action=Once, metavar="MODEL",
        help="with --task or --prompts: another model, or the --log of one, to compare with")  # fmt: skip
    add("--run-code", action="store_true",
        help="run programs that the model writes for tasks such as humaneval, each in a process without network, "
        "with little time and memory and a folder of its own")  # fmt: skip
    add("--draws", type=positive, metavar="N",
        help="with --run-code: programs a question, at temperature 0.8; --prompts: answers; default: 1")  # fmt: skip
    add("--prompts", action=Once, metavar="FILE",
        help="prompts whose answers --reward judges; --against MODEL: how often they beat its own")  # fmt: skip
    add("--reward", action="append", default=[], metavar="REWARD",
        help="with --prompts: FILE.py, a reward model, exact, regex, length:N or tests; repeatable")  # fmt: skip
    add("--bos", choices=["auto", "yes", "no"],
        help="with --task: whether rows begin with BOS; default: auto, as the tokenizer does")  # fmt: skip
    add("--chat", action="store_true", help="with --task: questions in the model's chat template")
    add("--text-key", metavar="KEY", help="with --data: key or column that holds the text; default: text")
    add("--split", choices=["train", "val", "test"],
        help="with --data: split of shards or of a folder of examples; default: val")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="with --data: how examples are read, such as tune.prompt_key=question; repeatable")  # fmt: skip
    add(
        "--stride",
        type=positive,
        metavar="N",
        help="with --data: tokens scored in each window after the first; default: the whole context",
    )
    add_kv_bits(parser)
    add_json(parser)
    add_backend(parser)


def classify(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_adapter(parser)
    add = parser.add_argument
    add("-t", "--text", action="append", default=[], metavar="TEXT", help="a text to classify; repeatable")
    add("-f", "--file", metavar="FILE", help="texts: .txt (one a line), .jsonl, .json, .csv, .tsv, .parquet;"
        " if they have labels, accuracy and F1 are printed")  # fmt: skip
    add("--text-key", default="text", metavar="KEY", help="key or column of the text; default: text")
    add("--label-key", default="label", metavar="KEY", help="key or column of the label; default: label")
    add_json(parser)
    add_backend(parser)


def score(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_adapter(parser)
    add = parser.add_argument
    add("-t", "--text", action="append", default=[], metavar="TEXT", help="a text to score; repeatable")
    add("-d", "--data", metavar="FILE", help="texts (.txt, one a line), or rows (.jsonl .json .csv .tsv .parquet) of "
        "text, messages, prompt and completion, or chosen and rejected, of which accuracy is printed")  # fmt: skip
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE",
        help="how rows are read, such as tune.prompt_key=question; repeatable")  # fmt: skip
    add_json(parser)
    add_backend(parser)
