"""What a change can make worse without failing a test: counted, never timed, and held against regression.toml.

    python tests/regression.py                 what is measured, beside what is recorded
    python tests/regression.py --renew         records it; the reason belongs into the commit's message

Each measurement is a process of its own, so that nothing before it counts. All are counts or bytes of fixed work, the
same on a busy machine: modules and calls, allocated bytes, operations, waits for the device, bytes through the system.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASELINE = Path(__file__).with_name("regression.toml")
IO = Path("/proc/self/io")
MARGIN = 0.05
"""By how much a figure may exceed the recorded one, unless MARGINS has it."""
MARGINS = {
    "help.modules": 4.0,  # of a handful; Python's own modules import each other differently by version
    "mlx.peak_bytes": 0.10,  # the order in which MLX frees differs by process: 21.5 or 22.6 MB
    "mlx.calls": 0.15,
    "torch.calls": 0.15,
    "report.calls": 0.15,
}
EVERYWHERE = {
    "help.modules", "mlx.waits", "mlx.operations", "metal.update.2", "metal.update.4", "metal.update.uncopied.2",
    "metal.update.uncopied.4", "metal.gradients.2", "metal.gradients.4", "metal.chunks", "metal.tiles", "torch.waits",
    "torch.kept_tensors", "checkpoint.size", "checkpoint.flushes", "report.parsed_a_line", "report.calls",
    "report.page_bytes",
}  # fmt: skip
"""What is the same on other systems: allocators and kernels are not, and only Linux counts the bytes that it moves."""
Figures = dict[str, float]


def startup() -> Figures:
    """Modules that ``mlxgpt --help`` loads beyond those of a bare Python."""
    bare = set(sys.modules)
    from mlxgpt import cli

    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(["--help"])
    return {"help.modules": len(set(sys.modules) - bare)}


def a_step(package: str, **train: Any) -> tuple[Any, Callable[[], Any]]:
    """An engine of a million parameters, and one update of it."""
    import numpy as np

    from mlxgpt.common.batch import Batch
    from mlxgpt.common.model import params
    from mlxgpt.common.recipes import build

    model = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 32, "vocab_size": 512}
    recipe = build({"model": model, "train": {"batch_size": 4, **train}})
    engine = importlib.import_module(f"{package}.engine").Engine(recipe, params.init_params(recipe.model, 0), "cpu")
    tokens = np.arange(4 * 32, dtype=np.int32).reshape(4, 32) % 512
    batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32))
    return engine, lambda: engine.train_step(engine.t + 1, [batch], 1e-3)


@contextlib.contextmanager
def counted(owner: Any, *names: str, only: type = object) -> Iterator[list[int]]:
    """How often functions of ``owner`` are called with an ``only`` as the first argument."""
    calls, originals = [0], {name: getattr(owner, name) for name in names}

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += bool(args) and isinstance(args[0], only)
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(owner, name, counting(original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


def python_calls(work: Callable[[], Any]) -> int:
    """Calls of Python functions in ``work``."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def mlx_step() -> Figures:
    """A compiled step: bytes, operations of its graph, waits, calls."""
    _, step = a_step("mlxgpt")
    import mlx.core as mx
    import numpy as np

    step()
    step()
    mx.reset_peak_memory()
    step()
    found: Figures = {"mlx.peak_bytes": mx.get_peak_memory(), "mlx.kept_bytes": mx.get_active_memory()}
    with counted(mx, "eval", "async_eval") as waits, counted(np, "array", only=mx.array) as copies:
        step()
    found |= {"mlx.waits": waits[0] + copies[0], "mlx.operations": mlx_operations()}
    if shutil.which("g++"):  # without it MLX does not compile on a CPU, and traces every step
        found["mlx.calls"] = python_calls(step)
    return found


def mlx_operations() -> int:
    """Primitives of the graph of one step, by MLX's own drawing of it; evaluating is left out."""
    engine, step = a_step("mlxgpt", compile="off")
    import mlx.core as mx

    pending: list[Any] = []

    def settle(*more: Any) -> None:
        pending.extend([*engine._weights().values(), *engine.m.values(), *engine.v.values(), *more])
        graph = io.StringIO()
        mx.export_to_dot(graph, *pending)
        pending[:] = [graph.getvalue().count("shape=rectangle")]
        mx.eval(engine.model.parameters(), engine.m, engine.v, *more)

    engine._settle = settle
    step()
    return int(pending[0])


def metal_step() -> Figures:
    """Kernels that steps launch on Metal, by their compiled graph: of 2 and 4 layers, so that growth is seen."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import kernels
    from mlxgpt import fast
    from mlxgpt.common.recipes import build

    def made(layers: int, **train: Any) -> kernels.Counted:
        model = {"family": "gpt2", "n_layer": layers, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 3000}
        return kernels.Counted(build({"model": model, "train": {"batch_size": 4, **train}}))

    found: Figures = {}
    with kernels.on_metal():
        for layers in (2, 4):
            engine = made(layers)
            terms, grads = engine.gradients(4)
            update = engine.update()
            found |= {
                f"metal.update.{layers}": kernels.kernels(*update),
                f"metal.update.uncopied.{layers}": kernels.kernels(*update, copies=False),
                f"metal.gradients.{layers}": kernels.kernels(terms, *grads.values()),
            }
        terms, grads = made(2).gradients(200)  # more logits than a chunk has
        found["metal.chunks"] = kernels.kernels(terms, *grads.values()) - found["metal.gradients.2"]
        fast.SCORES = 4 * 4 * 64 * 32  # half of a layer's
        terms, grads = made(2).gradients(4)
        found["metal.tiles"] = kernels.kernels(terms, *grads.values()) - found["metal.gradients.2"]
    return found


def torch_step() -> Figures:
    """An eager step: peak of live bytes, operations, waits, calls."""
    _, step = a_step("torch_ref")
    import torch

    sys.path.insert(0, str(ROOT))
    from benchmarks.head import live_peak, torch_events

    step()
    step()
    kept, events = live(torch), torch_events(step)
    with counted(torch.Tensor, "item", "numpy", "tolist", "cpu", "__float__", "__bool__") as waits:
        step()
    return {
        "torch.peak_bytes": live_peak(events),
        "torch.kept_tensors": kept,
        "torch.operations": sum(event.name().startswith("aten::") for event in events),
        "torch.waits": waits[0],
        "torch.calls": python_calls(step),
    }


def live(torch: Any) -> int:
    """Tensors that are alive."""
    import gc

    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def system_bytes(work: Callable[[], Any]) -> dict[str, int]:
    """Bytes that ``work`` read and wrote through the system, by Linux's own count; {} elsewhere."""

    def now() -> dict[str, int]:
        text = IO.read_text() if IO.exists() else ""
        return {key: int(value) for key, value in (line.split(": ") for line in text.splitlines())}

    before = now()
    work()
    return {key: value - before[key] for key, value in now().items()}


def checkpoint() -> Figures:
    """A save: bytes written and read a byte of state, and flushes."""
    from mlxgpt.common import files
    from mlxgpt.common.folders import resolve
    from mlxgpt.common.model import params
    from mlxgpt.common.recipes import build
    from mlxgpt.common.runs import checkpoint

    config = build({"model": {"n_layer": 2, "n_head": 2, "n_embd": 256, "vocab_size": 512}}).model
    weights = params.init_params(config, 0)
    snapshot: Any = {"params": weights, "m": weights, "v": weights, "t": 1}
    state = checkpoint.RunState(0, {}, {}, "none", {}, step=1)
    size = sum(array.nbytes for array in weights.values())
    with tempfile.TemporaryDirectory() as folder, counted(files, "flush") as flushes:
        run = Path(folder)
        moved = system_bytes(lambda: checkpoint.write(run, snapshot, config, None, state, 0))
        place = resolve.path_of(run, 1)
        read = system_bytes(lambda: (checkpoint.verify(place), checkpoint.read_snapshot(place, config)))
        found = {"checkpoint.size": sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) / (3 * size)}
    found["checkpoint.flushes"] = flushes[0]
    if moved:
        found |= {
            "checkpoint.written": moved["wchar"] / (3 * size),
            "checkpoint.read_back": moved["rchar"] / (3 * size),
        }
        found["checkpoint.read"] = read["rchar"] / (3 * size)
    return found


def conversion() -> Figures:
    """A Hugging Face folder into others: bytes read and written a byte of weights."""
    from convert.conversion import convert
    from mlxgpt.common.folders import model_folder
    from mlxgpt.common.model import params
    from mlxgpt.common.recipes import build

    config = build({"model": {"family": "llama", "n_layer": 2, "n_head": 4, "n_embd": 256, "vocab_size": 4096}}).model
    found: Figures = {}
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "source"
        model_folder.write_model(source, config, params.init_params(config, 0))
        size = (source / model_folder.SINGLE).stat().st_size
        convert(source, Path(made) / "warm", "hf")  # what is imported is read too
        for kind in ("hf", "mlx-lm", "gguf"):
            moved = system_bytes(lambda to=kind: convert(source, Path(made) / f"to.{to}", to))
            if moved:
                found |= {
                    f"convert.{kind}.read": moved["rchar"] / size,
                    f"convert.{kind}.written": moved["wchar"] / size,
                }
    return found


def report() -> Figures:
    """The page of 10,000 steps: lines parsed, and calls beyond those of a page of 1,000."""
    from test_report import make_run

    from mlxgpt.commands.look import report
    from mlxgpt.common.runs import summary as run_summary

    def show(run: Path) -> str:
        return report.render([run_summary.read_run(run)])

    with tempfile.TemporaryDirectory() as folder:
        short, long = (make_run(Path(folder) / str(steps), steps) for steps in (1_000, 10_000))
        show(short)  # what is imported at first use
        few = python_calls(lambda: show(short))
        with counted(json, "loads") as parsed:
            many = python_calls(lambda: show(long))
        lines = len((long / "metrics.jsonl").read_text().splitlines())
        return {
            "report.parsed_a_line": parsed[0] / lines,
            "report.calls": many - few,
            "report.page_bytes": len(show(long)),
        }


MEASURES = {f.__name__: f for f in (startup, mlx_step, metal_step, torch_step, checkpoint, conversion, report)}


def measure(name: str, before: str = "") -> Figures:
    """One measurement in a new process; ``before`` is Python that runs first, such as a mutation."""
    code = f"import json, regression\n{before}\nprint(json.dumps(regression.{name}()))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def recorded() -> Figures:
    """The figures of regression.toml."""
    return tomllib.loads(BASELINE.read_text(encoding="utf-8"))["figures"]


def gated(names: Iterable[str]) -> set[str]:
    """Of these figures, those that can be held against what Linux gave."""
    return {name for name in names if sys.platform == "linux" or name in EVERYWHERE}


def worse(found: Figures) -> list[str]:
    """A line for each figure that is above the recorded one by more than its margin, or is not recorded."""
    baseline, lines = recorded(), []
    for name in sorted(gated(found)):
        value = found[name]
        limit = baseline.get(name, -1.0) * (1 + MARGINS.get(name, MARGIN))
        if value > limit:
            lines.append(f"{name}: {value:,.6g}, recorded {baseline.get(name, float('nan')):,.6g}, limit {limit:,.6g}")
    return lines


def main() -> int:
    """Prints the figures; 1 if one is worse than recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write what is measured to regression.toml")
    args = parser.parse_args()
    before = recorded() if BASELINE.exists() else {}
    found = {name: value for measurement in MEASURES for name, value in measure(measurement).items()}
    for name, value in found.items():
        print(f"{name:<24} {value:>14,.6g}   recorded {before.get(name, float('nan')):>14,.6g}")
    if args.renew:
        head = "# Counts and bytes of fixed work on Linux, by regression.py --renew.\n\n[figures]\n"
        lines = [f'"{name}" = {round(value, 4):.10g}\n' for name, value in found.items()]
        BASELINE.write_text(head + "".join(lines), encoding="utf-8")
        return 0
    lines = worse(found)
    print("\n".join(lines or ["nothing is worse than recorded"]))
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
