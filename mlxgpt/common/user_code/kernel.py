"""What Linux lets a process forbid itself, for ever: to write outside a folder, to start processes, to disturb others.

Landlock and seccomp need no rights and no library; the numbers are those of the kernel's headers. Nothing is loaded
before, for this is run in a process of its own (cell.py).
"""

import contextlib
import ctypes
import os
import platform
import struct
import sys
from pathlib import Path

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every machine

# Rights to change files, by bit: to write, to remove two kinds, to make seven, to move, to cut, to control devices.
_CHANGES = (1 << 1) | sum(1 << bit for bit in range(4, 13))
_LATER = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # version of Landlock -> a right that it knows, too

_THREAD = 0x10000  # of clone: not a process
_EPERM, _ENOSYS = 1, 38
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000

# By machine: its number for seccomp, clone, clone3, tgkill, and what is refused: processes, signals to others, other
# processes' memory, namespaces, and the rights, owners, times and attributes of files, of which Landlock knows nothing.
_SYSTEMS = {
    "x86_64": (
        0xC000003E, 56, 435, 234,
        (57, 58, 59, 322, 62, 129, 200, 424, 101, 310, 311, 272, 308, 90, 91, 92, 93, 94, 132, 235, 260, 261, 268, 280,
         452, 188, 189, 190, 197, 198, 199, 250, 298, 321, 323, 425),
    ),
    "aarch64": (
        0xC00000B7, 220, 435, 131,
        (221, 281, 129, 138, 130, 424, 117, 270, 271, 97, 268, 52, 53, 54, 55, 88, 452, 5, 6, 7, 14, 15, 16, 219, 241,
         280, 282, 425),
    ),
}  # fmt: skip


def close(folder: Path) -> list[str]:
    """Forbids what the kernel lets this process forbid itself.

    Returns:
        What is forbidden now: ``files`` (to change any outside ``folder``), ``processes`` (to start any).
    """
    if sys.platform != "linux":
        return []
    closed = []
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        with contextlib.suppress(OSError):
            _landlock(libc, folder)
            closed.append("files")
        _drop_rights(libc)
        if platform.machine() in _SYSTEMS:
            _seccomp(libc, *_SYSTEMS[platform.machine()])
            closed.append("processes")
    return closed


def _landlock(libc: ctypes.CDLL, folder: Path) -> None:
    """No file outside ``folder`` is changed any more; where the kernel knows how, no TCP and no signals either."""
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        raise OSError("no Landlock")
    changes = _CHANGES | sum(right for since, right in _LATER.items() if version >= since)
    rules = struct.pack("QQQ", changes, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _checked(libc.syscall(_CREATE_RULESET, rules, len(rules), 0))
    try:
        for place, rights in ((folder, changes & ~(1 << 15)), (os.devnull, 1 << 1)):
            opened = os.open(place, os.O_PATH)
            _checked(libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, opened), 0))
            os.close(opened)
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _drop_rights(libc: ctypes.CDLL) -> None:
    """Root, also that of a namespace, keeps its name and none of its capabilities."""
    libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))


def _seccomp(libc: ctypes.CDLL, machine: int, clone: int, clone3: int, tgkill: int, refused: tuple[int, ...]) -> None:
    """Refuses system calls from now on, in this process and its threads."""
    program = [
        _code(0x20, 4), _code(0x15, machine, 1), _code(0x06, _ERROR | _EPERM),  # another machine's calls
        _code(0x20, 0), _code(0x35, 0x40000000, 0, 1), _code(0x06, _ERROR | _EPERM),  # x32
        _code(0x15, clone3, 0, 1), _code(0x06, _ERROR | _ENOSYS),  # libraries take clone then, whose flags are seen
        _code(0x15, clone, 0, 4), _code(0x20, 16), _code(0x45, _THREAD, 1), _code(0x06, _ERROR | _EPERM),
        _code(0x06, _ALLOW),
        _code(0x15, tgkill, 0, 4), _code(0x20, 16), _code(0x15, os.getpid(), 1), _code(0x06, _ERROR | _EPERM),
        _code(0x06, _ALLOW),
    ]  # fmt: skip
    for number in refused:
        program += [_code(0x15, number, 0, 1), _code(0x06, _ERROR | _EPERM)]
    program.append(_code(0x06, _ALLOW))
    made = ctypes.create_string_buffer(b"".join(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(made)))
    _checked(libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(header), 0, 0))


def _code(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """An instruction of BPF; both ways are counts of instructions that are left out."""
    return struct.pack("HBBI", operation, if_true, if_false, value)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
