"""The arguments of the verbs that convert, compare and merge models."""

import argparse
import re

from mlxgpt.arguments.shared import Once, add_adapter, add_backend, add_json, add_model, positive, positive_number

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
        type=positive,
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
    add_json(parser)


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
    add("--tolerance", type=positive_number, metavar="X",
        help="how far off logits may be, of the largest; default: 1e-5, more for half precision")  # fmt: skip
    add("--tokenizer", metavar="PATH", help="a tokenizer for the folder, in place of what lies beside FILE")
    add("--backend", choices=["mlx", "torch"], help="what runs the candidates; default: MLX where it runs, else torch")
    add("--force", action="store_true", help="replace DIR once the new one is complete")
    add_json(parser)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the config.json (or Meta's params.json) of weights that have none beside them (pytorch)",
    )


def fuse(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_adapter(parser)
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="DIR", help="the model folder to write")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="dtype of the weights; default: that of the base")
    add("--dequantize", action="store_true", help="dequantize a quantized base, which otherwise stays quantized")
    add_json(parser)


def quantize(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("src", metavar="SRC", help="a model, a run, a weights file or a hub id; the format is detected")
    add("dst", metavar="DST", help="the folder to write, which mlx-lm loads, too")
    add("--bits", required=True, metavar="N", help="2, 3, 4, 5, 6 or 8 of each weight, or mixed:4.5: per weight in all,"
        " more where rounding costs more")  # fmt: skip
    add("--method", choices=["rtn", "gptq", "awq"], default="gptq",
        help="rtn: to the nearest; gptq, awq: by what a text gives the matrices; default: gptq")  # fmt: skip
    add("-d", "--data", action=Once, metavar="FILE",
        help="text to calibrate on; its last tenth is held out to measure on")  # fmt: skip
    add("--eval-data", action=Once, metavar="FILE", help="text to measure on instead")
    add("--text-key", metavar="KEY", help="key or column that holds the text; default: text")
    add("--tokens", type=positive, metavar="N",
        help="tokens of each text that are read at most; default: 131072")  # fmt: skip
    add("--adapter", action="append", default=[], metavar="DIR[:WEIGHT]",
        help="an adapter (a run, PEFT or mlx-lm) that is merged first, as mlxgpt fuse does; repeatable")  # fmt: skip
    add("--group-size", type=int, choices=[32, 64, 128], default=64, help="inputs that share a scale; default: 64")
    add("--dtype", choices=["float32", "float16", "bfloat16"],
        help="dtype of scales and of what is not quantized; default: that of SRC")  # fmt: skip
    add("--hessians", metavar="DIR", help="keep what the text gave the matrices here, or take it from here;"
        " either backend solves from it to the same bits")  # fmt: skip
    add(
        "--force",
        action="store_true",
        help="replace DST once the new one is complete; also merge an adapter of another base",
    )
    add_json(parser)
    add_backend(parser)


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
        type=positive,
        metavar="N",
        help="attention heads, if the file does not record them (mingpt, gptmodel)",
    )
    _add_config(parser)
    add("--kwargs", metavar="JSON", help="what module:'s class is called with")
    add_json(parser)
