"""What of the benchmarks can be wrong without being slow: the page they keep, the quartile claimed, the verdict."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as suite  # noqa: E402
from benchmarks import soak, train_step  # noqa: E402
from benchmarks.pairs import Contender, row  # noqa: E402
from benchmarks.report import Row, replace_section, table  # noqa: E402
from torch_ref import device as torch_device  # noqa: E402


def test_a_section_is_replaced_and_the_others_stay() -> None:
    page = "# Title\n\nIntro.\n\n## One\n\nold\n\n## Two\n\nkept\n\n### Below\n\nkept too\n\n## Notes\n\nby hand\n"
    made = replace_section(page, "One", "new\n\n| a |\n")
    assert made == page.replace("old", "new\n\n| a |")
    assert replace_section(made, "One", "old") == page
    added = replace_section(page, "Three", "more", before="Notes")
    assert (
        added.index("## Three\n\nmore\n") < added.index("## Notes")
        and added.replace("## Three\n\nmore\n\n", "") == page
    )
    assert replace_section(page, "Three", "more").endswith("by hand\n\n## Three\n\nmore\n")


def test_one_section_run_alone_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "REPORT", tmp_path / "benchmarks.md")
    suite.REPORT.write_text("# Benchmarks\n\n## Start-up\n\nfigures of last year\n\n## Notes\n\nby hand\n")
    suite.write("decode", table([Row("a", "b", "tok/s", 2.0, 1.0, [2.0], memory=10)]), 90)
    page = suite.REPORT.read_text()
    assert "figures of last year" in page and "by hand" in page
    section = page[page.index("## Decoding") : page.index("## Notes")]
    assert "| a " in section and re.search(r"1\.5 minutes; 2\d{3}-\d\d-\d\d, .* cores", section)
    assert "mlx " in section and "python -m benchmarks decode" in section


@pytest.mark.parametrize("name", suite.SECTIONS)
def test_every_section_is_a_module_that_tells_what_it_does(name: str) -> None:
    text = suite.about(name)
    assert text and "--json" not in text
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@pytest.mark.parametrize(("unit", "quartile"), [("tok/s", 1.75), ("s", 3.25), ("ms", 3.25), ("MiB", 3.25)])
def test_a_claim_rests_on_the_quartile_that_speaks_against_us(unit: str, quartile: float) -> None:
    found = Row("a", "b", unit, 1.0, 1.0, [1.0, 2.0, 3.0, 4.0])
    assert found.worse_quartile == quartile and f"{quartile:.2f}" in table([found])


def test_rates_times_and_memory_of_a_pair() -> None:
    ours, peer = Contender("a", "", ""), Contender("b", "", "")
    ours.rates, peer.rates, ours.cpu, peer.cpu = [10.0, 20.0], [5.0, 5.0], [1.0, 1.0], [2.0, 2.0]
    ours.peak, peer.peak = 2**20, 3 * 2**20
    rates, times, cpu = (
        row("x", "y", "tok/s", ours, peer),
        row("x", "y", "ms", ours, peer),
        row("x", "y", "tok/s", ours, peer, of="cpu"),
    )
    assert rates.ratios == [2.0, 4.0] and rates.ours == 15.0 and (rates.memory, rates.peer_memory) == (1.0, 3.0)
    assert times.ratios == [0.5, 0.25] and times.peer == 200.0
    assert cpu.ratios == [0.5, 0.5]


def series(growth: float, count: int = 4000, noise: float = 0.05) -> np.ndarray:
    draw = np.random.default_rng(3)
    values = 100.0 * (1 + np.linspace(0, growth, count)) * (1 + noise * draw.standard_normal(count))
    values[::100] *= 5  # a save, a validation
    values[: count // 20] *= 3  # compilation, caches
    return values


@pytest.mark.parametrize(("growth", "verdict"), [(0.0, "flat"), (-0.3, "flat"), (0.02, "flat"), (0.2, "grows")])
def test_the_soak_sees_a_drift_through_noise_and_outliers(growth: float, verdict: str) -> None:
    found = soak.trend(series(growth))
    assert found.verdict(0.05) == verdict
    assert found.low <= found.growth <= found.high and abs(found.growth - 0.9 * growth / (1 + growth / 2)) < 0.02


def test_a_soak_that_is_too_short_says_so() -> None:
    assert soak.trend(series(0.05, count=60, noise=0.3)).verdict(0.05) == "too short to tell"


def test_the_soak_fails_where_one_figure_grows() -> None:
    steps = np.arange(1, 4001)
    columns = {name: series(0.0) for name in soak.FIELDS} | {"step": steps}
    flat = np.stack([columns[name] for name in soak.FIELDS], axis=1)
    assert soak.judge({"mlx": [flat, flat], "torch": [flat, flat]})[1]
    for name in ("rss", "cpu", "active"):
        grown = flat.copy()
        grown[:, soak.FIELDS.index(name)] = series(0.2)
        assert not soak.judge({"mlx": [flat, grown], "torch": [flat, flat]})[1]


def test_the_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    """Every ratio of README.md's table of speeds stands in docs/benchmarks.md."""
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md"))
    speeds = readme.partition("## Speed")[2].partition("\n## ")[0]
    claims = re.findall(r"^\|.*\| *(\d[\d.]*) x", speeds, flags=re.MULTILINE)
    assert len(claims) >= 4
    figures = {float(found) for found in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", page)}
    for claim in claims:
        digits = len(claim.partition(".")[2])
        assert float(claim) in {round(figure, digits) for figure in figures}, claim


def test_torch_alone_on_a_device_is_timed_and_its_mfu_said(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 8, "vocab_size": 65, "batch": 2, "steps": 2}
    monkeypatch.setitem(train_step.SIZES, "least", size)
    for dtype in ("float32", "bfloat16"):
        assert train_step.engine("torch_ref", "least", "off", "cpu", dtype)() == 2 * 2 * 8
        assert train_step.torch_script("least", "off", "cpu", dtype)() == 2 * 2 * 8
    assert "the peak of cpu is not in the table" in train_step.utilization("cpu", "least", "float32", 1e6)
    monkeypatch.setattr(torch_device, "describe", lambda _: {"device": "NVIDIA H200"})
    said = train_step.utilization("cpu", "gpt2-124m", "bfloat16", 4e5)
    assert said == "400,000 tok/s, MFU 34.6 % of NVIDIA H200's 989 TFLOP/s in bfloat16"  # 855 MFLOP a token
