"""doctor: each rung sees what breaks it and nothing else does; nothing private is said; what is not there is said."""

from typing import Any

import numpy as np
import pytest
import torch
from doctor_mutations import GPU, MUTATIONS, apply

import mlxgpt.doctor
import torch_ref.doctor
from mlxgpt.common.doctor import measure, problems
from mlxgpt.common.doctor.compare import Pair, Side

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
