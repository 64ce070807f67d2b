"""``verify DIR module:FILE.py:Class``: the user's own code as the judge, with weights taken back by the map."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.adopt import module as own_module
from convert.formats.registry import open_model
from convert.verify import own, processes, verify
from convert.verify.logits import Floors, Pair
from convert.verify.report import Report
from mlxgpt.cli import main
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.inference.probe import Request
from mlxgpt.common.user_code import run as user_run
from torch_ref.probe import probe
from torch_ref.sample import Library

V, BLOCK = 17, 40

MODEL = """
import torch, torch.nn as nn, torch.nn.functional as F

class Head(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(c, d, bias=False) for _ in range(3))
        self.register_buffer('tril', torch.tril(torch.ones(40, 40)))
    def forward(self, x):
        t = x.shape[1]
        w = self.query(x) @ self.key(x).transpose(-2, -1) * self.key.weight.shape[0] ** -0.5
        return F.softmax(w.masked_fill(self.tril[:t, :t] == 0, -torch.inf), -1) @ self.value(x)

class Block(nn.Module):
    def __init__(self, c, h):
        super().__init__()
        self.heads = nn.ModuleList([Head(c, c // h) for _ in range(h)])
        self.proj = nn.Linear(c, c)
        self.net = nn.Sequential(nn.Linear(c, 4 * c), nn.ReLU(), nn.Linear(4 * c, c))
        self.ln1, self.ln2 = nn.LayerNorm(c), nn.LayerNorm(c)
    def forward(self, x):
        x = x + self.proj(torch.cat([h(self.ln1(x)) for h in self.heads], -1))
        return x + self.net(self.ln2(x))

class GPT(nn.Module):
    def __init__(self, depth=2, c=16, h=2):
        super().__init__()
        self.token_embedding_table, self.position_embedding_table = nn.Embedding(17, c), nn.Embedding(40, c)
        self.blocks = nn.Sequential(*[Block(c, h) for _ in range(depth)])
        self.ln_f, self.lm_head = nn.LayerNorm(c), nn.Linear(c, 17)
    def forward(self, i):
        x = self.token_embedding_table(i) + self.position_embedding_table(torch.arange(i.shape[1]))
        return self.lm_head(self.ln_f(self.blocks(x)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.py, its ckpt.pt, and the adopted folder."""
    place = tmp_path_factory.mktemp("own")
    (place / "model.py").write_text(MODEL)
    space: dict[str, Any] = {}
    exec(MODEL, space)
    torch.manual_seed(0)
    model = space["GPT"]()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    torch.save(model.state_dict(), place / "ckpt.pt")
    known = ["n_head=2", "activation=relu", "norm=layer", "position=learned"]
    given = [word for each in known for word in ("--set", each)]
    assert main(["adopt", str(place / "ckpt.pt"), "--out", str(place / "model"), *given, "--unproved"]) == 0
    return place


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The framework and the user's class run in this process, which spares their imports."""

    def framework(name: str, folders: dict[str, Path], plan: processes.Plan, work: Path, runs: processes.Runs) -> None:
        ids, greedy = np.load(plan.tokens), processes.GREEDY if plan.greedy else 0
        asked = Request(ids, plan.prompt, greedy, gradients=plan.gradients)
        for key, folder in folders.items():
            runs.arrays[name, key] = dict(probe(folder, asked, "cpu"))
        runs.exact = dict(probe(next(iter(folders.values())), dataclasses.replace(asked, exact=True), "cpu"))

    def process(module: own_module.Module, package: str, work: Path, seconds: float) -> list[str]:
        values = json.loads((work / "request.json").read_text())
        try:
            return user_run.run(Library(), user_run.Request(**values), user_run.Answer(work / "sample.npz"))
        except user_run.TheirError as error:
            raise UserError(f"{module}: {error}") from None

    monkeypatch.setattr(processes, "run_framework", framework)
    monkeypatch.setattr(own_module, "_process", process)


def judged(place: Path, source: str = MODEL, **more: Any) -> Report:
    """The report on the folder against class GPT of a source."""
    file = place / "judge.py"
    file.write_text(source)
    before = Path.cwd()
    try:
        return verify(place / "model", f"module:{file}:GPT", frameworks=["torch"], **more)
    finally:
        os.chdir(before)
        sys.modules.pop("judge", None)


def test_the_users_class_computes_the_same_with_weights_taken_back(place: Path) -> None:
    report = judged(place)
    assert report.agrees, report.findings
    checked = " ".join(f"{item.rung}: {item.what}" for item in report.checked)
    for said in ("agree, bit for bit", "x1 and x8", "6 places at x1 and x8", "by name at x1 and x8", "33 tokens"):
        assert said in checked
    assert {figure.what.split()[0] for figure in report.figures} == {"x1", "x8"}


@pytest.mark.parametrize(
    ("change", "rung"),
    [
        (("nn.ReLU()", "nn.GELU()"), "logits"),
        (("self.query(x) @ self.key(x)", "self.key(x) @ self.query(x)"), "logits"),
        (("nn.LayerNorm(c)", "nn.LayerNorm(c, eps=1e-3)"), "logits"),
        (("-1) @ self.value(x)", "-1).detach() @ self.value(x)"), "gradients"),
    ],
)
def test_a_class_that_computes_something_else_is_found(place: Path, change: tuple[str, str], rung: str) -> None:
    report = judged(place, MODEL.replace(*change))
    assert not report.agrees and rung in {finding.rung for finding in report.findings}
    assert rung != "gradients" or {finding.rung for finding in report.findings} == {"gradients"}


def test_log_probabilities_are_compared_as_such(place: Path) -> None:
    source = MODEL.replace(
        "return self.lm_head(self.ln_f(self.blocks(x)))",
        "return F.log_softmax(self.lm_head(self.ln_f(self.blocks(x))), -1)",
    )
    report = judged(place, source)
    assert report.agrees, report.findings
    assert any("log-probabilities" in note for note in report.notes)


def test_a_context_that_ends_before_greedy_does_is_said(place: Path) -> None:
    source = MODEL.replace(
        "    def forward(self, i):", "    def forward(self, i):\n        assert i.shape[1] in (*range(20), 40)"
    )
    report = judged(place, source)
    assert report.agrees, report.findings
    assert any(note.endswith("takes no more than 19 tokens: greedy stops there") for note in report.notes)


@pytest.mark.parametrize(("off", "gate"), [(3e-6, 3e-5), (1e-9, 1e-5), (1e-3, 1e-5)])
def test_sinusoids_in_float32_widen_the_gate_by_what_they_cost(off: float, gate: float) -> None:
    right = np.ones((40, 16), np.float32)
    floors = Floors(processes.Runs(), "A")
    for position, wanted in (("sinusoidal", gate), ("learned", 1e-5)):
        pair = Pair("", {"hidden.x1.embed": right}, {"hidden.x1.embed": right.astype(np.float64) * (1 + off)})
        floors.angles = own.angles(pair, ModelConfig(position=position, vocab_size=V))
        assert floors.gate("logits.x1", 0.0) == pytest.approx(wanted, rel=1e-3)
        assert floors.gate("logits.x8", 0.0) == 1e-5


def test_only_the_larger_weights_have_a_wide_gate() -> None:
    floors = Floors(processes.Runs(), "A")
    floors.wide = 4.0
    assert floors.gate("logits.x1", 1e-5) == pytest.approx(4e-5)
    assert floors.gate("gradient.x8.wte.weight", 1e-5) == pytest.approx(16e-5)


def test_a_checkpoint_of_theirs_is_held_against_the_folder(place: Path) -> None:
    right = verify(place / "model", f"module:{place / 'model.py'}:GPT@{place / 'ckpt.pt'}", weights_only=True)
    assert right.agrees, right.findings
    held = torch.load(place / "ckpt.pt")
    held["blocks.1.heads.0.key.weight"], held["blocks.1.heads.1.key.weight"] = (
        held["blocks.1.heads.1.key.weight"],
        held["blocks.1.heads.0.key.weight"],
    )
    torch.save(held, place / "swapped.pt")
    report = verify(f"module:{place / 'model.py'}:GPT@{place / 'swapped.pt'}", place / "model", weights_only=True)
    assert [finding.rung for finding in report.findings] == ["tensors"] and "h.1.attn" in report.findings[0].name


def test_their_tensors_come_back_bit_for_bit(place: Path) -> None:
    folder = open_model(place / "model")
    opened, made = own.open_side(f"module:{place / 'model.py'}:GPT", None, folder)
    found, held = own.theirs(made, opened, 1.0), torch.load(place / "ckpt.pt")
    assert found.keys() == held.keys()
    assert all(np.array_equal(found[name], held[name].numpy()) for name in held)
    grown = own.theirs(made, opened, 8.0)
    assert np.array_equal(grown["lm_head.weight"], 8 * found["lm_head.weight"])
    assert np.array_equal(grown["ln_f.weight"], found["ln_f.weight"])


@pytest.mark.parametrize(
    ("a", "b", "more", "said"),
    [
        ("bare", "module:model.py:GPT", {}, "expected a folder that mlxgpt adopt has written"),
        ("module:model.py:GPT", "module:model.py:GPT", {}, "expected a model folder on one side"),
        ("model", "module:none.py:GPT", {}, "none.py: no such file"),
        ("model", "model", {"kwargs": "{}"}, "--kwargs: expected module:FILE.py:Class on one side"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, a: str, b: str, more: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(place)
    shutil.copytree("model", "bare", dirs_exist_ok=True, ignore=shutil.ignore_patterns("map.toml"))
    with pytest.raises(UserError, match=said):
        verify(a, b, weights_only=True, **more)
