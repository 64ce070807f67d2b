"""Errors of the frameworks and of the system end as one line, and a run that met one goes on from its checkpoint."""

import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from fake_train import Go, losses

from mlxgpt import cli, verbs
from mlxgpt.common import failures
from mlxgpt.common.backend import PACKAGES, without_signals
from mlxgpt.common.config import ModelConfig, Recipe, TrainConfig
from mlxgpt.common.folders import resolve
from mlxgpt.common.plan import advice, machine
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.train import saver
from mlxgpt.common.train.signals import Signals


class OutOfMemoryError(RuntimeError):
    """In place of torch.OutOfMemoryError."""


METAL = "[METAL] Command buffer execution failed: {}."
CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 5.25 GiB is "
    "free. Including non-PyTorch memory, this process has 134.55 GiB memory in use. Of the allocated memory ..."
)
# What is raised -> what the line says after "out of memory".
MEMORY: list[tuple[Exception, str]] = [
    (
        RuntimeError(
            "[metal::malloc] Attempting to allocate 34359738368 bytes which is greater than the maximum allowed buffer "
            "size of 22613000192 bytes."
        ),
        ": an array of 32.00 GiB, more than the 21.06 GiB that one buffer of this GPU holds",
    ),
    (
        RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
        ": more arrays at once than Metal's limit (499000)",
    ),
    (RuntimeError("[malloc] Unable to allocate 17179869184 bytes."), ": 16.00 GiB could not be allocated"),
    (RuntimeError("[malloc_or_wait] Unable to allocate 1048576 bytes."), ": 1.0 MiB could not be allocated"),
    (
        RuntimeError(METAL.format("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)")),
        ": Metal stopped the GPU's work",
    ),
    (RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"), ""),
    (RuntimeError("cudaErrorMemoryAllocation"), ""),
    (OutOfMemoryError(CUDA), ": 20.00 GiB could not be allocated, the GPU has 139.81 GiB, of which 5.25 GiB is free"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 8.13 GiB (GPU 0; 10.76 GiB total)"), ": 8.13 GiB could"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), ""),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), ": cuBLAS could"),
    (RuntimeError("cublasLtCreate(&storage.handle) failed with code: 3."), ": cuBLAS could not start"),
    (
        OutOfMemoryError(CUDA.replace("in use. ", "in use. 7.00 GiB allowed; ")),  # train.memory_limit
        ": 20.00 GiB could not be allocated, the GPU has 139.81 GiB, of which this process may use 7.00 GiB",
    ),
    (
        RuntimeError(
            "MPS backend out of memory (MPS allocated: 17.29 GiB, other allocations: 1.35 MiB, max allowed: 18.13 GiB)."
            " Tried to allocate 1.27 GiB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable"
        ),
        ": 1.27 GiB could not be allocated, MPS holds 17.29 GiB and other work 1.35 MiB, of 18.13 GiB allowed",
    ),
    (RuntimeError("Invalid buffer size: 24.00 GiB"), ": an array of 24.00 GiB, more than one buffer"),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        ": 3.73 GiB could not be allocated",
    ),
    (
        np._core._exceptions._ArrayMemoryError((1000, 1000, 1000), np.dtype(np.float64)),  # type: ignore[attr-defined]
        ": 7.45 GiB could not be allocated by numpy",
    ),
    (MemoryError(), ""),
    (MemoryError("std::bad_alloc"), ""),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
]
OTHERS = [
    (
        METAL.format("Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"),
        "smaller micro-batch",
    ),
    (
        METAL.format("Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"),
        "the display had to wait",
    ),
    (METAL.format("Discarded (victim of GPU error/recovery) (00000005:...)"), "start it again"),
    ("[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size", "train.wired_limit"),
    ("CUDA error: device-side assert triggered\nCUDA kernel errors", "token id"),
    ("CUDA error: no kernel image is available for execution on the device", "build"),
    (
        "No valid triton configs. OutOfMemoryError: out of resource: triton_tem_flex_attention_0 Required: 139776 "
        "Hardware limit: 101376",
        "shared memory",
    ),
    ("[Compile::eval_cpu] Failed to compile function X: Failed to execute command", "temporary folder"),
]


def raising(error: BaseException) -> Any:
    """A function that raises it."""

    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize(("error", "said"), MEMORY, ids=lambda value: str(value)[:40])
def test_each_message_about_memory_is_one_line(error: Exception, said: str) -> None:
    known = failures.meaning(error)
    assert known and known.memory and known.line.startswith(f"out of memory{said}") and "\n" not in known.line
    assert said or known.line == "out of memory"
    with (
        pytest.raises(failures.OutOfMemory, match=r"^step 3: out of memory.*; less$"),
        failures.doing("step 3", "less"),
    ):
        raise error


@pytest.mark.parametrize(("text", "said"), OTHERS, ids=lambda value: value[:40])
def test_other_known_errors_are_one_line(text: str, said: str) -> None:
    known = failures.meaning(RuntimeError(text))
    assert known and not known.memory and said in known.line and "\n" not in known.line


def test_what_is_not_known_keeps_its_traceback() -> None:
    for error in (RuntimeError("[matmul] shapes (2,3) and (4,5)"), ValueError("x"), OSError(errno.ENOENT, "no")):
        assert failures.meaning(error) is None
    with pytest.raises(KeyError), failures.doing("x"):
        raise KeyError("out")


@pytest.mark.parametrize(
    "verb",
    ["train", "finetune", "eval", "generate", "chat", "convert", "verify", "fuse", "classify", "plan", "data prepare"],
)
def test_every_verb_says_what_helps(verb: str, monkeypatch: Any, capsys: Any) -> None:
    words = {
        "train": [], "finetune": ["-m", "x", "-d", "y"], "eval": ["-m", "x", "-d", "y"], "generate": ["-m", "x"],
        "chat": ["-m", "x"], "convert": ["a", "b"], "verify": ["a", "b"], "fuse": ["-m", "x", "-o", "y"],
        "classify": ["-m", "x"], "plan": [], "data prepare": ["a", "-o", "b"],
    }  # fmt: skip
    module, _, name = verbs.VERBS[verb].function.partition(":")
    monkeypatch.setattr(importlib.import_module(module), name, raising(MEMORY[2][0]))
    assert cli.main([*verb.split(), *words[verb]]) == 1
    line = capsys.readouterr().err
    told = f"mlxgpt: error: {verb}: out of memory: 16.00 GiB could not be allocated; {failures.ADVICE[verb]}\n"
    assert line == told


def breaking(monkeypatch: Any, cls: Any, name: str, at: int, error: Exception) -> None:
    """``cls.name`` raises ``error`` at its ``at``-th call, after it did its work."""
    real, calls = getattr(cls, name), []

    def broken(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(1)
        found = real(self, *args, **more)
        if len(calls) == at:
            raise error
        return found

    monkeypatch.setattr(cls, name, broken)


def advised(line: str) -> list[str]:
    """The words of the command that an error's line gives, from --resume on."""
    found = re.search(r"mlxgpt \w+ (--resume \S+(?: --set \S+)*)", line)
    assert found, line
    return found[1].split()


def test_a_run_out_of_memory_goes_on_as_it_was_advised(go: Go, monkeypatch: Any, capsys: Any) -> None:
    assert go("--out", "whole") == 0
    with monkeypatch.context() as patch:
        breaking(patch, fake_run.Engine, "train_step", 7, MEMORY[2][0])
        capsys.readouterr()
        assert go("--out", "run") == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "step 7: out of memory: 16.00 GiB could not be allocated" in line
    assert "the last good checkpoint is run/checkpoints/step-0000005" in line
    assert "--set train.micro_batch_size=2 would fit, with " in line
    # the engine's seventh step was done and is in no file
    assert checkpoint.verify(resolve.path_of(Path("run"), 5)).step == 5 and not resolve.path_of(Path("run"), 7).exists()
    assert max(losses("run")) == 6
    assert go(*advised(line)) == 0
    for split in ("train", "val"):
        assert list(losses("run", split)) == list(losses("whole", split))
        assert np.allclose(
            list(losses("run", split).values()), list(losses("whole", split).values()), atol=1e-6, rtol=0
        )


def test_out_of_memory_where_a_save_is_in_flight_and_in_its_thread(go: Go, monkeypatch: Any, capsys: Any) -> None:
    started = threading.Event()
    real = checkpoint.write

    def slow(*args: Any) -> Any:
        started.set()
        threading.Event().wait(0.3)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(saver.checkpoint, "write", slow)
        breaking(patch, fake_run.Engine, "train_step", 6, MEMORY[0][0])
        assert go("--out", "run") == 1
    assert started.is_set() and "checkpoint is run/checkpoints/step-0000005" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(saver.checkpoint, "write", raising(MemoryError()))
        assert go("--out", "other") == 1
    line = capsys.readouterr().err
    assert "out of memory; the run stops; no checkpoint had been saved" in line and "--resume other" in line


@pytest.mark.parametrize(("method", "at", "what"), [("evaluate", 1, "validation after step 4")])
def test_out_of_memory_in_a_validation(go: Go, monkeypatch: Any, capsys: Any, method: str, at: int, what: str) -> None:
    breaking(monkeypatch, fake_run.Engine, method, at, MEMORY[7][0])
    assert go("--out", "run") == 1
    assert f"error: {what}: out of memory: 20.00 GiB" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_real_engine_out_of_memory_goes_on(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("the cat sees the dog. two owls like six cats.\n" * 80)
    settings = [
        "data.source=text.txt", "data.tokenizer=char", "model.n_layer=1", "model.n_head=2", "model.n_embd=16",
        "model.block_size=16", "train.batch_size=4", "train.eval_every=0", "train.save_every=3", "optim.warmup=1",
        "train.compile=off", "sample.max_tokens=0", "train.dropout=0.2",
    ]  # fmt: skip
    start = ["train", "--backend", backend, "--device", "cpu", "-n", "6"]
    start += [word for setting in settings for word in ("--set", setting)]
    assert cli.main([*start, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        module = importlib.import_module(f"{PACKAGES[backend]}.engine")
        breaking(patch, module.Engine, "train_step", 5, MEMORY[4][0])
        capsys.readouterr()
        assert cli.main([*start, "--out", "run"]) == 1
    line = capsys.readouterr().err
    assert (
        "step 5: out of memory: Metal stopped the GPU's work; the run stops; the last good checkpoint is run/" in line
    )
    assert "step-0000003" in line
    assert cli.main(["train", "--backend", backend, "--device", "cpu", *advised(line)]) == 0
    worst = max(abs(loss - losses("whole")[step]) for step, loss in losses("run").items())
    assert len(losses("run")) == 6 and worst < 2e-5  # the gate of resume: another micro-batch adds in another order


def test_advice_is_smaller_than_what_did_not_fit() -> None:
    model = ModelConfig(n_layer=4, n_head=4, n_embd=64, block_size=128, vocab_size=512, family="llama")
    recipe = Recipe(model=model, train=TrainConfig(batch_size=32))
    settings, need = advice.smaller(recipe, "mlx", False, 2**40)
    assert settings == {"micro_batch_size": 16} and need > 0
    settings, less = advice.smaller(recipe, "mlx", False, need - 1)
    assert settings["micro_batch_size"] < 16 and 0 < less < need
    assert advice.smaller(recipe, "mlx", False, 1) == ({"micro_batch_size": 1, "checkpoint_activations": True}, 0)
    one = Recipe(model=model, train=TrainConfig(batch_size=32, micro_batch_size=1, checkpoint_activations=True))
    assert advice.smaller(one, "torch", True, 2**40) == ({}, 0)


@pytest.mark.parametrize("where", ["train_step", "evaluate"])
def test_a_compiler_that_a_signal_killed_ends_the_run_as_the_signal_asks(
    go: Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    assert go("--out", "whole") == 0
    with monkeypatch.context() as patch:
        real = getattr(fake_run.Engine, where)

        def killed(self: Any, *args: Any) -> Any:
            if self.t == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("[Compile::eval_cpu] Failed to compile function X: return code 143")
            return real(self, *args)

        patch.setattr(fake_run.Engine, where, killed)
        assert go("--out", "run", "--set", "train.save_every=3") == 143
    # a validation changes no weights: the step before it is saved
    step = 4 if where == "evaluate" else resolve_step("run")
    assert f"stopped by SIGTERM and saved at step {step}; resume with" in capsys.readouterr().out
    assert go("--resume", "run") == 0
    assert losses("run") == losses("whole") and losses("run", "val") == losses("whole", "val")


def resolve_step(run: str) -> int:
    """The step of the newest checkpoint."""
    newest = checkpoint.newest_valid(Path(run))
    assert newest
    return newest[1].step


def test_the_same_without_a_signal_is_an_error(go: Go, monkeypatch: Any, capsys: Any) -> None:
    breaking(monkeypatch, fake_run.Engine, "train_step", 3, RuntimeError("[Compile::eval_cpu] Failed to compile f: 1"))
    assert go("--out", "run") == 1
    assert "step 3: the C++ compiler failed" in capsys.readouterr().err


def test_a_damaged_kernel_is_removed(tmp_path: Path) -> None:
    library = tmp_path / "libX.so"
    library.write_bytes(b"\x7fELF")
    known = failures.meaning(RuntimeError(f"Could not load C++ shared library {library}: file too short"))
    assert known and str(library) in known.line and not library.exists()


def blocked(thread: int) -> int:
    """The mask of blocked signals of a thread of this process."""
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return int(re.search(r"^SigBlk:\s+(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_framework_starts_does_not_receive_signals_and_the_process_does() -> None:
    both = 1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1
    started: list[int] = []
    with without_signals():
        thread = threading.Thread(target=lambda: started.append(blocked(threading.get_native_id())))
        thread.start()
        thread.join()
    assert started[0] & both == both and blocked(threading.get_native_id()) & both == 0
    with Signals() as signals:
        assert blocked(threading.get_native_id()) & both == both
        signal.pthread_kill(next(t.ident for t in threading.enumerate() if t.name == "signals"), signal.SIGTERM)  # type: ignore[arg-type]
        assert signals.came(10)
        assert signals.received == signal.SIGTERM
    assert blocked(threading.get_native_id()) & both == 0


VERBS_WITH_A_DEVICE = {
    "train": ["--out", "new"], "finetune": ["-m", "x", "-d", "y", "--out", "new"], "plan": [], "generate": ["-m", "x"],
    "chat": ["-m", "x"], "eval": ["-m", "x", "-d", "y"], "classify": ["-m", "x", "-t", "y"],
    "score": ["-m", "x", "-t", "y"],
    "serve": ["-m", "x"], "probe": ["x", "--tokens", "y", "-o", "."], "inspect": ["x", "--text", "y"],
    "quantize": ["x", "z", "--bits", "4"], "rl": ["-m", "x", "--prompts", "y", "--reward", "exact", "--out", "new"],
}  # fmt: skip


def test_every_verb_that_takes_a_device_is_tried_below() -> None:
    found = set()
    for name, verb in verbs.VERBS.items():
        parser = cli.Parser()
        verb.declare(parser)
        flags = [flag for action in parser._actions for flag in action.option_strings]
        found |= {name} if "--device" in flags else set()
    assert found == {*VERBS_WITH_A_DEVICE, "doctor"}


@pytest.mark.parametrize("verb", [*VERBS_WITH_A_DEVICE, "doctor"])
def test_a_device_that_is_not_here_is_refused_before_any_work(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXGPT_CACHE", str(tmp_path / "cache"))
    for backend, devices in (("mlx", ("tpu", "cuda:7", "")), ("torch", ("cuda:7", "cuda:", "cuda:٣", "mps:0", "CPU"))):
        for device in devices:
            words = [*verb.split(), *VERBS_WITH_A_DEVICE.get(verb, []), "--backend", backend, "--device", device]
            assert cli.main(words) == 2
            line = capsys.readouterr().err
            assert line.count("\n") == 1 and f"--device {device}: " in line and "cpu on this machine" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "m9-ultra"])
def test_an_unknown_chip_is_refused_with_those_known(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--chip", name]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"--chip {name}: unknown" in line and "m3-ultra" in line and "h200" in line


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_ulimit_leaves_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.free()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (used + 2**26, -1))
    assert 2**25 < machine.free() <= 2**26 < before


def test_a_signal_to_all_processes_while_mlx_compiles_stops_a_run_cleanly(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin/g++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\ntouch {tmp_path}/started\nsleep 5\nexit 1\n')
    compiler.chmod(0o755)
    (tmp_path / "text.txt").write_text("the cat sees the dog.\n" * 80)
    settings = [
        "data.source=text.txt", "data.tokenizer=char", "model.n_layer=1", "model.n_head=2", "model.n_embd=16",
        "model.block_size=16", "train.batch_size=2", "optim.warmup=1", "sample.max_tokens=0",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {
        "PATH": f"{compiler.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path),
        "MLXGPT_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "mlxgpt", "train", "--backend", "mlx", "--device", "cpu", "-n", "4", "-o", "run"]
    process = subprocess.Popen(
        [*command, *words], cwd=tmp_path, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 143, said
    assert said.splitlines()[-1].startswith("stopped by SIGTERM before the first step was done; resume with: mlxgpt")
    assert "Traceback" not in said
