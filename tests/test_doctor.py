"""doctor: each rung sees what breaks it and nothing else does; nothing private is said; what is not there is said."""

import json
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from doctor_mutations import GPU, MUTATIONS, apply

import mlxgpt.doctor
import torch_ref.doctor
from mlxgpt import cli
from mlxgpt.common import backend
from mlxgpt.common.config import Recipe
from mlxgpt.common.doctor import examine, facts, measure, private, problems, speed
from mlxgpt.common.doctor.compare import Pair, Side
from mlxgpt.common.plan import compute

ROOT = Path(__file__).parent.parent
HALVES = {"mlx": mlxgpt.doctor, "torch": torch_ref.doctor}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def gpu(metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both frameworks have a GPU, which computes as the CPU does."""
    devices = torch_ref.doctor.devices
    described = devices.describe

    def use(name: str = "auto") -> torch.device:
        GPU["torch"] = name != "cpu"
        return torch.device("cpu")

    def describe(device: torch.device) -> dict[str, str]:
        return described(device) | ({"device": "Fake GPU"} if GPU["torch"] else {})

    monkeypatch.setitem(GPU, "torch", False)
    monkeypatch.setattr(devices, "use", use)
    monkeypatch.setattr(devices, "describe", describe)


TINY = problems._problem(
    "gpt2", 2, 8, {"family": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 64, "block_size": 40, "vocab_size": 150},
    dropout=0.1, loss_chunk=64,
)  # fmt: skip


def ladder(framework: str, device: str, exact: bool = False) -> Arrays:
    """The arrays of a model that is smaller than doctor's, with dropout and learned positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "problems", lambda quick, long: [TINY])
        return dict(measure.ladder(HALVES[framework], device, True, exact=exact))


@pytest.fixture(scope="module")
def cpus() -> dict[str, Arrays]:
    return {name: ladder(name, "cpu") for name in HALVES}


def failed(framework: str, found: Arrays, expected: Arrays) -> set[str]:
    pair = Pair((Side(framework, False), Side(framework, True)), (found, expected), None)
    for one in (findings := list(pair.findings())):
        print(one)
    return {one.rung for one in findings if one.verdict == "FAILED"}


@pytest.mark.parametrize("framework", HALVES)
def test_a_gpu_that_computes_as_the_cpu_does_passes(framework: str, cpus: dict[str, Arrays], gpu: None) -> None:
    assert failed(framework, ladder(framework, "gpu"), cpus[framework]) == set()


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("framework", HALVES)
def test_what_a_gpu_does_wrong_fails_its_rungs_and_no_other(
    framework: str, mutation: str, cpus: dict[str, Arrays], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(MUTATIONS[mutation], framework, monkeypatch)
    assert failed(framework, ladder(framework, "gpu"), cpus[framework]) == set(MUTATIONS[mutation].rungs)


# the whole report


JANE = {"LOGNAME": "jane.doe", "USER": "jane.doe", "HOME": "/Users/jane.doe", "SECRET_TOKEN": "hf_secret",
        "OMP_PLACES": "/Users/jane.doe/places", "OMP_NUM_THREADS": "1"}  # fmt: skip
PRIVATE = ("jane", "doe", "macbook", "hf_secret", "/Users", "/private", "/places")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """What doctor starts computes tiny models, in this process."""

    def start(name: str, out: Path, device: str, quick: bool) -> str:
        measure.main(HALVES[name], ["--out", str(out), "--device", device, *["--quick"] * quick])
        return ""

    sizes = [speed._sized("1 2 32 16 64", 2), speed._sized("1 4 64 16 64", 2)]
    monkeypatch.setattr(examine, "start", start)
    monkeypatch.setattr(problems, "problems", lambda quick, long: [TINY])
    monkeypatch.setattr(speed, "sizes", lambda cpu: sizes)
    monkeypatch.setattr(speed, "WHOLE", 1000.0)
    monkeypatch.setattr(speed, "STREAMS", {True: (1,), False: (1,)})
    for half in HALVES.values():  # PyTorch's profiler takes seconds to start
        monkeypatch.setattr(half.footprint, "footprint", lambda *_: SimpleNamespace(peak=10**6))
        monkeypatch.setattr(half.footprint, "measure", lambda job, _: {"peak": 10**6 * 2 // job.recipe.model.n_head})


def doctor(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    """Exit code and what was printed."""
    code = cli.main(["doctor", *words])
    return code, capsys.readouterr().out


def test_two_cpus_are_held_against_each_other(tiny: None, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    code, said = doctor(capsys, "--json", "--out", str(tmp_path / "doctor.json"))
    report = json.loads(said)
    assert code == 0 and report["verdict"] == "ok" and (tmp_path / "doctor.json").read_text() == said
    assert [one["rung"] for one in report["ladder"]] == list(measure.RUNGS)
    assert {one["compared"] for one in report["ladder"]} == {"MLX CPU | PyTorch CPU"}
    assert (
        {row["framework"] for row in report["speed"]}
        == {row["framework"] for row in report["bandwidth"]}
        == set(HALVES)
    )
    assert all(row["tokens_per_second"] > 0 and row["memory_predicted"] == 10**6 for row in report["speed"])
    assert [row["verdict"] for row in report["speed"]] == ["ok", "memory off"] * 2
    documented = (ROOT / "docs/doctor.md").read_text().partition("## `--json`")[2]
    keys = {*report, *report["machine"], *report["ladder"][0], *report["speed"][0], *report["bandwidth"][0]}
    assert {key for key in keys if f"`{key}`" not in documented} == set()


def test_a_gpu_is_held_against_its_cpu_and_the_other_framework(
    tiny: None, gpu: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(MUTATIONS["quantized is refused"], "mlx", monkeypatch)
    for name, value in JANE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "janes-macbook.local")
    code, said = doctor(capsys, "--device", "gpu")
    assert code == 1
    lines = said.splitlines()
    for pair in ("MLX GPU | MLX CPU", "PyTorch GPU | PyTorch CPU", "MLX GPU | PyTorch GPU"):
        verdicts = {line.split()[0]: "FAILED" in line for line in lines if pair in line}
        assert list(verdicts) == list(measure.RUNGS)
        assert {rung for rung, failed in verdicts.items() if failed} == ({"quantized"} if "MLX" in pair else set())
    assert "Command buffer execution failed" in said and "not in the table of chips" in said
    assert "OMP_NUM_THREADS=1" in said and "OMP_PLACES=(set)" in said
    assert [word for word in PRIVATE if word in said.lower()] == []
    assert lines[-1].startswith("verdict: FAILED (19 ok, 2 FAILED)")


def test_a_cpu_alone_is_held_against_what_there_is(tiny: None, capsys: pytest.CaptureFixture) -> None:
    for name, there in (("mlx", {"cache"}), ("torch", {"cache", "logits", "gradients", "lora"})):
        code, said = doctor(capsys, "--json", "--quick", "--backend", name)
        verdicts = {one["rung"]: one["verdict"] for one in json.loads(said)["ladder"]}
        assert code == 0 and verdicts == {rung: "ok" if rung in there else "not here" for rung in measure.RUNGS}


def test_a_framework_whose_process_ends_is_a_failed_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "doctor.py").write_text(
        "import os, sys\nprint('Abort trap in /Users/jane.doe/mlx/kernel.metal', file=sys.stderr)\nos.abort()"
    )
    (tmp_path / "broken" / "device.py").write_text(
        "def use(name): pass\ndef describe(_): return {'device': 'cpu', 'version': '1', 'tf32': 'off'}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(backend, "PACKAGES", {"mlx": "broken"})
    code, said = doctor(capsys, "--quick", "--json")
    found = json.loads(said)
    assert code == 1 and found["ladder"][0]["verdict"] == "FAILED"
    assert "SIGABRT: Abort trap in kernel.metal" in found["ladder"][0]["note"]


def test_what_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx.core.is_available", lambda device: "cpu" in str(device))
    for words, said in {
        (
            "--device",
            "tpu",
        ): "--device tpu: MLX has cpu on this machine; expected auto or one of these; --device tpu: PyTorch has",
        ("--device", "gpu", "--backend", "mlx"): "--device gpu: MLX has cpu on this machine; expected auto or",
        ("--backend", "jax"): "choose from 'mlx', 'torch'",
        ("--out", str(tmp_path)): "expected a file in a folder that exists",
    }.items():
        assert cli.main(["doctor", *words]) == 2
        shown = capsys.readouterr()
        assert said in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_where_tf32_was_asked_for_its_gates_hold_and_are_said(
    tiny: None, gpu: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(MUTATIONS["products in TF32"], "torch", monkeypatch)
    states = {"off": (1, "FAILED"), "on": (0, "TF32 is on: float32 products are rounded"), "unknown": (2, "")}
    describe = torch_ref.doctor.devices.describe
    for state, (code, words) in states.items():
        monkeypatch.setattr(
            torch_ref.doctor.devices, "describe", lambda device, s=state: {**describe(device), "tf32": s}
        )
        found, said = doctor(capsys, "--quick", "--backend", "torch", "--device", "gpu")
        assert found == code and words in said


# what a machine says of itself

MAC = {
    "sysctl -n machdep.cpu.brand_string": "Apple M2 Pro",
    "sysctl -n sysctl.proc_translated": "0",
    "sysctl -n kern.memorystatus_vm_pressure_level": "2",
    "sysctl -n vm.swapusage": "total = 2048.00M  used = 1024.25M  free = 1023.75M  (encrypted)",
    "pmset -g therm": "Note: No thermal warning level has been recorded\n\tCPU_Speed_Limit \t= 80\n",
    "pmset -g batt": "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1234567)\t63%; discharging",
    "pmset -g": "System-wide power settings:\n lowpowermode         1\n",
}


def test_a_mac_says_what_slows_it_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts.sys, "platform", "darwin")
    monkeypatch.setattr(facts, "_said", lambda *command: MAC.get(" ".join(command)))
    assert facts.pressure() == {
        "thermal": "CPU_Speed_Limit 80",
        "memory_pressure": "warning",
        "swap": "1024.25M",
        "power": "Battery Power, low power mode",
    }
    monkeypatch.setitem(MAC, "pmset -g therm", "Note: No thermal warning level has been recorded")
    assert facts.pressure()["thermal"] == "no warning recorded"
    monkeypatch.setattr(facts, "_said", lambda *command: None)
    assert set(facts.pressure().values()) == {None}


def test_rosetta_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An x86-64 Python on Apple Silicon; any other name of the value is an error of sysctl, which reads as no."""

    def sysctl(command: list[str], **_: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 0, {"sysctl.proc_translated": "1\n"}.get(command[-1], ""), "")

    monkeypatch.setattr(backend.subprocess, "run", sysctl)
    monkeypatch.setattr(backend.sys, "platform", "darwin")
    for machine, expected in (("x86_64", True), ("arm64", False)):
        monkeypatch.setattr(backend.platform, "machine", lambda machine=machine: machine)
        assert backend.translated() is expected


def test_linux_says_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"/proc/pressure/memory": "some avg10=1.25 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00",
            "/proc/meminfo": "MemTotal: 8 kB\nSwapTotal:       4096 kB\nSwapFree:        1024 kB\n"}  # fmt: skip
    monkeypatch.setattr(facts.sys, "platform", "linux")
    monkeypatch.setattr(facts, "_text", lambda path: said.get(str(path)))
    found = facts.pressure()
    assert (found["memory_pressure"], found["swap"]) == ("1.25 % of the last 10 s waited", "3M")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/Users/bob/x/lib.metal: no such file", "lib.metal: no such file"),
        ("cannot open '/home/bob'", "cannot open '(path)'"),
        ("C:\\Users\\bob\\a.txt", "a.txt"),
        ("owned by Jane.Doe@janes-mac", "owned by ...@..."),
        ("3 tokens/s, input/output", "3 tokens/s, input/output"),
        ("janet", "janet"),
    ],
)
def test_names_and_paths_are_left_out(text: str, clean: str) -> None:
    assert private.clean({"note": [text]}, ["janes-mac", "jane.doe", "jane"]) == {"note": [clean]}


# how long it takes


@pytest.mark.parametrize("rate", [1e9, 1e10, 1e11, 1e12])
def test_a_slow_machine_leaves_out_what_it_has_no_time_for(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Engine:
        def __init__(self, recipe: Recipe, *_: Any) -> None:
            tokens = recipe.train.batch_size * recipe.model.block_size
            self.flops = compute.flops(recipe, recipe.model.block_size, recipe.train.batch_size).exact * tokens

        def train_step(self, *_: Any) -> None:
            now[0] += self.flops / rate

    stub: Any = SimpleNamespace(
        COMPILE="off", devices=SimpleNamespace(use=str, describe=lambda _: {"device": "cpu"}),
        footprint=SimpleNamespace(footprint=lambda *_: SimpleNamespace(peak=1), measure=lambda *_: {"peak": 1}),
        engine=SimpleNamespace(Engine=Engine),
    )  # fmt: skip
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(speed.params, "init_params", lambda *_: {})
    rows = list(speed.steps(stub, "cpu", 2**40, until=100.0))
    assert now[0] <= speed.SECONDS
    assert [row["verdict"] for row in rows] == ["ok", *["left out" if rate == 1e9 else "ok"] * 2]
    assert {row["note"] for row in speed.steps(stub, "cpu", 2**40, until=now[0] - 1)} == {speed.BUSY}
    assert {row["note"] for row in speed.bandwidth(stub, "cpu", until=now[0] - 1)} == {speed.BUSY}


def test_the_ladder_is_small() -> None:
    """FLOPs of the ladder on one CPU: at 1 GFLOP/s, what an unoptimized BLAS gives, below a minute."""
    whole = 0.0
    for problem in problems.problems(False, long=False):
        length, rows = problem.recipe.model.block_size, problem.rows
        pass_ = compute.flops(problem.recipe, length, rows).exact * length * rows
        whole += pass_ * (problem.steps + 4 * 4 / 3 + 1)  # four rungs with logits and gradients; the cache
    assert whole < 60e9
