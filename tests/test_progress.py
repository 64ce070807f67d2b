"""The progress display: what it shows, where it stays plain, and what it costs."""

import io
import math
import os
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.model import params
from mlxgpt.common.plan import chips
from mlxgpt.common.train.progress import Progress, sparkline
from mlxgpt.common.units import duration, short, size


def terminal(width: int = 100) -> Console:
    """A terminal that keeps what is written to it."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    return Console(file=file, force_terminal=True, width=width, height=20)


def written(console: Console) -> str:
    """What a console got to see."""
    console.file.flush()
    return console.file.buffer.getvalue().decode()  # type: ignore[attr-defined]


def run(progress: Progress, steps: int, seconds: float = 0.5) -> None:
    """A short run: a falling loss, one validation."""
    with progress:
        for step in range(1, steps + 1):
            progress.step(step, 5.0 - 0.1 * step, 1e-3, 0.9, 1000, seconds, time.perf_counter())
        progress.validation(steps, {"loss": 4.5}, "loss", {"step": 1, "loss": 4.25})


def test_where_there_is_no_terminal_there_are_plain_lines() -> None:
    file = io.StringIO()
    run(Progress("x", 10, log_every=4, console=Console(file=file)), 10)
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/10", "step 4/10", "step 8/10", "step 10/10"]
    assert "loss 4.6000" in lines[1] and "lr 1.00e-03" in lines[1] and "2k tok/s" in lines[1] and "eta 0:0" in lines[1]
    assert lines[-1] == "step 10/10  validation loss 4.5000  (best 4.2500 at step 1)"
    assert "\x1b" not in file.getvalue()


def test_a_terminal_shows_bar_loss_sparkline_speed_mfu_and_memory() -> None:
    console = terminal()
    memory = {"active": 3 * 2**29, "peak": 2**31}
    run(Progress("shake", 10, flops=1e9, peak=1e13, memory=lambda: memory, console=console), 10)
    text = written(console)
    for part in (
        "shake",
        "10/10",
        "100%",
        "loss 4.0000",
        "\u2588",
        "\u2581",
        "2k tok/s",
        "MFU 20%",
        "1.50 GiB",
        "best 4.2500",
    ):
        assert part in text, part


@pytest.mark.parametrize("width", [1, 2, 5, 11, 20, 37, 60, 79, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    progress = Progress(
        "a-name-of-some-length", 123456, console=terminal(width), memory=lambda: {"active": 1, "peak": 1}
    )
    run(progress, 30)
    progress._status = "validating"
    for line in progress._picture(width).plain.split("\n"):
        assert cell_len(line) <= width
    assert progress._picture(width).plain.count("\n") == 1


def screen(text: str, width: int) -> list[str]:
    """The lines of a terminal that wraps at ``width``, after the controls that rich uses here."""
    lines, row, column = [""], 0, 0
    for control, up, plain in re.findall(r"(\x1b\[(?:(\d+)A|[?\d;]*[a-zA-Z]))|([^\x1b])", text):
        if up:
            row = max(0, row - int(up))
        elif control == "\x1b[2K":
            lines[row] = ""
        elif plain == "\r":
            column = 0
        elif plain == "\n" or (plain and column >= width):
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        if plain and plain not in "\r\n":
            lines[row] = lines[row][:column].ljust(column) + plain
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("by", ["a step", "a line"])
def test_a_terminal_that_becomes_narrower_keeps_no_bar(by: str) -> None:
    console = terminal(100)
    progress = Progress("narrow", 10, console=console)
    with progress:
        progress.say("before")
        progress.step(1, 4.5, 1e-3, 0.9, 1000, 0.5, time.perf_counter())
        # The terminal wraps what is on it: as if it had been written at the new width from the start.
        console.width = 30
        if by == "a line":
            progress.say("between")
        else:
            progress._next = 0.0
            progress.step(2, 4.4, 1e-3, 0.9, 1000, 0.5, time.perf_counter())
    shown = screen(written(console), 30)
    assert sum("\u2501" in line for line in shown) == 1, shown
    assert shown[0] == "before"


def test_what_is_said_after_the_end_stands_below_the_last_bar() -> None:
    console = terminal(80)
    progress = Progress("x", 10, console=console)
    with progress:
        progress.step(1, 4.5, 1e-3, 0.9, 1000, 0.5, time.perf_counter())
        progress.say("first save")
        progress.end()
        progress.say("stopped by Ctrl-C")
    shown = [line for line in screen(written(console), 80) if line]
    assert [line.split()[0] for line in shown] == ["first", "x", "loss", "stopped"]


@pytest.mark.parametrize(
    ("setting", "live"),
    [("NO_COLOR=1", True), ("TERM=dumb", False), ("COLUMNS=1", True), ("PYTHONIOENCODING=ascii", False)],
)
def test_odd_terminals(setting: str, live: bool) -> None:
    code = f"""
import pty, os, sys
pid, fd = pty.fork()
if pid == 0:
    from test_progress import Progress, run
    progress = Progress("x", 5)
    live = bool(progress._live)
    run(progress, 5)
    progress.say("caf\\u00e9 \\x1b[31m")
    os._exit(0 if live == {live} else 3)
out = b""
while True:
    try:
        more = os.read(fd, 4096)
    except OSError:
        break
    if not more:
        break
    out += more
status = os.waitpid(pid, 0)[1]
sys.stdout.buffer.write(out)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    env = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= dict([setting.split("=")])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    assert b"\x1b[31m" not in done.stdout.replace(b"\xef\xbf\xbd[31m", b"")
    if "NO_COLOR" in setting:
        assert b"\x1b[32m" not in done.stdout


def test_a_reader_that_goes_away_does_not_stop_the_run() -> None:
    code = """
from test_progress import Progress
import sys
progress = Progress("x", 5, log_every=1)
for step in range(1, 3000):
    progress.step(step, 1.0, 1.0, 1.0, 1, 1.0, 0.0)
print("done", file=sys.stderr)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout and child.stderr
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b"done\n"
    child.stderr.close()
    assert child.wait() == 0


def test_what_cannot_be_encoded_or_would_drive_the_terminal_is_replaced() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Progress("x", 5, console=Console(file=file)).say("caf\u00e9 \x1b[2J\nnext")
    assert file.buffer.getvalue() == b"caf? ?[2J\nnext\n"  # type: ignore[attr-defined]


def test_steps_that_are_not_finite_are_shown_and_leave_the_sparkline_alone() -> None:
    console = terminal()
    progress = Progress("x", 5, console=console)
    with progress:
        progress.step(1, 2.0, 1e-3, 1.0, 10, 0.1, 1e9)
        progress.step(2, math.nan, 1e-3, math.inf, 10, 0.1, 1e9)
    assert "loss nan" in written(console)
    assert progress._history == [2.0]


def work(steps: int, cost: float, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(drawings, Python functions called outside of them) in steps of a millisecond, a drawing taking ``cost`` seconds.

    The clock is ours, so that neither depends on the machine.
    """
    clock, drawn, called, inside = [0.0], 0, 0, False
    draw, picture = Progress._draw, Progress._picture

    def drawing(self: Progress) -> None:
        nonlocal drawn, inside
        drawn, inside = drawn + 1, True
        draw(self)
        inside = False

    def slow(self: Progress, width: int) -> Any:
        clock[0] += cost
        return picture(self, width)

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal called
        called += event == "call" and not inside and frame.f_code.co_name != "drawing"

    monkeypatch.setattr(Progress, "_draw", drawing)
    monkeypatch.setattr(Progress, "_picture", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = Progress("x", 100_000, console=terminal(), memory=lambda: {"active": 1, "peak": 1})
    with progress:
        drawn = 0  # what entering draws is not a step's
        sys.setprofile(count)
        for step in range(1, steps + 1):
            clock[0] += 0.001
            progress.step(step, 3.0, 1e-3, 1.0, 1000, 0.001, clock[0])
        sys.setprofile(None)
        made = drawn
    monkeypatch.undo()
    return made, called


def test_the_display_costs_steps_of_a_millisecond_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a step, and drawings that take a thousandth of the time, four a second at most."""
    drawn, called = work(8000, 0.004, monkeypatch)
    assert 1 <= drawn <= 3 and called <= 8000 * 1.01
    drawn, _ = work(8000, 1e-6, monkeypatch)
    assert 8 <= drawn <= 33


def test_a_display_that_draws_at_every_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxgpt.common.train.progress._INTERVAL", 0.0)
    monkeypatch.setattr("mlxgpt.common.train.progress._PATIENCE", 0)
    assert work(100, 0.004, monkeypatch)[0] == 100


def test_long_histories_are_thinned_and_keep_their_shape() -> None:
    progress = Progress("x", 10**6, console=Console(file=io.StringIO()), log_every=10**7)
    for step in range(1, 20_001):
        progress.step(step, 10.0 - step / 4000, 1e-3, 1.0, 1, 1e-3, 0.0)
    progress._take()
    assert len(progress._history) < 512
    drawn = sparkline(progress._history, 8)
    assert drawn == "\u2588\u2587\u2586\u2585\u2584\u2583\u2582\u2581"


def test_formats() -> None:
    assert [duration(s) for s in (0, 59.6, 754, 3723, 360000)] == ["0:00", "1:00", "12:34", "1:02:03", "100:00:00"]
    assert [short(n) for n in (7, 950, 999.9, 23_400, 999_900, 1_240_000, 2.5e9)] == [
        "7", "950", "1k", "23.4k", "1M", "1.24M", "2.5G",
    ]  # fmt: skip
    assert sparkline([], 5) == "" and sparkline([1.0, 1.0], 5) == "\u2581\u2581" and sparkline([1, 2], 1) == "\u2581"


def test_peak_is_known_for_apple_chips_only_and_never_for_a_cpu() -> None:
    assert chips.peak_flops("Apple M2 Max") == 13.5e12
    assert chips.peak_flops("cpu") is None
    assert chips.peak_flops("NVIDIA H200") == 67e12
    assert chips.peak_flops("NVIDIA Unknown") is None


def test_flops_of_a_token() -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=50)
    matrices = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
    assert chips.training_flops(config) == 6 * (matrices + 50 * 16) + 12 * 2 * 16 * 32
    untied = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=50, tied=False)
    assert chips.training_flops(untied) == chips.training_flops(config)
    assert params.count(untied) > params.count(config)


def test_bytes_are_never_shown_as_none() -> None:
    shown = [size(count) for count in (0, 512, 104_857, 104_858, 2**30 - 1, 2**30)]
    assert shown == ["0.0 MiB", "0.5 KiB", "102.4 KiB", "0.1 MiB", "1,024.0 MiB", "1.00 GiB"]
