"""What the errors of a framework, of numpy and of the system mean to a user: one line, and what helps.

The messages are those of MLX 0.32's allocators (Metal, CUDA), of Metal's command buffers, of PyTorch 2.13 (CUDA, MPS,
CPU), of numpy and of malloc. An error that is not among them is a bug, and keeps its traceback.
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.units import size

_UNITS = r"([\d.]+ ?(?:[KMGT]i?B|bytes))"
# Message -> what it says of the groups; groups that are counts of bytes become sizes first.
_MEMORY = [
    (
        r"\[metal::malloc\] Attempting to allocate (\d+) bytes which is greater than the maximum allowed buffer size "
        r"of (\d+) bytes",
        "an array of {0}, more than the {1} that one buffer of this GPU holds",
    ),
    (r"\[metal::malloc\] Resource limit (\(\d+\)) exceeded", "more arrays at once than Metal's limit {0}"),
    (r"\[malloc\w*\] Unable to allocate (\d+) bytes", "{0} could not be allocated"),
    (r"Insufficient Memory|kIOGPUCommandBufferCallbackErrorOutOfMemory", "Metal stopped the GPU's work"),
    (
        rf"Tried to allocate {_UNITS}.*?total capacity of {_UNITS} of which .*? in use\. {_UNITS} allowed;",
        "{0} could not be allocated, the GPU has {1}, of which this process may use {2}",
    ),
    (
        rf"Tried to allocate {_UNITS}.*?total capacity of {_UNITS} of which {_UNITS} is free",
        "{0} could not be allocated, the GPU has {1}, of which {2} is free",
    ),
    (
        rf"MPS backend out of memory \(MPS allocated: {_UNITS}, other allocations: {_UNITS}, max allowed: {_UNITS}\)\. "
        rf"Tried to allocate {_UNITS}",
        "{3} could not be allocated, MPS holds {0} and other work {1}, of {2} allowed",
    ),
    (rf"out of memory.*?Tried to allocate {_UNITS}", "{0} could not be allocated"),
    (rf"Invalid buffer size: {_UNITS}", "an array of {0}, more than one buffer of this GPU holds"),
    (r"(?:can't allocate memory|not enough memory): you tried to allocate (\d+) bytes", "{0} could not be allocated"),
    (rf"Unable to allocate {_UNITS} for an array", "{0} could not be allocated by numpy"),
    # cuBLAS without the memory that its handle needs; MLX gives the status as a number
    (
        r"CU[A-Z]+_STATUS_(?:NOT_INITIALIZED|INTERNAL_ERROR) when calling `cublas\w*Create"
        r"|cublasLt\w+\(.*\) failed with code: 3\.|cublasLtCreate\(.*\) failed with code: 1\.",
        "cuBLAS could not start",
    ),
    (
        r"out of memory|OUT_OF_MEMORY|cudaErrorMemoryAllocation|CU[A-Z]+_STATUS_ALLOC_FAILED|std::bad_alloc"
        r"|[Cc]annot allocate memory",
        "",
    ),
]
_SHORTER = "a smaller micro-batch or shorter texts make shorter kernels"
_OTHERS = [
    (r"ErrorTimeout|Caused GPU Timeout", f"macOS stopped the GPU's work because it took too long: {_SHORTER}"),
    (
        r"Impacting Interactivity|ErrorImpactingInteractivity",
        f"macOS stopped the GPU's work because the display had to wait: {_SHORTER}; a display that sleeps does not "
        "wait, and AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 makes macOS more patient",
    ),
    (
        r"ErrorBackgroundExecutionNotPermitted|submit GPU work from background",
        "macOS refuses the GPU to programs in the background: start it in a session with a display",
    ),
    (
        r"ErrorInnocentVictim|ErrorSubmissionsIgnored|ErrorHang|Caused GPU Hang|victim of GPU error",
        "macOS reset the GPU, for an error of this program or of another: start it again",
    ),
    (
        r"No Metal device available",
        "no Metal device in this session, which is headless, sandboxed or virtual: --device cpu works",
    ),
    (
        r"set_wired_limit\] Setting a wired limit larger",
        "train.wired_limit: above the working set that Metal recommends here: expected less, or 0",
    ),
    (
        r"Attempting to eval an array (?:during function transformations|without a primitive)",
        "the objective reads values of arrays, which have none while MLX compiles it: --set train.compile=off "
        "does not compile",
    ),
    (
        r"device-side assert",
        "a kernel met an index outside its array, such as a token id beyond the vocabulary: --device cpu says which",
    ),
    (
        r"no kernel image is available",
        "this build has no kernels for this GPU: install one for its compute capability, or use --device cpu",
    ),
    (
        r"driver version is insufficient|NVIDIA driver on your system is too old",
        "the NVIDIA driver is too old for this build: update it, or use --device cpu",
    ),
    (
        r"out of resource: ",
        "a kernel needs more shared memory than this GPU has: smaller heads (a larger model.n_head) need less, and "
        'train.compute_dtype = "bfloat16" half',
    ),
    (r"launch timed out", f"the driver stopped the GPU's work because it took too long: {_SHORTER}"),
]
_COMPILER = r"\[Compile::eval_cpu\] Failed to|CppCompileError|C\+\+ compile error"
# What helps a verb whose memory lacks; a run of training says settings that would fit.
_READ = "expected a smaller model, one that was quantized (mlxgpt convert MODEL NEW --bits 4), or more free memory"
_TEXTS = "expected shorter prompts, a smaller --max-tokens, fewer prompts at once, or a quantized or smaller model"
_SHARDED = "it holds one tensor and the largest layer: close other programs, or use a machine with more memory"
ADVICE = {
    "train": "expected a smaller model, --set train.micro_batch_size=1 or --set train.checkpoint_activations=true",
    "finetune": "expected a smaller or quantized model, --method lora, or --set train.micro_batch_size=1",
    "rl": "expected a smaller or quantized model, or --set train.micro_batch_size=1",
    "plan": "expected a smaller recipe",
    "generate": _TEXTS,
    "chat": _TEXTS,
    "eval": _READ,
    "classify": _READ,
    "score": _READ,
    "convert": _SHARDED,
    "fuse": _SHARDED,
    "quantize": "expected fewer --tokens, --backend torch or mlx with another --device, or a smaller model",
    "verify": "expected smaller models, --weights-only, or --frameworks with one of mlx and torch",
    "data prepare": "expected fewer --workers, or documents in smaller files",
}
_LIBRARY = r"Could not load C\+\+ shared library (/[^:]+): "


class OutOfMemory(RunError):
    """Memory lacked; the message says for what, and if it is ``advised``, what would fit."""

    def __init__(self, line: str, advice: str = ""):
        super().__init__(f"{line}; {advice}" if advice else line)
        self.advised = bool(advice)


class CompilerFailed(RunError):
    """A kernel could not be compiled; a signal to all processes of a command does that too."""


class Meaning(NamedTuple):
    """One line, and the error to raise."""

    line: str
    kind: type[RunError]

    @property
    def memory(self) -> bool:
        """Whether memory lacked."""
        return self.kind is OutOfMemory


def meaning(error: BaseException) -> Meaning | None:
    """What a known error means; None for any other. A damaged library of MLX's compiler is removed."""
    if isinstance(error, (RunError, UserError)) or not isinstance(error, Exception):
        return None
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        return None
    text = str(error)
    for pattern, line in _MEMORY:
        if found := re.search(pattern, text, re.DOTALL):
            groups = [size(int(group)) if group.isdecimal() else group for group in found.groups()]
            return Meaning("out of memory" + (f": {line.format(*groups)}" if line else ""), OutOfMemory)
    if isinstance(error, (MemoryError, OSError)):
        return Meaning("out of memory", OutOfMemory)
    for pattern, line in _OTHERS:
        if re.search(pattern, text):
            return Meaning(f"{line} ({_short(text)})", RunError)
    if found := re.search(_LIBRARY, text):
        Path(found[1]).unlink(missing_ok=True)
        return Meaning(
            f"{found[1]}: a kernel that was not written whole, and is removed: start it again", CompilerFailed
        )
    if re.search(_COMPILER, text):
        return Meaning(
            "the C++ compiler failed: is there space in the temporary folder, and memory? --set train.compile=off "
            f"trains without it ({_short(text)})",
            CompilerFailed,
        )
    return None


@contextlib.contextmanager
def doing(what: str, advice: str = "") -> Iterator[None]:
    """Names ``what`` was tried when a known error leaves the block; ``advice`` says what would fit.

    Raises:
        OutOfMemory: memory lacked.
        CompilerFailed: a kernel could not be compiled.
        RunError: another known error.
    """
    try:
        yield
    except Exception as error:
        known = meaning(error)
        if known is None:
            raise
        line = f"{what}: {known.line}"
        raise (OutOfMemory(line, advice) if known.memory else known.kind(line)) from error


def _short(text: str) -> str:
    """The first line of a message, at most 100 characters of it."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= 100 else f"{line[:97]}..."
