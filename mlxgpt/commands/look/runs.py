"""The verbs ``runs`` and ``runs check``: lists runs, and checks the files of one against their checksums."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlxgpt.common.align import reference
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import checkpoint, metrics, run_folder
from mlxgpt.common.runs import summary as run_summary


def list_command(args: Namespace) -> int:
    """Lists the runs under a folder, newest first."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected one that holds runs")
    places = [folder] if resolve.is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir())
    found = [entry(place) for place in places if resolve.is_run(place)]
    found.sort(key=lambda line: -line["changed"])
    if args.json:
        print(json.dumps(found))
        return 0
    if not found:
        print(f"{folder}: no runs")
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("run", "left"), ("status", "left"), ("step", "right"), ("best loss", "right"),
                          ("size", "right"), ("age", "right"), ("framework", "left")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "status", overflow="fold")  # type: ignore[arg-type]
    for line in found:
        best = f"{line['best_loss']:.4f}" if line["best_loss"] is not None else ""
        step = f"{line['step']:,} of {line['steps']:,}"
        size = f"{line['size'] / 2**20:,.1f} MiB"
        table.add_row(
            line["name"], f"{line['status']}, {line['why']}", step, best, size, line["age"], line["framework"]
        )
    Console(width=None if Console().is_terminal else 160, highlight=False).print(table)
    return 0


def entry(place: Path) -> dict[str, Any]:
    """The entry of a run in the list; a damaged one has the status damaged."""
    try:
        run = run_summary.read_run(place)
    except UserError as error:
        changed = place.stat().st_mtime
        return {"name": place.name, "status": "damaged", "why": str(error), "step": 0, "steps": 0, "best_loss": None,
                "best_step": None, "size": 0, "age": "", "changed": changed, "framework": ""}  # fmt: skip
    best = run.best
    return {
        "name": run.name, "status": run.status, "why": run.why, "step": run.step, "steps": run.steps,
        "best_loss": best[1] if best else None, "best_step": best[0] if best else None, "size": run.size,
        "age": run_summary.age(run), "changed": run.changed, "framework": run.framework,
    }  # fmt: skip


def check_command(args: Namespace) -> int:
    """Checks every file of every checkpoint, the reference and metrics.jsonl; returns 1 if something is damaged."""
    run = Path(args.run)
    if not resolve.is_run(run):
        raise UserError(f"{run}: not a run; expected the --out of a training")
    damage, checked = find_damage(run)
    if args.json:
        print(json.dumps({"sound": not damage, "checked": checked, "damage": damage}))
    else:
        for line in damage:
            print(line)
        print(f"{run}: {len(checked)} checked, {len(damage) or 'nothing'} damaged")
    return 1 if damage else 0


def find_damage(run: Path) -> tuple[list[str], list[str]]:
    """(damage, one line each; names of what was checked)."""
    damage, checked, expected = [], [], ""
    for step in resolve.steps_of(run):
        place = resolve.path_of(run, step)
        checked.append(place.name)
        try:
            state = checkpoint.verify(place)
            expected = state.data.get(reference.DIGEST, "") or expected
            if state.step != step:
                damage.append(f"{place}: its state is of step {state.step}, expected {step}")
            damage += unlisted(place)
        except UserError as error:
            damage.append(str(error))
    if expected:
        checked.append(reference.FILE)
        try:
            reference.check(run, expected)
        except UserError as error:
            damage.append(str(error))
    if (run / metrics.FILE).exists():
        checked.append(metrics.FILE)
        damage += _lines(run / metrics.FILE)
    for name in ("best", "last"):
        if (run / name).is_symlink() or (run / name).exists():
            checked.append(name)
            if resolve.follow(run, name) is None:
                damage.append(f"{run / name}: points to a checkpoint that does not exist")
    return damage, checked


def unlisted(place: Path) -> list[str]:
    """Files of a checkpoint that its state.json does not list."""
    listed = json.loads((place / checkpoint.STATE).read_text(encoding="utf-8"))["files"]
    there = {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}
    return [f"{place / name}: not in state.json" for name in sorted(there - set(listed) - {checkpoint.STATE})]


def _lines(path: Path) -> list[str]:
    """Damaged, missing or misplaced lines of metrics.jsonl; an incomplete last line is what a killed process leaves."""
    expected = run_folder.first_step(path.parent) + 1
    try:
        for line in metrics.read_lines(path):
            if line.get("split") == "train":
                if line["step"] != expected:
                    return [f"{path}: found step {line['step']}, expected step {expected}"]
                expected += 1
    except UserError as error:
        return [str(error)]
    return []
