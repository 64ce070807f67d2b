"""The arguments of the verbs about corpora and tokenizers."""

import argparse

from mlxgpt.arguments.shared import add_json, positive


def _add_source(parser: argparse.ArgumentParser, also: str = "") -> None:
    text = f"pydocs, or a .txt, .md, .jsonl or .parquet file, or a folder of them{also}"
    parser.add_argument("source", metavar="SOURCE", help=text)
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key or column that holds the text; default: text"
    )


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
    add("--rows", type=positive, metavar="N", help="with --model: examples to show; default: 3")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="with --model: such as tune.block_size=512")
    add_json(parser)


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
        type=positive,
        default=2048,
        metavar="N",
        help="size of a tokenizer trained here; default: 2048",
    )
    add("--val-fraction", type=float, default=0.1, metavar="X", help="share of documents for validation; default: 0.1")
    add("--workers", type=positive, metavar="N", help="processes; default: one per core")


def data_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run whose shards are packed")
    parser.add_argument("-o", "--out", required=True, metavar="FILE.tar",
        help="the archive to write; elsewhere: tar -xf FILE.tar -C RUN, then train --resume RUN")  # fmt: skip


def tokenizer_train(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    add = parser.add_argument
    add("-o", "--out", required=True, metavar="DIR", help="the tokenizer folder to write; transformers loads it")
    add("--kind", choices=["char", "bpe", "sp-bpe", "sp-unigram"], default="bpe", help="default: bpe (byte-level)")
    add("--vocab-size", type=positive, default=2048, metavar="N", help="default: 2048; char ignores it")


def tokenizer_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="a file or folder of one, a name (bytes, gpt2, cl100k_base ...), or a run"
    )
    parser.add_argument("--text", metavar="TEXT", help="show the tokens of this text")
    add_json(parser)
