"""The verb ``report``: one self-contained page about one run or several, its figures as PNG and its curves as CSV.

The page has no script and loads nothing: it opens from disk, on a phone and on paper. ``--watch`` serves the same
page on this machine only, and renders it again when a run has written.
"""

import csv
import http.server
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from mlxgpt import __version__
from mlxgpt.common.errors import UserError
from mlxgpt.common.evaluate import diagnose
from mlxgpt.common.files import atomic_write
from mlxgpt.common.runs import plots
from mlxgpt.common.runs import summary as run_summary
from mlxgpt.common.runs.summary import Run
from mlxgpt.common.units import duration, short

REFRESH = 5
"""Seconds between reloads of a watched page."""
_SHORT_VALUE = 60


class Table(NamedTuple):
    """A table of text with a title."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def report_command(args: Namespace) -> int:
    """Writes the page, or with ``--watch`` serves it until Ctrl-C."""
    paths = [Path(run) for run in args.runs]
    if args.watch:
        return watch(paths, args.port)
    out = Path(args.out) if args.out else Path(f"{paths[0].resolve().name}.html")
    if out.is_dir():
        raise UserError(f"{out}: a folder; expected a file to write")
    export = Path(args.export) if args.export else None
    runs = _read(paths)
    if export:
        export.mkdir(parents=True, exist_ok=True)
        for run in runs:
            write_csv(run, export)
    page = render(runs, export=export)
    with atomic_write(out) as file:
        file.write(page.encode())
    print(f"{out}: {len(page) / 2**20:.1f} MiB, {len(runs)} run{'s' * (len(runs) > 1)}")
    if export:
        print(f"{export}: {len(list(export.glob('*.png')))} figures (PNG), {len(list(export.glob('*.csv')))} CSV files")
    return 0


def _read(paths: list[Path]) -> list[Run]:
    """The runs; runs with equal names are named by their paths."""
    runs = [run_summary.read_run(path) for path in paths]
    names = [run.name for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if names.count(run.name) > 1:
            run.name = str(path)
    return runs


def render(runs: list[Run], refresh: int = 0, export: Path | None = None) -> str:
    """The page as HTML; with ``export`` the figures also go there as PNG."""
    figures = plots.draw(runs, export)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    shown = [
        {
            "name": run.name,
            "color": color,
            "facts": facts(run),
            "samples": run.samples,
            "kinds": list(dict.fromkeys(kind for sample in run.samples for kind in sample.parts)),
            "recipe": (run.path / "recipe.toml").read_text(encoding="utf-8"),
        }
        for color, run in plots.colored(runs)
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    tables = [
        table
        for table in (_diagnosis(runs), _differing(runs), _planned(runs), _data(runs), _environment(runs))
        if table.rows
    ]
    return environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=_subtitle(runs),
        runs=shown,
        warnings=_warnings(runs),
        figures=figures,
        tables=tables,
        refresh=refresh,
        losses="" if any(run.aligned for run in runs) else "Losses are nats a token.",
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def facts(run: Run) -> list[tuple[str, str]]:
    """The facts on a run's card: (label, text)."""
    seconds = np.nansum(run.train["seconds"]) if "seconds" in run.train else 0.0
    made = [("status", f"{run.status}, {run.why}"), ("steps", f"{run.step:,} of {run.steps:,}")]
    if run.best:
        made.append(("best validation loss", f"{run.best[1]:.4f} at step {run.best[0]:,}"))
        if np.isfinite(run.bits_a_byte):
            made.append(("in bits a byte", f"{run.best[1] * run.bits_a_byte:.4f}"))
    made += [(f"{task} {name}", text) for task, name, text in _tasks(run)]
    if len(run.train["step"]):
        losses = run.train["loss"][-100:]
        if np.isfinite(losses).any():
            made.append((f"training loss, last {len(losses)} steps", f"{np.nanmean(losses):.4f}"))
        made.append(("tokens", short(float(run.train["tokens"][-1]))))
        speed = plots.tokens_per_second(run)
        if np.isfinite(speed).any():
            made.append(("tokens per second, median", short(float(np.nanmedian(speed)))))
        made.append(("time in steps", duration(float(seconds))))
    if "memory" in run.train:
        made.append(("peak memory", f"{np.nanmax(run.train['memory']) / 2**20:,.0f} MiB"))
    if run.parameters:
        made.append(("parameters", f"{run.parameters:,}"))
    if run.segments:
        newest = run.segments[-1]
        made.append(("framework", " ".join(str(newest.get(key, "")) for key in ("framework", "version", "device"))))
    if run.skipped:
        made.append(("updates skipped", str(run.skipped)))
    made.append(("on disk", f"{run.size / 2**20:,.1f} MiB, {len(run.checkpoints)} checkpoints"))
    return made


def _tasks(run: Run) -> list[tuple[str, str, str]]:
    """Task, its first metric, and that at the last validation."""
    made = []
    for task, groups in plots.tasks([run]).items():
        values = run.val[f"tasks/{task}/{groups[0][0]}"]
        if np.isfinite(values).any():
            at = int(np.flatnonzero(np.isfinite(values))[-1])
            made.append((task, groups[0][0], f"{values[at]:.4f} at step {int(run.val['step'][at]):,}"))
    return made


def _subtitle(runs: list[Run]) -> str:
    return "; ".join(dict.fromkeys(f"{run.framework or 'unknown framework'}, {run.status}" for run in runs))


def _warnings(runs: list[Run]) -> list[str]:
    """Warnings at the top of the page."""
    found = [f"{run.name}: {run.skipped} updates were skipped, not finite" for run in runs if run.skipped]
    return found + [f"{run.name}: {run.why}" for run in runs if run.status == "damaged"]


def _diagnosis(runs: list[Run]) -> Table:
    """What ``mlxgpt diagnose`` says of each run; with the corpus's n-grams where it was called before."""
    rows, quick = [], False
    for run in runs:
        if not len(run.train["step"]):
            continue
        corpus = diagnose.read_corpus(run)
        quick = quick or not (corpus or "tune" in run.recipe)
        name = [run.name] if len(runs) > 1 else []
        rows += [[finding.level, *name, *finding[1:]] for finding in diagnose.diagnose(run, corpus)]
    note = "mlxgpt diagnose RUN also counts the corpus: n-gram models, rare tokens, copies." if quick else ""
    return Table("Why is the loss what it is?", note, ["", *["run"][: len(runs) - 1], "about", "found", "change"], rows)


def _differing(runs: list[Run]) -> Table:
    """The keys in which the recipes differ."""
    keys = dict.fromkeys((section, key) for run in runs for section in run.recipe for key in run.recipe[section])
    rows = []
    for section, key in keys:
        values = [run.recipe.get(section, {}).get(key, "(absent)") for run in runs]
        if any(value != values[0] for value in values):
            rows.append([f"{section}.{key}", *map(_short, values)])
    note = "" if rows or len(runs) < 2 else "none"
    return Table("Settings that differ", note, ["key", *(run.name for run in runs)], rows)


def _planned(runs: list[Run]) -> Table:
    """What was predicted before each run, beside what it took; the last segment's."""
    with_plan = [run for run in runs if run.plan]
    keys = dict.fromkeys(name for run in with_plan for name in _numbers(run.plan.get("components")))
    columns = []
    for run in with_plan:
        plan, parts = _numbers(run.plan), _numbers(run.plan.get("components"))
        column = {name: _mib(parts.get(name)) for name in keys}
        for what, key, show in (("peak", "peak", _mib), ("time", "seconds", _time)):
            predicted, measured = plan.get(f"predicted_{key}"), plan.get(f"measured_{key}")
            column |= {f"{what}, predicted": show(predicted), f"{what}, measured": show(measured)}
            apart = f"{predicted / measured - 1:+.1%}" if predicted and measured else ""
            column[f"{what}, predicted from measured"] = apart
        columns.append(column | {"on": " ".join(str(run.plan.get(key, "")) for key in ("backend", "device"))})
    return _by_column("Plan against reality", [run.name for run in with_plan], columns)


def _numbers(values: Any) -> dict[str, float]:
    """The numbers among a mapping's values."""
    given = values.items() if isinstance(values, dict) else ()
    return {str(key): value for key, value in given if type(value) in (int, float)}


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f} MiB"


def _time(value: float | None) -> str:
    return "" if value is None else duration(value)


def _data(runs: list[Run]) -> Table:
    """The data of each run."""
    columns = []
    for run in runs:
        stored = run.segments[-1].get("data") if run.segments else None
        found = _numbers(stored)
        seen = run.train["tokens"][-1] if len(run.train.get("tokens", ())) else 0
        whole, val, size = (found.get(key, 0) for key in ("train_tokens", "val_tokens", "val_bytes"))
        data, train, model = (run.recipe.get(section, {}) for section in ("data", "train", "model"))
        targets = run.val.get("targets", np.array([]))
        digests = [f"{name} {str(digest)[:12]}" for name, digest in run.state.get("data", {}).items()]
        columns.append({
            "source": _short(data.get("source", "")),
            "tokenizer": _short(data.get("tokenizer", "")),
            "vocabulary": f"{int(model.get('vocab_size', 0)):,}",
            "training tokens": f"{whole:,}" if whole else "",
            "validation tokens": f"{val:,}" if val else "",
            **_held_out(stored.get("held_out") if isinstance(stored, dict) else None),
            "bytes a token": f"{size / val:.2f}" if size and val else "",
            "passes over the training tokens": f"{seen / whole:.3g}" if whole and seen else "",
            "rows x tokens a step": f"{int(train.get('batch_size', 0))} x {int(model.get('block_size', 0)):,}",
            "sampling": str(data.get("sampling", "")),
            "validation targets": f"{int(targets[-1]):,}" if len(targets) else "",
            "sha256": ", ".join(digests),
        })  # fmt: skip
    return _by_column("Data", [run.name for run in runs], columns)


def _held_out(found: Any) -> dict[str, str]:
    """Rows on the validation text; empty ones for runs that do not know."""
    names = ("validation share", "longest validation document", "unigram, validation", "unigram, training")
    rows: dict[str, str] = dict.fromkeys(names, "")
    if found:
        longest, cut = found["longest"], found["cut"]
        documents = f"the ends of {cut:,} of {found['documents']:,}" if cut else f"{found['documents']:,}"
        rows["validation share"] = f"{found['share']:.1%} of all tokens: {documents} documents"
        rows["longest validation document"] = f"{_short(longest['document'])}: {longest['share']:.1%} of the tokens"
        for name, side, other in (("validation", "val", "training"), ("training", "train", "validation")):
            nats = found["unigram"][side]
            rows[f"unigram, {name}"] = f"{nats['other']:.3f} nats from {other}'s counts, {nats['own']:.3f} from its own"
    return rows


def _environment(runs: list[Run]) -> Table:
    """A column for each segment: each start or resumption of a run."""
    keys = ("framework", "version", "device", "blas", "threads", "compiled", "python", "platform", "chip", "mlxgpt")
    heads, columns = [], []
    for run in runs:
        for segment in run.segments:
            heads.append(f"{run.name}, from step {int(segment.get('from_step', 0)) + 1:,}")
            column = {key: str(segment.get(key) if segment.get(key) is not None else "") for key in keys}
            commit = str(segment.get("commit") or "")[:10] + (" + changes" if segment.get("dirty") else "")
            columns.append({"started": str(segment.get("started", "")), **column, "commit": commit})
    return _by_column("Environment", heads, columns)


def _by_column(title: str, heads: list[str], columns: list[dict[str, str]]) -> Table:
    """A table from its columns; empty rows are dropped."""
    rows = [[key, *(column[key] for column in columns)] for key in (columns[0] if columns else ())]
    return Table(title, "", ["", *heads], [row for row in rows if any(row[1:])])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHORT_VALUE else f"...{text[-_SHORT_VALUE:]}"


def write_csv(run: Run, folder: Path) -> None:
    """NAME-train.csv and NAME-val.csv: every number of metrics.jsonl, at full precision."""
    name = run.name.replace("/", "_")
    for split, table in (("train", run.train), ("val", run.val)):
        if not len(table["step"]):
            continue
        with open(folder / f"{name}-{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            for values in zip(*table.values(), strict=True):
                writer.writerow(
                    [int(values[0]), *("" if np.isnan(value) else repr(float(value)) for value in values[1:])]
                )


def watch(paths: list[Path], port: int) -> int:
    """Serves the page on 127.0.0.1 until Ctrl-C; the page is rendered again only if a run has written since.

    Raises:
        UserError: the port is taken.
    """
    drawn: dict[str, Any] = {"at": None, "page": b""}
    _read(paths)  # reports a wrong path now, not in the browser

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/index.html"):
                self.send_error(404)
                return
            try:
                runs = _read(paths)
                at = [(run.changed, run.status, len(run.samples)) for run in runs]
                if at != drawn["at"]:
                    drawn.update(at=at, page=render(runs, REFRESH).encode())
                page, code = drawn["page"], 200
            except (UserError, OSError) as error:
                page, code = f"{error}\n".encode(), 500
            self.send_response(code)
            self.send_header("Content-Type", f"text/{'html' if code == 200 else 'plain'}; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        server = http.server.HTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; expected a free one") from None
    with server:
        print(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")
    return 0
