"""The arguments of every verb, one function each; verbs.py says which verb uses which."""

import argparse
import re
from typing import Any


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive whole number")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 65535")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or a positive whole number")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return number


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=["mlx", "torch"], help="framework; default: MLX where it runs, else torch")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, gpu, mps, cuda or cuda:N; default: $MLXGPT_DEVICE or auto"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, metavar="DIR",
        help="a run (its best, else its last checkpoint), a checkpoint, a model folder or a hub id")  # fmt: skip


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR[:WEIGHT]",
        help="an adapter (a run, PEFT or mlx-lm) and the weight of its update, default 1; repeatable")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="apply an adapter that was trained on other base weights")


def _add_template_kwargs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--template-kwargs", metavar="JSON",
        help="""values that the chat template reads, such as '{"enable_thinking": false}'""")  # fmt: skip


def _add_source(parser: argparse.ArgumentParser, also: str = "") -> None:
    text = f"pydocs, or a .txt, .md, .jsonl or .parquet file, or a folder of them{also}"
    parser.add_argument("source", metavar="SOURCE", help=text)
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key or column that holds the text; default: text"
    )


_SIZES = ("1m", "10m", "30m", "124m")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-n", "--steps", type=_positive, metavar="N", help="length of the run and of its learning-rate schedule")
    add("--epochs", type=_positive_number, metavar="X", help="the same in passes over the training data")
    add("--lr", type=_positive_number, metavar="X", help="peak learning rate; the last one keeps its ratio to it")
    add("--batch-size", type=_positive, metavar="N", help="sequences in an update")


class _Once(argparse.Action):
    """Given twice, a flag is an error: argparse would take the last one and say nothing."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if (first := getattr(namespace, self.dest)) is not None:
            raise argparse.ArgumentError(self, f"{first} and {values}: expected one")
        setattr(namespace, self.dest, values)


def train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, or a .toml file; default: pydocs")
    add("-d", "--data", nargs="+", action="extend", metavar="PATH",
        help="a folder of texts, files, or what data prepare made; without RECIPE a recipe is made for it")  # fmt: skip
    add("--size", type=str.lower, choices=_SIZES, help="with --data: the model, by its parameters; default: 1m")
    add("-o", "--out", metavar="DIR", help="the run folder to make; default: runs/DATA or runs/RECIPE")
    _add_training(parser)
    add("--stop-after", type=_positive, metavar="N", help="save at step N and exit; --resume continues from there")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--resume", metavar="RUN", help="resume a run from its newest checkpoint, whichever framework wrote it")
    add("--init-from", metavar="DIR", help="start from the weights of a run, a checkpoint, a model folder or a hub id")
    add(
        "--moments",
        action="store_true",
        help="with --init-from: also take its optimizer state, and start after its step",
    )
    add("--force", action="store_true", help="start even if the plan predicts too little memory")
    _add_backend(parser)


def plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, or a .toml file; default: pydocs")
    add(
        "-m", "--model", metavar="DIR", help="instead: full training of a run, a checkpoint, a model folder or a hub id"
    )
    add("-d", "--data", action=_Once, metavar="PATH", help="with --model: plan fine-tuning on this data")
    add("--method", choices=["lora", "dora", "full"], help="fine-tuning method; default with --data: lora")
    add("-n", "--steps", type=_positive, metavar="N", help="length of the learning-rate schedule")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--chip", metavar="NAME", help="plan for this chip, such as m3-max or h100, and its memory")
    add(
        "--calibrate",
        action="store_true",
        help="time a few real steps on this machine and estimate the hours from them",
    )
    add("--measure", action="store_true", help="memory: run a few real steps of the true size, in a process of its own")
    add("--price", type=_positive_number, metavar="X", help="price of an hour")
    add("--budget", metavar="MONEY", help="the reverse: the best model for '100 USD', with --price")
    add("--hours", type=_positive_number, metavar="H", help="the same for a number of hours")
    add("--memory", metavar="SIZE", help="the same for a memory size such as 16GB; with --budget or --hours: the limit")
    add("-o", "--out", metavar="FILE.toml", help="write the recipe that was chosen")
    add("--plot", metavar="FILE", help="plot memory by component and loss against compute: .png or .svg")
    _add_json(parser)
    _add_backend(parser)


def finetune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", metavar="DIR", help="the model to fine-tune: a run, a checkpoint, a model folder or a hub id")
    add("-d", "--data", action=_Once, metavar="PATH",
        help="pydocs-qa, a folder with train.jsonl, or a .jsonl .json .csv .parquet")  # fmt: skip
    add("-o", "--out", metavar="DIR", help="the run folder to make; default: runs/DATA-METHOD")
    add("--method", choices=["lora", "dora", "full"], help="train low-rank adapters or all weights; default: lora")
    add("--rank", type=_positive, metavar="N", help="rank of the adapter; default: 8")
    add("--config", metavar="FILE", help="settings: .toml, or a .yaml for mlx_lm.lora, unchanged")
    _add_training(parser)
    add("--adapter", metavar="DIR", help="continue training this adapter: a run, PEFT or mlx-lm")
    add("--train-on-prompt", action="store_true", help="compute the loss on every token, not only the assistant's")
    add("--task", choices=["lm", "classify"], help="generate answers, or classify texts; default: lm")
    add("--stop-after", type=_positive, metavar="N", help="save at step N and exit; --resume continues from there")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--resume", metavar="RUN", help="resume a run from its newest checkpoint, whichever framework wrote it")
    add(
        "--force",
        action="store_true",
        help="start even if memory is too small, or --adapter was trained on other weights",
    )
    _add_backend(parser)


def _add_sampling(parser: argparse.ArgumentParser, **defaults: int) -> None:
    import dataclasses

    from mlxgpt.common.config import SampleConfig

    for field in dataclasses.fields(SampleConfig):
        if field.name != "prompt":
            flags = ["-n"] * (field.name == "max_tokens") + [f"--{field.name.replace('_', '-')}"]
            default = defaults.get(field.name, field.default)
            text = f"{field.metadata['help']}; default: {default}"
            parser.add_argument(*flags, type=type(field.default), default=default, metavar="X", help=text)


def _add_stop_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stop-token", action="append", default=[], metavar="TOKEN",
        help="a token that ends a text besides the model's own, by its text or its id; repeatable")  # fmt: skip


def chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system prompt; /system changes it")
    add("--template", metavar="FILE", help="a jinja chat template; default: the tokenizer's")
    _add_template_kwargs(parser)
    _add_stop_token(parser)
    _add_sampling(parser, max_tokens=1024)
    _add_backend(parser)


def generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
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
    _add_template_kwargs(parser)
    _add_sampling(parser)
    add("--logit-bias", default="{}", metavar="JSON",
        help="""what is added to the logits of tokens, by id, such as '{"42": -100}'""")  # fmt: skip
    add("--json-schema", metavar="FILE", help="a file with a JSON Schema, which the answers follow")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    _add_stop_token(parser)
    add("--logprobs", type=_natural, metavar="N",
        help="with --json: the log-probability of each token, and the N likeliest tokens with theirs")  # fmt: skip
    _add_json(parser)
    _add_backend(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
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
    add("--max-batch", type=_positive, default=16, metavar="N", help="answers that are written at once; default: 16")
    add("--max-queue", type=_positive, default=64, metavar="N",
        help="requests that may wait for their turn; default: 64")  # fmt: skip
    add("--max-body", default="4MiB", metavar="SIZE", help="what a request may have; default: 4MiB")
    add("--cache-bytes", metavar="SIZE",
        help="memory for prompts, so that a later request that begins alike starts sooner, such as 2GiB; 0: none; "
        "default: a fourth of what is free, at most 4GiB")  # fmt: skip
    add("--grace", type=_positive_number, default=30.0, metavar="SECONDS",
        help="how long answers may still run when the server is told to end; default: 30")  # fmt: skip
    add("--template", metavar="FILE", help="a jinja chat template; default: the tokenizer's")
    _add_template_kwargs(parser)
    _add_stop_token(parser)
    _add_backend(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("-d", "--data", action=_Once, required=True, metavar="PATH",
        help="a text or .jsonl file, shards, a flat .bin, or fine-tuning examples")  # fmt: skip
    add("--text-key", default="text", metavar="KEY", help="key or column that holds the text; default: text")
    add(
        "--split",
        choices=["train", "val", "test"],
        default="val",
        help="split of shards or of a folder of examples; default: val",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="how examples are read, such as tune.prompt_key=question; repeatable")  # fmt: skip
    add(
        "--stride",
        type=_positive,
        metavar="N",
        help="tokens scored in each window after the first; default: the whole context",
    )
    _add_json(parser)
    _add_backend(parser)


def classify(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("-t", "--text", action="append", default=[], metavar="TEXT", help="a text to classify; repeatable")
    add("-f", "--file", metavar="FILE", help="texts: .txt (one a line), .jsonl, .json, .csv, .tsv, .parquet;"
        " if they have labels, accuracy and F1 are printed")  # fmt: skip
    add("--text-key", default="text", metavar="KEY", help="key or column of the text; default: text")
    add("--label-key", default="label", metavar="KEY", help="key or column of the label; default: label")
    _add_json(parser)
    _add_backend(parser)


def data_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the corpus, such as tinyshakespeare")
    parser.add_argument("--from", dest="from_file", metavar="FILE", help="use this copy if its checksum matches")
    parser.add_argument("-o", "--out", metavar="DIR", help="folder to write to; default: the cache folder")


def data_inspect(parser: argparse.ArgumentParser) -> None:
    _add_source(parser, ", or a folder of shards")
    parser.add_argument("--tokenizer", metavar="PATH",
        help="count tokens with this .json, .model, folder or run; default: train one on the source")  # fmt: skip
    add = parser.add_argument
    add(
        "-m",
        "--model",
        metavar="DIR",
        help="show examples as fine-tuning this model sees them: what is trained, what is truncated",
    )
    add("--rows", type=_positive, metavar="N", help="with --model: examples to show; default: 3")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="with --model: such as tune.block_size=512")
    _add_json(parser)


def data_prepare(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="DIR", help="the folder of shards to write")
    add(
        "--tokenizer",
        default="bpe",
        metavar="T",
        help="char, bpe, sp-bpe, sp-unigram, bytes, gpt2 ..., or a path; default: bpe",
    )
    add(
        "--vocab-size",
        type=_positive,
        default=2048,
        metavar="N",
        help="size of a tokenizer trained here; default: 2048",
    )
    add("--val-fraction", type=float, default=0.1, metavar="X", help="share of documents for validation; default: 0.1")
    add("--workers", type=_positive, metavar="N", help="processes; default: one per core")


def data_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run whose shards are packed")
    parser.add_argument("-o", "--out", required=True, metavar="FILE.tar",
        help="the archive to write; elsewhere: tar -xf FILE.tar -C RUN, then train --resume RUN")  # fmt: skip


def tokenizer_train(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="DIR", help="the tokenizer folder to write; transformers loads it")
    add("--kind", choices=["char", "bpe", "sp-bpe", "sp-unigram"], default="bpe", help="default: bpe (byte-level)")
    add("--vocab-size", type=_positive, default=2048, metavar="N", help="default: 2048; char ignores it")


def tokenizer_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="a file or folder of one, a name (bytes, gpt2, cl100k_base ...), or a run"
    )
    parser.add_argument("--text", metavar="TEXT", help="show the tokens of this text")
    _add_json(parser)


def keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD",
        help="only keys with all of these in name, meaning, or what nanoGPT, mlx-lm and others call them")  # fmt: skip
    _add_json(parser)


def completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="the shell that will read it")


def runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", default="runs", metavar="DIR", help="folder that holds the runs; default: runs"
    )
    _add_json(parser)


def runs_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run to check")
    _add_json(parser)


def diagnose(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="the run to look at; it may be training")
    add("--quick", action="store_true", help="from the run's folder alone: without counting its corpus")
    _add_json(parser)


def report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="runs to overlay; the others are compared with the first")
    add("-o", "--out", metavar="FILE", help="the page to write; default: RUN.html")
    add("--export", metavar="DIR", help="also write the figures as PNG and the curves as CSV there")
    add("--watch", action="store_true", help="serve the page on this machine and update it as the runs progress")
    add("--port", type=int, default=8765, metavar="N", help="port for --watch; 0 = any free one; default: 8765")


_FORMATS = ("hf", "mlx-lm", "nanogpt", "mingpt", "gptmodel", "llama2c", "gguf", "npz", "peft")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)(|KB|MB|GB)", text, re.IGNORECASE)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500MB or 5GB")
    return int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2].upper()]


def convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="a model or adapter folder, a run, a weights file or a hub id; the format is detected",
    )
    add("dst", metavar="DST", help="the folder or file to write")
    add("--to", choices=_FORMATS,
        help="default: by the suffix of DST (.gguf .bin .pt .pth .npz), else hf; adapters: both layouts")  # fmt: skip
    add(
        "--tokenizer",
        metavar="PATH",
        help="use this file, folder or name (bytes, gpt2 ...) instead of the source's tokenizer",
    )
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="dtype of the weights; default: unchanged")
    add("--bits", type=int, choices=[4, 8], help="quantize the matrices (mlx-lm; gguf: 4 is q4_0, 8 is q8_0)")
    add(
        "--gguf-type",
        choices=["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"],
        help="quantize the matrices as this type of GGUF",
    )
    add("--group-size", type=int, choices=[32, 64, 128], help="inputs that share a scale (mlx-lm); default: 64")
    add("--max-shard", type=_bytes, metavar="SIZE", help="maximum size of a weights file (hf, mlx-lm); default: 5GB")
    add("--version", type=int, choices=[0, 1], help="version of the llama2c format; default: 0")
    add(
        "--n-head",
        type=_positive,
        metavar="N",
        help="attention heads, if the file does not record them (mingpt, gptmodel)",
    )
    add(
        "--model",
        metavar="DIR",
        help="for an adapter: its base model, or the config.json of it; default: the one it names",
    )
    add(
        "--map",
        metavar="MAP.toml",
        help="write an adopted model as your own code's file again (.pt .pth .safetensors .npz); see mlxgpt adopt",
    )
    _add_config(parser)
    add("--no-hash", action="store_true", help="do not record sha256 of source and result in the provenance")
    add("--allow-nan", action="store_true", help="convert even if values are not finite, and report how many")
    add("--verify", action="store_true", help="compare the result with the source, and keep it only if they agree")
    add("--force", action="store_true", help="replace DST once the new one is complete")
    _add_json(parser)


def adopt(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help="a state dict: .pt .pth .bin .safetensors .npz, or the folder of one")
    add("-o", "--out", metavar="DIR", help="the model folder to write; without it nothing is written")
    add("--like", metavar="SAMPLE.npz", help="evidence: ids, your model's logits for them, perhaps its hidden states")
    add("--module", metavar="FILE.py:CLASS", help="evidence: runs your own code, in a process of its own, for a sample")
    add("--kwargs", metavar="JSON", help="what --module's class is called with")
    add("--map", metavar="MAP.toml", help="this map in place of what names and shapes say")
    add("--set", dest="choices", action="append", default=[], metavar="KEY=VALUE",
        help="a choice that you know, such as n_head=4 or activation=relu; repeatable")  # fmt: skip
    add("--unproved", action="store_true", help="write without evidence; the folder says so")
    add("--tolerance", type=_positive_number, metavar="X",
        help="how far off logits may be, of the largest; default: 1e-5, more for half precision")  # fmt: skip
    add("--tokenizer", metavar="PATH", help="a tokenizer for the folder, in place of what lies beside FILE")
    add("--backend", choices=["mlx", "torch"], help="what runs the candidates; default: MLX where it runs, else torch")
    add("--force", action="store_true", help="replace DIR once the new one is complete")
    _add_json(parser)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the config.json (or Meta's params.json) of weights that have none beside them (pytorch)",
    )


def fuse(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="DIR", help="the model folder to write")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="dtype of the weights; default: that of the base")
    add("--dequantize", action="store_true", help="dequantize a quantized base, which otherwise stays quantized")
    _add_json(parser)


def verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name in ("a", "b"):
        add(name, metavar=name.upper(),
            help="anything convert reads; transformers:DIR or mlx-lm:DIR: as that library computes it;"
            " module:FILE.py:CLASS[@CKPT]: as your own code does, which is executed")  # fmt: skip
    add("--html", metavar="FILE", help="also write the report as one HTML page")
    add("--weights-only", action="store_true", help="compare tensors, config and tokenizer only; run neither model")
    add("--rungs", metavar="LIST",
        help="some of tensors,config,tokenizer,logits,activations,gradients,greedy; default: all")  # fmt: skip
    add("--frameworks", metavar="LIST", help="mlx, torch or both; default: those installed")
    add("-d", "--data", metavar="FILE", help="text to compute logits on; default: docstrings of the standard library")
    add(
        "--n-head",
        type=_positive,
        metavar="N",
        help="attention heads, if the file does not record them (mingpt, gptmodel)",
    )
    _add_config(parser)
    add("--kwargs", metavar="JSON", help="what module:'s class is called with")
    _add_json(parser)


def probe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", nargs="+", metavar="FOLDER", help="a model folder, a run or a checkpoint")
    add("--tokens", required=True, metavar="FILE", help="token ids, a .npy of one dimension; each predicts the next")
    add("-o", "--out", required=True, metavar="DIR", help="folder for 0.npz, 1.npz ..., one per FOLDER")
    add(
        "--scale", type=float, action="append", metavar="X", help="factor on the matrices; repeatable; default: 1 and 8"
    )
    add("--greedy", type=int, default=0, metavar="N", help="tokens to generate greedily; default: 0")
    add("--prompt", type=_positive, default=1, metavar="N", help="number of tokens that form the prompt; default: 1")
    add("--no-gradients", dest="gradients", action="store_false", help="logits and activations only")
    add("--exact", action="store_true", help="also compute the first FOLDER in float64, as 0.exact.npz (torch)")
    _add_backend(parser)


def inspect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL",
        help="a run (its best, else its last checkpoint), a checkpoint, a model folder or a hub id")  # fmt: skip
    add("-t", "--text", metavar="TEXT", help="the text to look at")
    add("-f", "--text-file", metavar="FILE", help="a file that holds it, - for stdin")
    add("--ids", metavar="IDS", help="token ids instead, such as 1,2,3, taken as they are")
    add("--chat", action="store_true", help="the text as a question in the model's chat template; default: as it is")
    _add_adapter(parser)
    add(
        "--limit",
        type=_positive,
        metavar="N",
        help="tokens shown, from the start; default: 256, or the model's context",
    )
    add("--top", type=_positive, default=8, metavar="N", help="candidates and neighbors of each token; default: 8")
    add(
        "--layers", metavar="LIST", help="layers whose attention is kept, such as 0,4-7, or none; default: all that fit"
    )
    add("-o", "--out", metavar="FILE", help="the page to write; default: MODEL-inspect.html, with --json none")
    _add_json(parser)
    _add_backend(parser)


def doctor(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help="the parity ladder alone, on the smallest models")
    add("--backend", dest="framework", choices=["mlx", "torch"], help="one framework; default: both, if installed")
    add("--device", default="auto", help="what is held against the CPU: auto, gpu, mps, cuda or cuda:N; default: auto")
    add("-o", "--out", metavar="FILE", help="also write what is printed to FILE")
    _add_json(parser)


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", default="runs/demo", metavar="DIR",
        help="folder for its runs, replacing those of an earlier demo; default: runs/demo")  # fmt: skip
