"""The examination: a process a framework (measure.py), then the comparisons, as one JSON-ready report."""

import contextlib
import datetime
import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

import mlxgpt
from mlxgpt.common import backend, tf32
from mlxgpt.common.doctor import compare, facts, private
from mlxgpt.common.doctor.compare import TITLES, Finding, Pair, Side
from mlxgpt.common.errors import UserError
from mlxgpt.common.plan import chips

Say = Callable[[str], None]
PATIENCE = 240  # seconds after which a process hangs


class Examined:
    """What a framework's process left in ``place``, also where it ended early: ``ended`` says how, or is ''.

    ``facts`` are what its device.describe says of the device that is tested.
    """

    def __init__(self, name: str, facts: dict[str, str], place: Path):
        self.name, self.facts, self.place = name, facts, place
        self.ended = ""
        self.tested = Side(name, facts["device"] == "cpu")

    @property
    def tf32(self) -> bool:
        """Whether float32 products are in reduced precision."""
        return self.facts["tf32"] == "on"

    def arrays(self, place: str) -> dict[str, np.ndarray]:
        """``tested``, ``cpu`` or ``exact`` by name; a CPU that is tested is its own reference."""
        folder = self.place / ("tested" if place == "cpu" and self.tested.cpu else place)
        return {unquote(path.stem): np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npy"))}

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The lines of speed or bandwidth that were written whole."""
        path, made = self.place / f"{kind}.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                made.append({"framework": self.name, **json.loads(line)})
        return made


def start(name: str, out: Path, device: str, quick: bool) -> str:
    """Runs one framework in a process of its own; how it failed, or ''."""
    command = [sys.executable, "-m", f"{backend.PACKAGES[name]}.doctor", "--out", str(out), "--device", device]
    command += ["--quick"] if quick else []
    try:
        done = subprocess.run(command, timeout=PATIENCE, capture_output=True, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        return f"its process did not end within {PATIENCE} s"
    if done.returncode == 0:
        return ""
    said, code = done.stderr.strip().splitlines() or ["nothing said"], done.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"its process ended with {how}: {said[-1][:300]}"


def frameworks(asked: str | None, device: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The frameworks to examine with what they say of the device, and why the others are not.

    Raises:
        UserError: none can be; the one asked for is not here, or does not have the device.
    """
    found, absent = {}, {}
    for name in [asked] if asked else list(backend.PACKAGES):
        try:
            backend.resolve(name)
            devices = importlib.import_module(f"{backend.PACKAGES[name]}.device")
            found[name] = devices.describe(devices.use(device))
        except UserError as error:
            absent[name] = str(error)
    if not found:
        raise UserError("; ".join(dict.fromkeys(absent.values())))
    return found, absent


def examine(asked: str | None, device: str, quick: bool, say: Say) -> dict[str, Any]:
    """The whole report; ``say`` hears what is being done.

    Raises:
        UserError: see ``frameworks``; it is not known whether TF32 is on.
    """
    began = time.perf_counter()
    found, absent = frameworks(asked, device)
    notes = [note for described in found.values() if (note := tf32.judged(described["tf32"]))]
    report: dict[str, Any] = {"mlxgpt": mlxgpt.__version__, "date": datetime.date.today().isoformat(), "quick": quick}
    report["notes"] = list(dict.fromkeys(notes))
    report["machine"] = private.clean(facts.facts())
    with tempfile.TemporaryDirectory(prefix="mlxgpt-doctor-") as work:
        done = []
        for name, described in found.items():
            one = Examined(name, described, Path(work, name))
            one.place.mkdir()
            say(f"{TITLES[name]} on {described['device']}: the ladder{'' if quick else ', speed'}")
            one.ended = start(name, one.place, device, quick)
            done.append(one)
        report |= _results(done)
    report["not_here"] = private.clean(absent)
    report["pressure_after"] = private.clean(facts.pressure())
    report["seconds"] = round(time.perf_counter() - began, 1)
    failed = any(one["verdict"] == "FAILED" for one in report["ladder"])
    return {**report, "verdict": "FAILED" if failed else "ok"}


def _results(done: list[Examined]) -> dict[str, Any]:
    findings = [Finding("process", TITLES[one.name], None, 0.0, note=one.ended) for one in done if one.ended]
    findings += ladder(done)
    return {
        "frameworks": {one.name: {**one.facts, "chip": _chip(one.facts["device"])} for one in done},
        "ladder": [{**one.described(), "note": private.clean(one.note)} for one in findings],
        "speed": [row for one in done for row in one.rows("speed")],
        "bandwidth": [row for one in done for row in one.rows("bandwidth")],
    }


def _chip(device: str) -> str | None:
    """The name under which the table of chips has it."""
    chip = chips.chip_of(device)
    return chip.name if chip else None


def ladder(done: list[Examined]) -> list[Finding]:
    """Every comparison that these frameworks and devices allow."""
    tested = {one.name: one.arrays("tested") for one in done}
    cpus = {one.name: tested[one.name] if one.tested.cpu else one.arrays("cpu") for one in done}
    exact = next((one.arrays("exact") for one in done if one.name == "torch"), {})
    floors = (exact, cpus["torch"]) if exact else None
    made: list[Finding] = []
    for one in done:
        if not one.tested.cpu:
            sides = one.tested, Side(one.name, True)
            made += Pair(sides, (tested[one.name], cpus[one.name]), floors, one.tf32).findings()
    if len(done) > 1:
        a, b = done
        pair = Pair((a.tested, b.tested), (tested[a.name], tested[b.name]), floors, a.tf32 or b.tf32)
        made += pair.findings()
    elif done and done[0].tested.cpu:
        made += compare.alone(done[0].tested, tested[done[0].name], exact)
    return made
