"""``--module FILE.py:Class``: the user's own code is run, in a process of its own, for a sample of what it computes.

Only where it is named. The process has no network, few variables of the environment and a time limit; what it prints
goes nowhere. It is no cage: the code runs with the user's rights, as ``python FILE.py`` would.
"""

import contextlib
import importlib.util
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import mlxgpt
from convert.adopt import evidence
from convert.adopt.evidence import Sample
from convert.adopt.rules import Map, matching
from convert.adopt.source import State
from mlxgpt.common.backend import PACKAGES
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders.tensors import write_tensors
from mlxgpt.common.user_code import imports

SECONDS = 120.0
_TAIL = 1 << 14  # bytes of what it prints that are kept, for the case that it dies without a word
# everything else, tokens and proxies too, stays outside
_PASSED = ("PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
           "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "SYSTEMROOT", "USER", "LOGNAME")  # fmt: skip
_FAMILIES = ("LC_", "OMP_", "MKL_", "OPENBLAS_", "MLXGPT_", "KMP_", "VECLIB_")
_STAGES = {"import": "while it was imported", "build": "while it was built", "load": "while its weights were loaded"}
_STAGES |= {"call": "while it was called", "": "before it was imported"}


@dataclass(frozen=True)
class Module:
    """FILE.py:Class, and what its constructor gets."""

    path: Path
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


@dataclass(frozen=True)
class Sizes:
    """What is known of the model before it runs; 0 is not known."""

    vocab_size: int
    n_layer: int = 0
    block_size: int = 0


@dataclass(frozen=True)
class Ran:
    """Arrays by name, and what is to be said."""

    arrays: Mapping[str, np.ndarray]
    notes: tuple[str, ...]


def parse(given: str, kwargs: str | None = None, flag: str = "--module ") -> Module:
    """``FILE.py:Class`` and the JSON of --kwargs; ``flag`` is what stands before it in messages.

    Raises:
        UserError: no such file, no class, or no JSON object.
    """
    path, colon, name = given.rpartition(":")
    if not colon or not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{flag}{given}: expected FILE.py:CLASS, such as model.py:GPT")
    place = Path(path).expanduser()
    if not place.is_file() or place.suffix not in (".py", ".ipynb"):
        raise UserError(f"{flag}{given}: {place}: {'expected a .py file' if place.exists() else 'no such file'}")
    try:
        values = json.loads(kwargs) if kwargs else {}
    except ValueError as error:
        raise UserError(f"--kwargs {kwargs}: no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"""--kwargs {kwargs}: expected a JSON object, such as '{{"n_layer": 6}}'""")
    return Module(place.resolve(), name, values)


def of_state(module: Module, state: State, made: Map, say: Callable[[str], None] = lambda text: None) -> Sample:
    """What the user's model gives with the weights of a state dict of which a map, maybe not the right one, is known.

    Raises:
        UserError: see ``sample``.
    """
    left = [name for name in state.tensors if any(matching(pattern).fullmatch(name) for pattern in made.left)]
    sizes = Sizes(made.model["vocab_size"], made.model["n_layer"], made.model.get("block_size", 0))
    weights = {state.prefix + name: tensor.read() for name, tensor in state.tensors.items()}
    named = [state.prefix + name for name in left]
    return sample(module, weights, sizes, extras=state.extras, left=named, say=say)


def sample(
    module: Module,
    weights: Mapping[str, np.ndarray],
    sizes: Sizes,
    *,
    extras: Mapping[str, Any] | None = None,
    left: Iterable[str] = (),
    seed: int = 0,
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> Sample:
    """What the user's model gives for random ids, with ``weights`` by the checkpoint's full names.

    Args:
        module: what to run.
        weights: the checkpoint's tensors, as float32 or whole numbers.
        sizes: of the model.
        extras: settings beside the weights, for the constructor where --kwargs says nothing.
        left: tensors that are no weights, which the class may or may not have.
        seed: of the ids.
        seconds: after which it is ended.
        say: gets a line that says what is executed, before it is.

    Raises:
        UserError: one line: what their code raised and where, or that it does not fit, with the cure.
    """
    values = {"extras": dict(extras or {}), "left": list(left), "seed": seed}
    ran = run(module, {"x1": weights}, sizes, values, seconds, say)
    made = evidence.of_arrays(ran.arrays, str(module))
    return Sample(made.ids, made.logits, made.hidden, made.dtype, made.normalized, ran.notes + made.notes, made.where)


def run(
    module: Module,
    weights: Mapping[str, Mapping[str, np.ndarray]],
    sizes: Sizes,
    more: Mapping[str, Any],
    seconds: float = SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> Ran:
    """Runs the user's code on ``weights``, by scale and name; ``more`` are more fields of user_code/run.py's Request.

    Raises:
        UserError: see ``sample``.
    """
    framework = imports.framework_of(module.path, module.name)
    if importlib.util.find_spec(framework) is None:
        raise UserError(f"{module.path} imports {framework}, which is not installed here: pip install {framework}")
    say(f"executes {module} in a process of its own, without network, at most {seconds:g} s")
    with tempfile.TemporaryDirectory(prefix="module-") as name:
        work = Path(name)
        places = {scale: str(work / f"{scale}.safetensors") for scale in weights}
        for scale, tensors in weights.items():
            real = {key: array for key, array in tensors.items() if array.dtype.kind != "c"}  # a table for rope
            write_tensors(places[scale], {key: _wide(array) for key, array in real.items()})
        request = {"path": str(module.path), "name": module.name, "kwargs": dict(module.kwargs), "weights": places}
        request |= {"vocab_size": sizes.vocab_size, "n_layer": sizes.n_layer, "block_size": sizes.block_size}
        request |= {"out": str(work / "sample.npz")} | dict(more)
        (work / "request.json").write_text(json.dumps(request, default=str))
        said = _process(module, PACKAGES[framework], work, seconds)
        with np.load(work / "sample.npz", allow_pickle=False) as arrays:
            return Ran({key: arrays[key] for key in arrays.files}, tuple(said))


def _wide(array: np.ndarray) -> np.ndarray:
    """Floats as float32, in which the model is run."""
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


def environment(work: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The variables that the process gets: no tokens, no proxies, no GPU, another home."""
    made = {key: value for key, value in given.items() if key in _PASSED or key.startswith(_FAMILIES)}
    made |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    made |= {"NO_PROXY": "*", "no_proxy": "*", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    made |= {"TORCHDYNAMO_DISABLE": "1"}  # torch.compile would take most of the time
    made |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HOME": str(work)}
    user, root = site.getuserbase(), Path(mlxgpt.__file__).parent.parent
    if root.name not in ("site-packages", "dist-packages"):  # a checkout that is run where it lies
        made["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), made.get("PYTHONPATH"))))
    return made | ({"PYTHONUSERBASE": user} if user else {})


def _process(module: Module, package: str, work: Path, seconds: float) -> list[str]:
    """Runs the request in ``work`` and ends it with all that it started; returns its notes.

    Raises:
        UserError: it raised, died, or took too long.
    """
    command = [sys.executable, "-m", "mlxgpt.common.user_code.guard", f"{package}.sample"]
    process = subprocess.Popen(
        [*command, str(work / "request.json")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(work, os.environ),
        start_new_session=True,
    )
    printed = bytearray()
    reader = threading.Thread(target=_drain, args=(process, printed), daemon=True)
    reader.start()
    try:
        late = _is_late(process, seconds)
    finally:
        _end(process)
        reader.join(5)
    answer = _answer(work / "sample.npz.json")
    if "said" in answer:  # whatever it did afterwards
        return answer["said"]
    if "error" in answer:
        # what the file's own code raised names only a file beside it
        raise UserError(f"{module}: {answer['error']}" if answer.get("theirs") else answer["error"])
    stage = answer.get("stage", "")
    when = _STAGES[stage]
    if late:
        works = "the file does work when it is imported: put that under if __name__ == '__main__'"
        cure = works if stage == "import" else "make the sample yourself and give it by --like"
        raise UserError(f"{module}: ended after {seconds:g} s, {when}; {cure}")
    code = process.returncode
    died = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = printed.decode(errors="replace").strip().splitlines()
    last = f"; it last said: {lines[-1].strip()[:200]}" if lines else ""
    raise UserError(f"{module}: {died} {when}, without an answer{last}")


def _is_late(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for the process; True if it did not end in time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _drain(process: subprocess.Popen[bytes], kept: bytearray) -> None:
    """Reads all that is printed, and keeps the end of it."""
    assert process.stdout
    with process.stdout as pipe:
        while piece := pipe.read1(_TAIL):  # type: ignore[attr-defined]
            kept += piece
            del kept[:-_TAIL]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its children, whatever became of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answer(place: Path) -> dict[str, Any]:
    try:
        values = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
