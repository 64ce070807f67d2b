"""The arguments of the verbs that show something."""

import argparse

from mlxgpt.arguments.shared import add_adapter, add_backend, add_json, positive


def keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD",
        help="only keys with all of these in name, meaning, or what nanoGPT, mlx-lm and others call them")  # fmt: skip
    add_json(parser)


def completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="the shell that will read it")


def runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", default="runs", metavar="DIR", help="folder that holds the runs; default: runs"
    )
    add_json(parser)


def runs_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run to check")
    add_json(parser)


def diagnose(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="the run to look at; it may be training")
    add("--quick", action="store_true", help="from the run's folder alone: without counting its corpus")
    add_json(parser)


def report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="runs to overlay; the others are compared with the first")
    add("-o", "--out", metavar="FILE", help="the page to write; default: RUN.html")
    add("--export", metavar="DIR", help="also write the figures as PNG and the curves as CSV there")
    add("--watch", action="store_true", help="serve the page on this machine and update it as the runs progress")
    add("--port", type=int, default=8765, metavar="N", help="port for --watch; 0 = any free one; default: 8765")


def probe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", nargs="+", metavar="FOLDER", help="a model folder, a run or a checkpoint")
    add("--tokens", required=True, metavar="FILE", help="token ids, a .npy of one dimension; each predicts the next")
    add("-o", "--out", required=True, metavar="DIR", help="folder for 0.npz, 1.npz ..., one per FOLDER")
    add(
        "--scale", type=float, action="append", metavar="X", help="factor on the matrices; repeatable; default: 1 and 8"
    )
    add("--greedy", type=int, default=0, metavar="N", help="tokens to generate greedily; default: 0")
    add("--prompt", type=positive, default=1, metavar="N", help="number of tokens that form the prompt; default: 1")
    add("--no-gradients", dest="gradients", action="store_false", help="logits and activations only")
    add("--exact", action="store_true", help="also compute the first FOLDER in float64, as 0.exact.npz (torch)")
    add_backend(parser)


def inspect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL",
        help="a run (its best, else its last checkpoint), a checkpoint, a model folder or a hub id")  # fmt: skip
    add("-t", "--text", metavar="TEXT", help="the text to look at")
    add("-f", "--text-file", metavar="FILE", help="a file that holds it, - for stdin")
    add("--ids", metavar="IDS", help="token ids instead, such as 1,2,3, taken as they are")
    add("--chat", action="store_true", help="the text as a question in the model's chat template; default: as it is")
    add_adapter(parser)
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="tokens shown, from the start; default: 256, or the model's context",
    )
    add("--top", type=positive, default=8, metavar="N", help="candidates and neighbors of each token; default: 8")
    add(
        "--layers", metavar="LIST", help="layers whose attention is kept, such as 0,4-7, or none; default: all that fit"
    )
    add("-o", "--out", metavar="FILE", help="the page to write; default: MODEL-inspect.html, with --json none")
    add_json(parser)
    add_backend(parser)


def doctor(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help="the parity ladder alone, on the smallest models")
    add("--backend", dest="framework", choices=["mlx", "torch"], help="one framework; default: both, if installed")
    add("--device", default="auto", help="what is held against the CPU: auto, gpu, mps, cuda or cuda:N; default: auto")
    add("-o", "--out", metavar="FILE", help="also write what is printed to FILE")
    add_json(parser)


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", default="runs/demo", metavar="DIR",
        help="folder for its runs, replacing those of an earlier demo; default: runs/demo")  # fmt: skip
