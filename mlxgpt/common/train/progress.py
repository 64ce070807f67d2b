"""The display of a run: two live lines on a terminal, a plain line every few steps elsewhere.

Drawing takes at most 0.1 % of the time: the next redraw waits 1000 times as long as the last one took. A narrow
terminal drops the least important parts; a closed pipe (``| head``) does not stop the run.
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from mlxgpt.common.units import duration, short, size

_SPARKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_HISTORY = 256  # points that the sparkline's losses are kept as
_INTERVAL = 0.25  # minimum seconds between redraws
_SPEED_WINDOW = 10.0  # seconds that the shown speed is measured over
_PATIENCE = 1000  # drawing may take 1 / this of the time


def sparkline(values: list[float], width: int) -> str:
    """``values`` as ``width`` block characters, the lowest to the highest."""
    count = min(width, len(values))
    if not count:
        return ""
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


class Progress:
    """The display of one run; a context manager.

    Args:
        name: the run's.
        steps: length of the schedule.
        start: steps that are over.
        log_every: steps between lines where there is no terminal.
        flops: of one training token; with ``peak`` (FLOP/s) it gives the MFU.
        memory: returns bytes in use, ``active`` and ``peak``.
        console: where to draw; stdout by default.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        start: int = 0,
        log_every: int = 10,
        flops: float = 0.0,
        peak: float | None = None,
        memory: Callable[[], dict[str, int]] | None = None,
        console: Console | None = None,
    ):
        self._name, self._steps, self._log_every = name, steps, log_every
        self._flops, self._peak, self._memory = flops, peak, memory
        self._console = console or Console()
        unicode = "utf" in (self._console.encoding or "").lower()
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.is_jupyter
        self._live = Live(console=self._console, auto_refresh=False) if terminal and unicode else None
        self._step = start
        self._loss = self._rate = self._norm = self._validation = math.nan
        self._best = math.nan  # loss of the best validation
        self._history: list[float] = []
        self._new: list[tuple[int, float, float, float, int, float]] = []  # steps since the last redraw
        self._stride, self._sum, self._count = 1, 0.0, 0
        self._tokens = self._seconds = 0.0  # of the steps that the speed is measured on
        self._began: tuple[float, int] | None = None  # time and step that the ETA counts from
        self._status, self._mute, self._next = "", False, 0.0
        self._drawn: tuple[int, list[int]] = (0, [])  # the terminal's width at the last redraw, and its lines' lengths

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Leaves the live lines as they are now; what is said from here on stands below them."""
        if self._live:
            self._status = ""
            self._draw()
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Prints ``text`` above the live lines, or as a line of its own."""
        # sampled text must not control the terminal
        clean = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        if self._live:
            self._erase_wrapped()
            self._console.print(Text(clean), soft_wrap=True)
        elif not self._mute:
            file = self._console.file
            encoding = getattr(file, "encoding", None) or "utf-8"
            try:
                print(clean.encode(encoding, "replace").decode(encoding), file=file, flush=True)
            except OSError:
                self._mute_output()

    def _mute_output(self) -> None:
        """The pipe is closed: neither this nor the interpreter's last flush may fail."""
        self._mute = True
        if self._console.file is sys.stdout:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, sys.stdout.fileno())
            os.close(devnull)

    def status(self, text: str) -> None:
        """Shows the current activity, if it is not a step, beside the live lines; empty = none."""
        self._status = text
        if self._live and (not text or time.perf_counter() >= self._next):
            self._draw()

    def step(self, step: int, loss: float, rate: float, norm: float, tokens: int, seconds: float, now: float) -> None:
        """Records a step that ended at ``now`` (time.perf_counter); redraws when due.

        The first step of a session, which compiles, does not count towards the speed.
        """
        self._new.append((step, loss, rate, norm, tokens, seconds))
        if self._live:
            if now >= self._next:
                self._draw()
        elif step % self._log_every == 0 or self._began is None:
            self._take()
            self.say(self._line())

    def _take(self) -> None:
        """Accumulates the steps since the last redraw."""
        for step, loss, _, _, tokens, seconds in self._new:
            if -math.inf < loss < math.inf:
                self._sum += loss
                self._count += 1
                if self._count >= self._stride:
                    self._remember()
            if self._began is None:
                self._began = (time.perf_counter(), step)
            else:
                self._tokens += tokens
                self._seconds += seconds
        if self._new:
            self._step, self._loss, self._rate, self._norm, *_ = self._new[-1]
            self._new.clear()

    def validation(
        self, step: int, found: dict[str, float], name: str, best: dict[str, float] | None, more: str = ""
    ) -> None:
        """Records a validation: its metrics ``found``, the best one by the metric ``name``; ``more`` is said, too."""
        self._validation, self._best = found["loss"], best["loss"] if best else math.nan
        mark = ""
        if best:
            earlier = f"best {best[name]:.4f}" if name == "loss" else f"best {name} {best[name]:.4f}"
            mark = "  (best so far)" if best["step"] == step else f"  ({earlier} at step {int(best['step'])})"
        text = "".join(f"  {key} {value:.4f}" for key, value in found.items() if key != "loss")
        self.say(f"step {step}/{self._steps}  validation loss {found['loss']:.4f}{text}{more}{mark}")

    def _remember(self) -> None:
        """Appends the mean of the last steps to the sparkline; merges pairs of points when there are too many."""
        self._history.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._history) >= 2 * _HISTORY:
            self._history = [(a + b) / 2 for a, b in zip(self._history[::2], self._history[1::2], strict=True)]
            self._stride *= 2

    def _eta(self) -> str:
        if self._began is None or self._step <= self._began[1]:
            return ""
        pace = (time.perf_counter() - self._began[0]) / (self._step - self._began[1])
        return f"eta {duration(pace * (self._steps - self._step))}"

    def _speed(self) -> list[str]:
        """Tokens a second and, where the chip is known, MFU."""
        if not self._seconds:
            return []
        rate = self._tokens / self._seconds
        known = self._peak and self._flops
        return [f"{short(rate)} tok/s"] + (
            [f"MFU {rate * self._flops / self._peak:.0%}"] if known and self._peak else []
        )

    def _line(self) -> str:
        """The step as one plain line."""
        parts = [f"step {self._step}/{self._steps}", f"loss {self._loss:.4f}", f"lr {self._rate:.2e}"]
        parts += [f"norm {self._norm:.3g}", *self._speed(), self._eta()]
        return "  ".join(part for part in parts if part)

    def _draw(self) -> None:
        assert self._live
        began = time.perf_counter()
        self._take()
        self._erase_wrapped()
        picture = self._picture(self._console.width)
        self._drawn = (self._console.width, [line.cell_len for line in picture.split("\n")])
        self._live.update(picture, refresh=True)
        now = time.perf_counter()
        self._next = now + max(_INTERVAL, _PATIENCE * (now - began))

    def _erase_wrapped(self) -> None:
        """A terminal that became narrower wraps the lines on it, and rich erases only as many as it drew."""
        before, lengths = self._drawn
        width = self._console.width
        if width < before:
            extra = sum(max(1, -(-length // width)) - 1 for length in lengths)
            self._console.control(Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * extra))
            self._drawn = (width, [])

    def _picture(self, width: int) -> Text:
        """Two lines of at most ``width`` cells."""
        share = min(1.0, self._step / self._steps)
        ends = [f" {self._step}/{self._steps}", f" {share:.0%}", f"  {self._eta()}" if self._eta() else ""]
        ends = ends if sum(map(len, ends)) + 8 <= width else ends[:1]
        room = width - sum(map(len, ends)) - 1
        name = self._name if len(self._name) + 8 <= room else ""
        bar = max(0, min(40, room - len(name) - 1))
        done = round(share * bar)
        picture = Text(no_wrap=True, overflow="crop")
        picture.append(f"{name} " if name else "", "bold")
        picture.append("\u2501" * done, "green").append("\u2501" * (bar - done), "bright_black")
        picture.append("".join(ends)[: max(0, width - 1)]).append("\n")

        parts: list[tuple[str, str]] = []
        if math.isfinite(self._loss) or self._history:
            parts += [(f"loss {self._loss:.4f}", "bold"), (sparkline(self._history, max(8, width // 6)), "cyan")]
        if self._status:
            parts.insert(0, (self._status, "yellow"))
        if math.isfinite(self._validation):
            best = f" (best {self._best:.4f})" if self._best < self._validation else ""
            parts.append((f"val {self._validation:.4f}{best}", "magenta"))
        parts += [(text, "") for text in self._speed()]
        if self._memory:
            parts.append((size(self._memory()["active"]), ""))
        if math.isfinite(self._rate):
            parts.append((f"lr {self._rate:.1e}", "bright_black"))
        used = 0
        for text, style in parts:
            if used + len(text) + 2 >= width:
                break
            picture.append(("  " if used else "") + text, style)
            used += len(text) + (2 if used else 0)
        return picture
