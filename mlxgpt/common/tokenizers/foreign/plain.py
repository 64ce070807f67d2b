"""The plain values of a pickle, read without running anything of it; also of what torch.save wrote.

Opcodes are interpreted here: containers, texts and numbers are made, tensors are left out, and every other class is
refused by name. Work and memory grow with the file: values are shared and not copied, keys are never containers.
"""

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError

_LONGEST = 1 << 25  # bytes of a pickle; tables of all characters of Unicode have 20 MB
_MOST = 1 << 23  # opcodes
ENCODING = "tiktoken.core.Encoding"

_LITERAL = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
))  # fmt: skip
_LEFT_OUT = ("torch._utils._rebuild_", "torch.Size", "torch.device", "torch.storage.")
_SETS = ("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset")
# what old protocols make bytes and sets by, and objects of a class, which is refused by its own name
_HARMLESS = (
    "collections.OrderedDict", "_codecs.encode", "copyreg.__newobj__", "copyreg._reconstructor",
    "copy_reg._reconstructor", ENCODING, *_SETS,
)  # fmt: skip
_SAY = "expected dicts, lists, texts and numbers: json.dump them into a .json file and give that"


class Named:
    """A class or function that the pickle names, and what it would be given; never imported or called."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None


class LeftOut:
    """In place of a tensor, or of a set, whose order says nothing."""


_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": LeftOut}


def read(path: Path) -> Any:
    """What the pickle, or the file of torch.save, at ``path`` holds.

    Raises:
        UserError: damaged, too large, or more than plain values and tensors.
    """
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            data = _of_zip(path)
        elif size > _LONGEST:
            raise UserError(f"{path}: {size} bytes, expected at most {_LONGEST} of a pickle of plain values")
        else:
            data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not what torch.save writes: {' '.join(str(error).split())}") from None
    try:
        return _Machine(path).run(data)
    except UserError:
        raise
    except Exception as error:
        # a damaged pickle makes its reader raise anything
        raise UserError(f"{path}: not a pickle of plain values: {' '.join(str(error).split())[:200]}") from None


def _of_zip(path: Path) -> bytes:
    """The pickle in what torch.save wrote; its tensors lie beside it and are not read."""
    with zipfile.ZipFile(path) as opened:
        found = [info for info in opened.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise UserError(f"{path}: a zip file without one data.pkl: not what torch.save writes")
        if found[0].file_size > _LONGEST:
            raise UserError(f"{path}: data.pkl has {found[0].file_size} bytes, expected at most {_LONGEST}")
        return opened.read(found[0])


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """The value on the stack at the end."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count > _MOST:
                raise UserError(f"{self._path}: more than {_MOST} values: expected a table of tokens")
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise UserError(f"{self._path}: a pickle without an end: truncated?")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _LITERAL:
            stack.append(_LITERAL[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _STEPS:
            getattr(self, f"_{name.lower()}")()
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self._cut(-int(name[-1]), tuple)
        elif name == "GLOBAL":
            stack.append(self._named(argument.replace(" ", ".")))
        elif name not in ("PROTO", "FRAME"):
            raise self._refused(f"the opcode {name}")

    def _refused(self, what: str) -> UserError:
        return UserError(f"{self._path}: holds {' '.join(what.split())[:200]}, code that is not run: {_SAY}")

    def _named(self, name: str) -> Named:
        allowed = name.startswith(_LEFT_OUT) or name in _HARMLESS
        # the kind of a tensor's storage, or its type: torch.FloatStorage, torch.float32
        if not allowed and not (name.startswith("torch.") and name.count(".") == 1):
            raise self._refused(name)
        return Named(name)

    def _marked(self) -> list[Any]:
        at = self._marks.pop()
        found = self._stack[at:]
        del self._stack[at:]
        return found

    def _cut(self, at: int, kind: type) -> None:
        found = kind(self._stack[at:])
        del self._stack[at:]
        self._stack.append(found)

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _pop(self) -> None:
        self._stack.pop()

    def _pop_mark(self) -> None:
        self._marked()

    def _dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _list(self) -> None:
        self._stack.append(self._marked())

    def _tuple(self) -> None:
        self._stack.append(tuple(self._marked()))

    def _frozenset(self) -> None:
        self._marked()
        self._stack.append(LeftOut())

    def _dict(self) -> None:
        flat = self._marked()
        self._stack.append({})
        self._put(flat)

    def _append(self) -> None:
        last = self._stack.pop()
        self._extend([last])

    def _appends(self) -> None:
        self._extend(self._marked())

    def _additems(self) -> None:
        self._marked()

    def _extend(self, more: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise self._refused("values appended to no list")
        self._stack[-1].extend(more)

    def _setitem(self) -> None:
        self._put([self._stack.pop(-2), self._stack.pop()])

    def _setitems(self) -> None:
        self._put(self._marked())

    def _put(self, flat: list[Any]) -> None:
        place = self._stack[-1]
        if not isinstance(place, dict) or len(flat) % 2:
            raise self._refused("items put into no dict")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # containers as keys would be hashed however deep they are; minbpe's pairs are two numbers
            pair = isinstance(key, tuple) and len(key) == 2 and all(type(part) is int for part in key)
            if not (key is None or isinstance(key, str | int | float | bytes) or pair):
                raise self._refused(f"a key that is a {_kind(key)}")
            place[key] = value

    def _stack_global(self) -> None:
        module, name = self._stack.pop(-2), self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._refused("a class without a name")
        self._stack.append(self._named(f"{module}.{name}"))

    def _binpersid(self) -> None:
        self._stack[-1] = LeftOut()

    def _reduce(self) -> None:
        given, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, Named) or not isinstance(given, tuple):
            raise self._refused("a call of no function")
        if called.name == "copyreg.__newobj__" and given and isinstance(given[0], Named):
            called = given[0]
        if called.name == "collections.OrderedDict" and not given:
            self._stack.append({})
        elif called.name == ENCODING:
            self._stack.append(Named(ENCODING))
        elif called.name.startswith("torch.") or called.name in _SETS:
            self._stack.append(LeftOut())
        elif called.name == "_codecs.encode" and len(given) == 2 and isinstance(given[0], str):
            self._stack.append(given[0].encode("latin-1"))
        else:
            raise self._refused(called.name)

    _newobj = _reduce

    def _build(self) -> None:
        state, place = self._stack.pop(), self._stack[-1]
        if isinstance(place, Named) and place.name == ENCODING:
            place.state = state
        elif not isinstance(place, dict | LeftOut):  # an OrderedDict of modules carries versions that nobody needs
            raise self._refused(f"the state of a {_kind(place)}")


_STEPS = frozenset((
    "MARK", "POP", "POP_MARK", "DUP", "LIST", "TUPLE", "FROZENSET", "DICT", "APPEND", "APPENDS", "ADDITEMS",
    "SETITEM", "SETITEMS", "STACK_GLOBAL", "BINPERSID", "REDUCE", "NEWOBJ", "BUILD",
))  # fmt: skip


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Named) else type(value).__name__
