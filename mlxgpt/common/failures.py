"""What the errors of a framework, of numpy and of the system mean to a user: one line, and what helps.

The messages are those of MLX 0.32's allocators (Metal, CUDA), of Metal's command buffers, of PyTorch 2.13 (CUDA, MPS,
CPU), of numpy and of malloc. An error that is not among them is a bug, and keeps its traceback.
"""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.units import size

Advice = str | Callable[[], str]

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
    (r"launch timed out", f"the driver stopped the GPU's work because it took too long: {_SHORTER}"),
    (
        r"\[Compile::eval_cpu\] Failed to compile",
        "g++ could not compile a kernel for MLX: is there space in the temporary folder and memory? --set "
        "train.compile=off trains without compilation",
    ),
]
_LIBRARY = r"Could not load C\+\+ shared library (/[^:]+): "


class OutOfMemory(RunError):
    """Memory lacked; the message says for what."""


class Meaning(NamedTuple):
    """One line, and whether memory lacked."""

    line: str
    memory: bool


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
            return Meaning("out of memory" + (f": {line.format(*groups)}" if line else ""), True)
    if isinstance(error, (MemoryError, OSError)):
        return Meaning("out of memory", True)
    for pattern, line in _OTHERS:
        if re.search(pattern, text):
            return Meaning(f"{line} ({_short(text)})", False)
    if found := re.search(_LIBRARY, text):
        Path(found[1]).unlink(missing_ok=True)
        return Meaning(f"{found[1]}: a damaged kernel of MLX's compiler, now removed: start it again", False)
    return None


@contextlib.contextmanager
def doing(what: str, advice: Advice = "") -> Iterator[None]:
    """Names ``what`` was tried when a known error leaves the block; ``advice`` says what would fit.

    Raises:
        OutOfMemory: memory lacked.
        RunError: another known error.
    """
    try:
        yield
    except Exception as error:
        known = meaning(error)
        if known is None:
            raise
        more = "" if not known.memory else advice if isinstance(advice, str) else advice()
        line = f"{what}: {known.line}{'; ' if more else ''}{more}"
        raise (OutOfMemory if known.memory else RunError)(line) from error


def _short(text: str) -> str:
    """The first line of a message, at most 100 characters of it."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= 100 else f"{line[:97]}..."
