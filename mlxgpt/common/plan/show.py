"""A plan as a table, and as a plot."""

import importlib.util
import sys
import textwrap
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.plan.budget import BESIROGLU, HOFFMANN
from mlxgpt.common.units import duration, size

Rows = list[tuple[str, str]]


def big(number: float) -> str:
    """``1.25e+18``, or with a letter: ``124.4 M``."""
    for unit, letter in ((1e15, ""), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:,.1f} {letter}" if letter else f"{number:.2e}"
    return f"{number:,.0f}"


def rows(result: dict[str, Any]) -> Rows:
    """The lines of the table; an empty label begins a section."""
    memory, machine, unit, made = result["memory"], result["machine"], result["unit"], []
    made += [("", result["title"])]
    trains = result["trainable"]
    made += [
        ("parameters", f"{result['parameters']:,}" + ("" if trains == result["parameters"] else f"; {trains:,} train"))
    ]
    flops = result["flops_per_token"]
    made += [("FLOPs a token", f"{big(flops['exact'])} counted; 6 N + attention: {big(flops['rule'])}")]
    made += [("", f"memory of a step, {result['micro_batch_size']} {unit} of {result['length']} tokens at a time")]
    made += [(name, size(value)) for name, value in memory["components"].items() if value]
    made += [("peak", size(memory["peak"])), ("checkpoint's copy", f"{size(memory['checkpoint_copy'])}, on the host")]
    layer = result["activations_per_layer"]
    made += [("activations a layer", f"{size(layer['kept'])}; recomputed: {size(layer['recomputed'])}")]
    made += [("KV cache", f"{size(result['kv_cache'])}, one text of {result['length']} tokens")]
    if machine["free"] == machine["total"]:  # a chip of the table, never a machine that runs
        made += [("", f"not this machine: {result['device']}")]
        made += [("memory", f"{size(machine['total'])}, the most that is sold with it")]
    else:
        made += [("", f"this machine: {result['device']}")]
        made += [("memory", f"{size(machine['total'])}, free now {size(machine['free'])}")]
    if machine["recommended"]:
        made += [("recommended working set", size(machine["recommended"]))]
    made += [("fits", "yes" if result["fits"] else f"no: {size(memory['whole'])} of {size(machine['limit'])}")]
    made += [("largest micro-batch", f"{result['largest_micro_batch']} {unit}")]
    made += [("longest row", f"{result['longest_row']} tokens")]
    made += [("", "time")]
    made += [("tokens", f"{result['tokens']:,} in {result['steps']:,} steps")]
    made += [("hours", _time(result))]
    if result["cost"] is not None:
        made += [("cost", f"{result['cost']:,.2f} at {result['price']:g} an hour")]
    made += [("note", note) for note in result["notes"]]
    return made


def _time(result: dict[str, Any]) -> str:
    if result["seconds"] is None:
        return "unknown: give --calibrate or --chip"
    return f"{result['seconds'] / 3600:,.2f} ({duration(result['seconds'])}), {result['seconds_from']}"


def budget_rows(result: dict[str, Any]) -> Rows:
    """The table of a budget."""
    low, high = sorted(result["range"], key=lambda pair: pair["parameters"])
    made = [("", result["title"])]
    made += [("compute", f"{result['compute']:.2e} FLOPs"), ("model", result["model"])]
    made += [("parameters", f"{result['parameters']:,}"), ("tokens", f"{result['tokens']:,}")]
    made += [("tokens a parameter", f"{result['tokens'] / result['parameters']:.1f}")]
    made += [("optimum, range of two fits", f"{big(low['parameters'])} on {big(low['tokens'])} tokens to "
              f"{big(high['parameters'])} on {big(high['tokens'])}")]  # fmt: skip
    made += [("loss on web text", f"{min(result['loss']):.2f} to {max(result['loss']):.2f} nats a token")]
    made += [("hours", _time(result))]
    if result["cost"] is not None:
        made += [("cost", f"{result['cost']:,.2f} at {result['price']:g} an hour")]
    made += [("peak memory", f"{size(result['memory']['whole'])} of {size(result['limit'])}")]
    made += [("note", note) for note in result["notes"]]
    return made


def show(lines: Rows) -> None:
    """Prints the table: by rich on a terminal, else plain text of 80 columns."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for label, text in lines:
            table.add_row(*(("", "") if not label else (f"  {label}", text)) if label else (f"[bold]{text}[/bold]", ""))
        Console().print(table)
        return
    for label, text in lines:
        start = f"  {label:<26} " if label else ""
        print(textwrap.fill(text, 80, initial_indent=start, subsequent_indent=" " * (len(start) or 2)))


def check_plot(path: Path) -> None:
    """Refuses, before any work, a plot that cannot be drawn.

    Raises:
        UserError: the suffix is not an image's, or matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: expected a file ending in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot: needs matplotlib: pip install 'mlxgpt[report]'")


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory by component, and loss against compute, as PNG or SVG by the file's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    parts = {name: value / 2**20 for name, value in result["memory"]["components"].items() if value}
    left.barh(list(parts)[::-1], list(parts.values())[::-1], color="#0b62a4")
    left.set_xlabel("MiB at the peak")
    left.set_title("memory of a step", fontsize=10)
    compute = result["compute"]
    x = np.geomspace(compute / 100, compute * 100, 60)
    curves = [[law.loss(*law.best(c)) for c in x] for law in (BESIROGLU, HOFFMANN)]
    right.fill_between(x, *curves, color="#0b62a4", alpha=0.2, linewidth=0, label="compute-optimal, two fits")
    losses = [law.loss(result["parameters"], result["tokens"]) for law in (BESIROGLU, HOFFMANN)]
    right.errorbar([compute], [sum(losses) / 2], yerr=[[abs(losses[0] - losses[1]) / 2]] * 2, fmt="o", color="#d1495b",
                   label="this plan")  # fmt: skip
    right.set_xscale("log")
    right.set_xlabel("FLOPs")
    right.set_title("loss on web text, nats a token", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: {error.strerror}") from None
    finally:
        plt.close(figure)
