"""Every verb: what it is for, the function that runs it, its arguments and examples of use."""

import argparse
import re
from collections.abc import Callable
from typing import NamedTuple


class Verb(NamedTuple):
    """A command: what it is for, the module:function that does it, what declares its arguments, examples of use."""

    help: str
    function: str
    declare: Callable[[argparse.ArgumentParser], None]
    examples: tuple[str, ...]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive whole number")
    return int(text)


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=["mlx", "torch"], help="framework; default: MLX where it runs, else torch")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu, mps, cuda or cuda:N; default: auto")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, metavar="DIR",
        help="a run (its best, else its last checkpoint), a checkpoint, a model folder or a hub id")  # fmt: skip


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR[:WEIGHT]",
        help="an adapter of a run, PEFT or mlx-lm, and by what its change is multiplied; repeatable")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="although it was trained on a model of other weights")


def _add_source(parser: argparse.ArgumentParser, also: str = "") -> None:
    text = f"pydocs, or a .txt, .md, .jsonl or .parquet file, or a folder of them{also}"
    parser.add_argument("source", metavar="SOURCE", help=text)
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of a document; default: text")


def _train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, or a .toml file; default: pydocs")
    add("-o", "--out", metavar="DIR", help="the run folder to make; default: runs/RECIPE")
    add("-n", "--steps", type=_positive, metavar="N", help="length of the run and of its schedule")
    add("--stop-after", type=_positive, metavar="N", help="save at step N and leave; --resume goes on from there")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--resume", metavar="RUN", help="go on with a run from its newest checkpoint, whichever framework wrote it")
    add("--init-from", metavar="DIR", help="start from the weights of a run, a checkpoint, a model folder or a hub id")
    add("--moments", action="store_true", help="with --init-from: go on with its optimizer's state, after its step")
    add("--force", action="store_true", help="start although the plan says that memory will not do")
    _add_backend(parser)


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return number


def _plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name, or a .toml file; default: pydocs")
    add("-m", "--model", metavar="DIR", help="instead: a run, a checkpoint, a model folder or a hub id, trained whole")
    add("-d", "--data", metavar="PATH", help="with --model: plan its fine-tuning on this")
    add("--method", choices=["lora", "dora", "full"], help="of fine-tuning; default with --data: lora")
    add("-n", "--steps", type=_positive, metavar="N", help="length of the schedule")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--chip", metavar="NAME", help="plan for this chip, such as m3-max or h100, and its memory")
    add("--calibrate", action="store_true", help="time some real steps here, seconds, and say the hours from them")
    add("--price", type=_positive_number, metavar="X", help="what an hour costs")
    add("--budget", metavar="MONEY", help="the other way round: the best model for '100 USD', with --price")
    add("--hours", type=_positive_number, metavar="H", help="the same for so many hours")
    add("--memory", metavar="SIZE", help="the same for a machine of 16GB; with --budget or --hours: at most this")
    add("-o", "--out", metavar="FILE.toml", help="write the recipe that was found")
    add("--plot", metavar="FILE", help="draw memory by component and loss against compute: .png or .svg")
    _add_json(parser)
    _add_backend(parser)


def _finetune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", metavar="DIR", help="what to tune: a run, a checkpoint, a model folder or a hub id")
    add("-d", "--data", metavar="PATH", help="pydocs-qa, a folder with train.jsonl, or a .jsonl .json .csv .parquet")
    add("-o", "--out", metavar="DIR", help="the run folder to make; default: runs/MODEL-METHOD")
    add("--method", choices=["lora", "dora", "full"], help="what trains: an update of low rank, or all; default: lora")
    add("--config", metavar="FILE", help="settings: .toml, or a .yaml of mlx_lm.lora as it is")
    add("-n", "--steps", type=_positive, metavar="N", help="length of the run and of its schedule")
    add("--epochs", type=float, metavar="X", help="the same in passes over the rows; default: 3")
    add("--adapter", metavar="DIR", help="train on this adapter: of a run, PEFT or mlx-lm")
    add("--train-on-prompt", action="store_true", help="loss on every token, not only on the assistant's")
    add("--task", choices=["lm", "classify"], help="answers, or labels; default: lm")
    add("--stop-after", type=_positive, metavar="N", help="save at step N and leave; --resume goes on from there")
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="set section.key; repeatable")
    add("--resume", metavar="RUN", help="go on with a run from its newest checkpoint, whichever framework wrote it")
    add("--force", action="store_true", help="although memory will not do, or --adapter was trained on other weights")
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


def _chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system prompt; /system changes it")
    add("--template", metavar="FILE", help="a jinja chat template; default: the tokenizer's")
    _add_sampling(parser, max_tokens=1024)
    _add_backend(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("-p", "--prompt", action="append", default=[], metavar="TEXT", help="repeat it for a batch")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="a prompt a file, - for stdin; repeatable")
    _add_sampling(parser)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    _add_json(parser)
    _add_backend(parser)


def _eval(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("-d", "--data", required=True, metavar="PATH",
        help="a text or .jsonl file, shards, a flat .bin, or rows of fine-tuning")  # fmt: skip
    add("--text-key", default="text", metavar="KEY", help="key or column of a document; default: text")
    add("--split", choices=["train", "val", "test"], default="val", help="of shards or a folder of rows; default: val")
    add("--stride", type=_positive, metavar="N", help="targets a window after the first; default: the whole context")
    _add_json(parser)
    _add_backend(parser)


def _classify(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("-t", "--text", action="append", default=[], metavar="TEXT", help="a text to classify; repeatable")
    add("-f", "--file", metavar="FILE", help="rows of text: .txt (a line each), .jsonl, .json, .csv, .tsv, .parquet;"
        " where they have labels, how well they are told is printed")  # fmt: skip
    add("--text-key", default="text", metavar="KEY", help="key or column of the text; default: text")
    add("--label-key", default="label", metavar="KEY", help="key or column of the label; default: label")
    _add_json(parser)
    _add_backend(parser)


def _data_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the corpus, such as tinyshakespeare")
    parser.add_argument("--from", dest="from_file", metavar="FILE", help="take this copy, if its checksum is right")
    parser.add_argument("-o", "--out", metavar="DIR", help="where to put it; default: the cache folder")


def _data_inspect(parser: argparse.ArgumentParser) -> None:
    _add_source(parser, ", or a folder of shards")
    parser.add_argument("--tokenizer", metavar="PATH",
        help="count tokens with this .json, .model, folder or run; default: one trained on the source")  # fmt: skip
    add = parser.add_argument
    add(
        "-m",
        "--model",
        metavar="DIR",
        help="show rows as fine-tuning this model sees them: what is trained, what is cut",
    )
    add("--rows", type=_positive, metavar="N", help="with --model: rows to show; default: 3")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="with --model: such as tune.block_size=512")
    _add_json(parser)


def _data_prepare(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="DIR", help="the folder of shards to make")
    add("--tokenizer", default="bpe", metavar="T", help="char, bpe, sp-bpe, sp-unigram, or a path; default: bpe")
    add("--vocab-size", type=_positive, default=2048, metavar="N", help="of a tokenizer trained here; default: 2048")
    add("--val-fraction", type=float, default=0.1, metavar="X", help="share of documents that validates; default: 0.1")
    add("--workers", type=_positive, metavar="N", help="processes; default: one a core")


def _data_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run whose shards to pack")
    parser.add_argument("-o", "--out", required=True, metavar="FILE.tar",
        help="the archive to make; elsewhere: tar -xf FILE.tar -C RUN, then train --resume RUN")  # fmt: skip


def _tokenizer_train(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="DIR", help="the tokenizer folder to make; transformers loads it")
    add("--kind", choices=["char", "bpe", "sp-bpe", "sp-unigram"], default="bpe", help="default: bpe (byte-level)")
    add("--vocab-size", type=_positive, default=2048, metavar="N", help="default: 2048; char ignores it")


def _tokenizer_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a tokenizer.json, a .model, a folder that holds one, or a run")
    parser.add_argument("--text", metavar="TEXT", help="show how this text is split")
    _add_json(parser)


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="where the runs are; default: runs")
    _add_json(parser)


def _runs_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run to look through")
    _add_json(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="runs to show, overlaid; the others are compared with the first")
    add("-o", "--out", metavar="FILE", help="the page to write; default: RUN.html")
    add("--export", metavar="DIR", help="also write the figures as PNG and the curves as CSV there")
    add("--watch", action="store_true", help="serve the page on this machine, made anew as the runs go on")
    add("--port", type=int, default=8765, metavar="N", help="of --watch; 0 = any that is free; default: 8765")


_FORMATS = ("hf", "mlx-lm", "nanogpt", "mingpt", "gptmodel", "llama2c", "gguf", "npz", "peft")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)(|KB|MB|GB)", text, re.IGNORECASE)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500MB or 5GB")
    return int(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2].upper()]


def _convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("src", metavar="SRC", help="a model or adapter folder, a run, a file of weights or a hub id; its content tells")
    add("dst", metavar="DST", help="the folder or file to make")
    add("--to", choices=_FORMATS,
        help="default: by the suffix of DST (.gguf .bin .pt .pth .npz), else hf; an adapter: both layouts")  # fmt: skip
    add("--tokenizer", metavar="PATH", help="put this .json, .model or folder in the place of the source's tokenizer")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights; default: as they are")
    add("--bits", type=int, choices=[4, 8], help="quantise the matrices (mlx-lm: 4 or 8; gguf: 8)")
    add("--group-size", type=int, choices=[32, 64, 128], help="inputs that share a scale (mlx-lm); default: 64")
    add("--max-shard", type=_bytes, metavar="SIZE", help="of a file of weights (hf, mlx-lm); default: 5GB")
    add("--version", type=int, choices=[0, 1], help="of llama2c; default: 0")
    add("--n-head", type=_positive, metavar="N", help="heads, where a file does not say it (mingpt, gptmodel)")
    add("--model", metavar="DIR", help="of an adapter: its base, or that one's config.json; default: what it names")
    add("--no-hash", action="store_true", help="no sha256 of source and result in the provenance")
    add("--allow-nan", action="store_true", help="go on where values are not finite, and say how many")
    add("--verify", action="store_true", help="hold the result against the source, and keep it only if they agree")
    add("--force", action="store_true", help="replace DST, once the new one is complete")
    _add_json(parser)


def _fuse(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_adapter(parser)
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="DIR", help="the model folder to make")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights; default: as the base has them")
    add("--dequantize", action="store_true", help="plain weights from a quantised base, which else stays quantised")
    _add_json(parser)


def _verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name in ("a", "b"):
        add(name, metavar=name.upper(),
            help="what convert reads; or transformers:DIR, mlx-lm:DIR: as that library computes it")  # fmt: skip
    add("--html", metavar="FILE", help="also write the report as one page")
    add("--weights-only", action="store_true", help="tensors, config and tokenizer alone; run neither model")
    add("--rungs", metavar="LIST",
        help="of tensors,config,tokenizer,logits,activations,gradients,greedy; default: all")  # fmt: skip
    add("--frameworks", metavar="LIST", help="of mlx,torch; default: those installed")
    add("-d", "--data", metavar="FILE", help="text to compute logits on; default: some that every Python carries")
    add("--n-head", type=_positive, metavar="N", help="heads, where a file does not say it (mingpt, gptmodel)")
    _add_json(parser)


def _probe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", nargs="+", metavar="FOLDER", help="a model folder, a run or a checkpoint")
    add("--tokens", required=True, metavar="FILE", help="token ids, a .npy of one dimension; each predicts the next")
    add("-o", "--out", required=True, metavar="DIR", help="where to write 0.npz, 1.npz ..., one a FOLDER")
    add("--scale", type=float, action="append", metavar="X", help="of the matrices; repeatable; default: 1 and 8")
    add("--greedy", type=int, default=0, metavar="N", help="tokens to continue with; default: 0")
    add("--prompt", type=_positive, default=1, metavar="N", help="of the tokens, what is continued; default: 1")
    add("--no-gradients", dest="gradients", action="store_false", help="logits and activations alone")
    add("--exact", action="store_true", help="the first FOLDER also in float64, as 0.exact.npz (torch)")
    _add_backend(parser)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", default="runs/demo", metavar="DIR",
        help="where its runs go, in place of an earlier demo's; default: runs/demo")  # fmt: skip


VERBS = {
    "train": Verb("train a GPT from a recipe, or go on with a run", "mlxgpt.commands.train:train", _train, (
        "train pydocs --out runs/first",
        "train pydocs --steps 500 --set optim.lr=3e-4 --set model.n_layer=6",
        "train --resume runs/first --backend torch",
    )),
    "finetune": Verb("tune a model on rows: LoRA, DoRA or all", "mlxgpt.commands.finetune:finetune", _finetune, (
        "finetune --model runs/first --data pydocs-qa --out runs/qa",
        "finetune --model Qwen/Qwen3-0.6B --data rows.jsonl --method dora --set adapter.rank=16",
        "finetune --config lora_config.yaml",
        "finetune --resume runs/qa --backend torch",
    )),
    "plan": Verb("memory, time and money before anything runs", "mlxgpt.commands.plan:plan_command", _plan, (
        "plan llama-10m --calibrate",
        "plan --model runs/first --data rows.jsonl --method lora --set adapter.rank=16",
        "plan llama-10m --budget '100 USD' --chip h100 --price 2.5 --out recipe.toml",
    )),
    "generate": Verb("continue a prompt", "mlxgpt.commands.generate:generate_command", _generate, (
        "generate -m runs/first -p 'The list is'",
        "generate -m runs/first -p 'A' -p 'B' -n 50 --temperature 0 --json",
    )),
    "chat": Verb("talk with a model that has a chat template", "mlxgpt.commands.chat:chat_command", _chat, (
        "chat -m runs/qa",
        "chat -m model --adapter runs/qa --system 'Answer briefly.' --temperature 0",
        "chat -m runs/qa --temperature 0 --seed 1",
    )),
    "eval": Verb("loss, perplexity and bits per byte on data", "mlxgpt.commands.eval:evaluate_command", _eval, (
        "eval -m runs/first -d book.txt",
        "eval -m runs/first -d book.txt --backend torch --json",
    )),
    "classify": Verb("tell which label texts have", "mlxgpt.commands.classify:classify_command", _classify, (
        "classify -m runs/spam -t 'You have won a prize'",
        "classify -m models/small --adapter runs/spam -f test.csv --json",
    )),
    "data fetch": Verb("download a known corpus, by its sha256", "mlxgpt.commands.data:fetch_command", _data_fetch, (
        "data fetch tinyshakespeare",
        "data fetch tinyshakespeare --from input.txt",
    )),
    "data inspect": Verb("what a corpus holds", "mlxgpt.commands.data:inspect_command", _data_inspect, (
        "data inspect pydocs",
        "data inspect corpus/ --tokenizer runs/first --json",
        "data inspect rows.jsonl --model models/small --rows 5",
    )),
    "data prepare": Verb("tokenize a corpus into shards", "mlxgpt.commands.data:prepare_command", _data_prepare, (
        "data prepare corpus.jsonl --out shards --vocab-size 8192",
    )),
    "data export": Verb(
        "pack a run's shards for another machine", "mlxgpt.commands.data:export_command", _data_export, (
        "data export runs/first --out first.tar",
    )),
    "tokenizer train": Verb(
        "train a tokenizer on a corpus", "mlxgpt.commands.tokenizer:train_tokenizer", _tokenizer_train, (
        "tokenizer train corpus/ --out tok --kind sp-unigram --vocab-size 4096",
    )),
    "tokenizer inspect": Verb(
        "what a tokenizer is, and how it splits a text", "mlxgpt.commands.tokenizer:inspect_tokenizer",
        _tokenizer_inspect, ("tokenizer inspect runs/first --text 'Hello world'",
    )),
    "runs": Verb("list runs: status, best loss, size, age", "mlxgpt.commands.runs:list_command", _runs, (
        "runs",
        "runs experiments --json",
    )),
    "runs check": Verb("hold every byte of a run against its checksums", "mlxgpt.commands.runs:check_command",
        _runs_check, ("runs check runs/first",)),
    "report": Verb("one page about runs: curves, settings, samples", "mlxgpt.commands.report:report_command", _report, (
        "report runs/first",
        "report runs/mlx runs/torch --out both.html --export figures",
        "report runs/first --watch",
    )),
    "convert": Verb("a model from any format into another", "convert.commands:convert_command", _convert, (
        "convert out/ckpt.pt model",
        "convert runs/first first-q4 --to mlx-lm --bits 4 --verify",
        "convert model model.gguf --dtype bfloat16",
        "convert adapters peft-adapter --to peft",
    )),
    "fuse": Verb("make one model of a model and adapters", "convert.commands:fuse_command", _fuse, (
        "fuse -m runs/qa -o tuned",
        "fuse -m model --adapter runs/qa --adapter style:0.5 -o tuned --dtype bfloat16",
    )),
    "verify": Verb("hold two models against each other", "convert.commands:verify_command", _verify, (
        "verify out/ckpt.pt model",
        "verify model transformers:model --html report.html",
        "verify model model-q4 --frameworks mlx --json",
    )),
    "probe": Verb("what a framework makes of a model, as .npz", "mlxgpt.commands.probe:probe_command", _probe, (
        "probe model --tokens ids.npy --out .",
    )),
    "demo": Verb("train and tune in MLX and in PyTorch, compare", "mlxgpt.commands.demo:demo", _demo, ("demo",)),
}  # fmt: skip
