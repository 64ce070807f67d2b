"""What the arguments of several verbs have in common."""

import argparse
from typing import Any


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive whole number")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or a positive whole number")
    return int(text)


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return number


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=["mlx", "torch"], help="framework; default: MLX where it runs, else torch")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, gpu, mps, cuda or cuda:N; default: $MLXGPT_DEVICE or auto"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, metavar="DIR",
        help="a run (its best, else its last checkpoint), a checkpoint, a model folder or a hub id")  # fmt: skip


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", action="append", default=[], metavar="DIR[:WEIGHT]",
        help="an adapter (a run, PEFT or mlx-lm) and the weight of its update, default 1; repeatable")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="apply an adapter that was trained on other base weights")


def add_template_kwargs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--template-kwargs", metavar="JSON",
        help="""values that the chat template reads, such as '{"enable_thinking": false}'""")  # fmt: skip


def add_stop_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stop-token", action="append", default=[], metavar="TOKEN",
        help="a token that ends a text besides the model's own, by its text or its id; repeatable")  # fmt: skip


def add_kv_bits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-bits", type=int, choices=[8, 4], default=0,
        help="hold keys and values of a text in so many bits; default: as they are")  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser, **defaults: int) -> None:
    import dataclasses

    from mlxgpt.common.config import SampleConfig

    for field in dataclasses.fields(SampleConfig):
        if field.name != "prompt":
            flags = ["-n"] * (field.name == "max_tokens") + [f"--{field.name.replace('_', '-')}"]
            default = defaults.get(field.name, field.default)
            text = f"{field.metadata['help']}; default: {default}"
            parser.add_argument(*flags, type=type(field.default), default=default, metavar="X", help=text)


class Once(argparse.Action):
    """Given twice, a flag is an error: argparse would take the last one and say nothing."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if (first := getattr(namespace, self.dest)) is not None:
            raise argparse.ArgumentError(self, f"{first} and {values}: expected one")
        setattr(namespace, self.dest, values)
