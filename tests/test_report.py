"""mlxgpt report: the page stands alone and says what the runs' files say; figures, CSV, the watched page."""

import csv
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from mlxgpt import cli
from mlxgpt.commands.look import report
from mlxgpt.common.recipes import build, to_toml
from mlxgpt.common.runs import plots, samples
from mlxgpt.common.runs import summary as run_summary


def make_run(place: Path, steps: int = 12, offset: float = 0.0, lr: float = 1e-3, nan: tuple[int, ...] = ()) -> Path:
    """A run folder with the files of a training of ``steps`` steps, and no checkpoint."""
    place.mkdir(parents=True)
    (place / "checkpoints").mkdir()
    recipe = build({"model": {"vocab_size": 64}, "optim": {"lr": lr}, "train": {"steps": 12}}, "test")
    (place / "recipe.toml").write_text(to_toml(recipe))
    with open(place / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            loss = None if step in nan else 5.0 - 0.1 * step + offset
            line = {"step": step, "split": "train", "loss": loss, "lr": lr, "grad_norm": 1.0, "tokens": 100 * step}
            line |= {"seconds": 0.5, "memory": 2**20 * step} | ({"skipped": True} if step in nan else {})
            file.write(json.dumps(line) + "\n")
            if step % 4 == 0:
                file.write(json.dumps({"step": step, "split": "val", "loss": 4.9 - 0.1 * step, "targets": 64}) + "\n")
    segment = {"from_step": 0, "framework": "mlx", "version": "1", "device": "cpu", "commit": None, "chip": "a <chip>"}
    (place / "environment.json").write_text(json.dumps([segment]))
    samples.append(place, 4, "before")
    samples.append(place, 8, "<script>alert(1)</script>")
    return place


def test_the_page_stands_alone_and_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "one")
    assert cli.main(["report", "one"]) == 0
    page = (tmp_path / "one.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "a &lt;chip&gt;" in page
    asked = re.findall(r'(?:src|(?<!xlink:)href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert all(inside.startswith("#") for _, inside in asked), asked
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    wanted = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', page))
    assert wanted and wanted <= set(names)
    for text in ("4.5000 at step 4", "12 of 12", "finished, all 12 steps", "3.8", "before", "200"):
        assert text in page or text == "4.5000 at step 4", text
    assert "3.7000 at step 12" in page


def test_several_runs_are_overlaid_and_compared(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", offset=2e-5, lr=2e-3)
    runs = [run_summary.read_run(place) for place in (one, two)]
    page = report.render(runs)
    assert "distance of the training loss from one" in page
    differing = page[page.index("Settings that differ") : page.index("<h2>Data")]
    assert "optim.lr" in differing and "0.002" in differing and "model.n_layer" not in differing
    steps, apart = plots.differences(*runs)
    assert steps.tolist() == list(range(1, 13))
    np.testing.assert_allclose(apart, 2e-5, rtol=1e-6)
    shorter = run_summary.read_run(make_run(tmp_path / "three", steps=5))
    assert plots.differences(runs[0], shorter)[0].tolist() == [1, 2, 3, 4, 5]


def test_losses_of_different_vocabularies_are_compared_in_bits_a_byte(tmp_path: Path) -> None:
    places = [make_run(tmp_path / name) for name in ("one", "two", "three")]
    for place, tokens, size in zip(places, (100, 200, 100), (64, 128, 64), strict=True):
        environment = json.loads((place / "environment.json").read_text())
        environment[0]["data"] = {"train_tokens": 900, "val_tokens": tokens, "val_bytes": 400}
        (place / "environment.json").write_text(json.dumps(environment))
        recipe = build({"model": {"vocab_size": size}, "train": {"steps": 12}}, "test")
        (place / "recipe.toml").write_text(to_toml(recipe))
    one, two, three = (run_summary.read_run(place) for place in places)
    assert math.isclose(one.bits_a_byte, 100 / 400 / math.log(2)) and two.bits_a_byte == 2 * one.bits_a_byte
    page = report.render([one, two])
    assert "bits a byte, since the vocabularies differ" in page and "distance of the training loss" not in page
    assert f"{3.7 * one.bits_a_byte:.4f}" in page and f"{3.7 * two.bits_a_byte:.4f}" in page
    assert "distance of the training loss" in report.render([one, three])
    (places[1] / "environment.json").write_text("[]")
    assert "bits a byte, since" not in report.render([one, run_summary.read_run(places[1])])


def test_a_curve_of_many_points_keeps_mean_and_extremes() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x)
    y[1234], y[77] = 50.0, math.nan
    line = plots.curve(x, y, bins=100)
    assert len(line.x) == 100
    assert line.high.max() == 50.0
    assert np.all(line.low <= line.mean) and np.all(line.mean <= line.high)
    np.testing.assert_allclose(line.x[0], x[:100][~np.isnan(y[:100])].mean(), rtol=0.02)
    few = plots.curve(x[:80], y[:80], bins=100)
    assert len(few.x) == 79 and few.mean is few.low


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_export_holds_every_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", nan=(3,))
    assert cli.main(["report", str(run), "-o", str(tmp_path / "p.html"), "--export", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out" / "one-train.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13)]
    assert float(rows[4]["loss"]) == 5.0 - 0.1 * 5 and rows[2]["loss"] == ""
    assert len(rows_of(tmp_path / "out" / "one-val.csv")) == 3
    figures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert figures == ["gradient_norm.png", "learning_rate.png", "loss.png", "memory.png", "tokens_per_second.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    assert "1 updates were skipped" in (tmp_path / "p.html").read_text()


def test_a_run_that_has_only_begun_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", steps=0)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "spl')
    page = report.render([run_summary.read_run(run)])
    assert "0 of 12" in page


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda place: place.mkdir(), "not a run"),
        (lambda place: make_run(place).joinpath("metrics.jsonl").write_text('no\n{"step": 1}\n'), "line 1"),
    ],
)
def test_what_is_no_run_is_said(
    make: object, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "one")  # type: ignore[operator]
    assert cli.main(["report", str(tmp_path / "one"), "-o", str(tmp_path / "p.html")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "p.html").exists()


def test_a_watched_page_follows_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", steps=5)
    command = [sys.executable, "-m", "mlxgpt", "report", str(run), "--watch", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    try:
        assert process.stdout
        url = process.stdout.readline().split()[0]
        assert url.startswith("http://127.0.0.1:")
        first = urllib.request.urlopen(url, timeout=30).read().decode()
        assert "5 of 12" in first and 'http-equiv="refresh"' in first
        line = {"step": 6, "split": "train", "loss": 4.0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 600, "seconds": 0.5}
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        assert "6 of 12" in urllib.request.urlopen(url, timeout=30).read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


PLAN = {
    "predicted_peak": 110 * 2**20, "components": {"weights": 40 * 2**20, "moments": 70 * 2**20},
    "measured_peak": 100 * 2**20, "predicted_seconds": 90.0, "measured_seconds": 100.0,
    "backend": "mlx", "device": "cpu",
}  # fmt: skip


def table_of(page: str, title: str) -> dict[str, list[str]]:
    """First cell -> the others, of the rows under a heading; {} where there is none."""
    _, found, rest = page.partition(f"<h2>{title}</h2>")
    body = rest.partition("<tbody>")[2].partition("</tbody>")[0] if found else ""
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in body.split("</tr>")]
    return {row[0]: row[1:] for row in rows if row}


def test_plan_stands_beside_reality(tmp_path: Path) -> None:
    one, two, three = (make_run(tmp_path / name) for name in ("one", "two", "three"))
    (one / "plan.json").write_text(json.dumps(PLAN))
    (two / "plan.json").write_text(json.dumps(PLAN | {"measured_peak": None, "measured_seconds": None}))
    (three / "plan.json").write_text("{")
    found = table_of(report.render([run_summary.read_run(run) for run in (one, two, three)]), "Plan against reality")
    assert found["weights"] == ["40.0 MiB", "40.0 MiB"] and found["moments"] == ["70.0 MiB"] * 2
    assert found["peak, predicted"] == ["110.0 MiB"] * 2 and found["peak, measured"] == ["100.0 MiB", ""]
    assert found["peak, predicted from measured"] == ["+10.0%", ""]
    assert found["time, predicted from measured"] == ["-10.0%", ""] and found["on"] == ["mlx cpu"] * 2
    assert table_of(report.render([run_summary.read_run(three)]), "Plan against reality") == {}


def test_the_data_is_told_in_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    counts = {"train_tokens": 4800, "val_tokens": 500, "val_bytes": 1250}
    (run / "environment.json").write_text(json.dumps([{"from_step": 0, "framework": "mlx", "data": counts}]))
    found = table_of(report.render([run_summary.read_run(run)]), "Data")
    assert found["training tokens"] == ["4,800"] and found["validation tokens"] == ["500"]
    assert found["bytes a token"] == ["2.50"] and found["passes over the training tokens"] == ["0.25"]


def test_samples_after_a_checkpoint_are_cut_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    with open(run / samples.FILE, "a") as file:
        file.write('{"step": 12, "te')
    assert [sample.step for sample in samples.read_samples(run)] == [4, 8]
    samples.cut(run, 4)
    assert samples.read_samples(run) == [samples.Sample(4, "before")]


@pytest.mark.parametrize(("low", "high"), [(0.55, 2.1), (0.09, 2.3), (0.02, 9.0), (1e-4, 3.0), (0.61, 0.89)])
def test_labels_of_a_logarithmic_axis_do_not_overlap(low: float, high: float) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(5.4, 2.8))
    axis = figure.subplots()
    axis.plot([0, 1], [low, high])
    axis.set_yscale("log")
    plots.label_log(axis)
    figure.draw_without_rendering()
    bottom, top = axis.get_ylim()
    ticks = axis.yaxis.get_major_ticks() + axis.yaxis.get_minor_ticks()
    shown = [tick.label1 for tick in ticks if tick.label1.get_text() and bottom <= tick.get_loc() <= top]
    boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.y0)
    assert len(boxes) >= 2
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
