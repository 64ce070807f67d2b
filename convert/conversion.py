"""One conversion from start to end: check the request and the space, write beside, verify, rename; or leave nothing."""

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import mlxgpt
from convert.adopt.maps import opening
from convert.adopt.maps.back import Writer
from convert.formats import generation, output, stream
from convert.formats.opened import Opened, Options, Tensor
from convert.formats.registry import format_of, open_model
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.files import atomic_write, read_json
from mlxgpt.common.folders import model_folder
from mlxgpt.common.model import families, params
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.tokenizers import ends, protocol
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

SIDECAR = ".provenance.json"  # appended to a file's name, for formats without a field for provenance
_BY_SUFFIX = {".gguf": "gguf", ".bin": "llama2c", ".pt": "nanogpt", ".pth": "gptmodel", ".npz": "npz"}
FILES = (".gguf", ".bin", ".pt", ".pth", ".npz", ".safetensors")
"""Ends of names that mean one file."""
# option -> the formats that read it
_ONLY = {
    "bits": ("mlx-lm", "gguf"),
    "gguf_type": ("gguf",),
    "keep_bits": ("mlx-lm",),
    "group_size": ("mlx-lm",),
    "max_shard": ("hf", "mlx-lm"),
    "version": ("llama2c",),
}
_MARGIN = 4 * 2**20  # bytes for headers, config.json and the like


@dataclass
class Report:
    """The result of a conversion."""

    path: Path
    format: str
    source: Path
    source_format: str
    parameters: int
    size: int  # bytes of the result
    seconds: float
    sha256: dict[str, str]  # of the result's files of weights, by name; {} without hashing
    notes: list[str] = field(default_factory=list)
    verified: bool = False


def convert(
    src: Path | str,
    dst: Path | str,
    to: str | None = None,
    *,
    force: bool = False,
    verify: bool = False,
    n_head: int = 0,
    config: Path | str | None = None,
    by_map: Path | str | None = None,
    **options: Any,
) -> Report:
    """Writes the model at ``src`` (see ``open_model``) to ``dst`` as the format ``to``; the source is only read.

    ``to`` follows from the suffix of ``dst`` (.gguf, .bin, .pt, .pth, .npz) unless given, else it is hf. ``options``
    are fields of ``Options``. ``force`` replaces what is at ``dst``, once the new one is complete. ``verify`` holds the
    result against the source and keeps it only if they agree. ``by_map``: a model that ``mlxgpt adopt`` took in as the
    file of its own code again, by the map.toml of that.

        >>> report = convert("ckpt.pt", "small.gguf", dtype="bfloat16")
        >>> report.format, sorted(report.sha256)
        ('gguf', ['small.gguf'])
        >>> convert("small.gguf", "again").source_format
        'gguf'

    Raises:
        UserError: the source is damaged, the format cannot say the model, there is no room, or ``dst`` is there.
        RunError: ``verify`` found a difference; nothing was kept.
    """
    if by_map is not None:
        writer, opened = Writer(Path(by_map).expanduser(), Path(dst)), open_model(src)
        writer.check(opened)
        check = functools.partial(writer.verify, opened) if verify else None
        return convert_opened(opened, src, dst, "map", force=force, verify=check, writer=writer, **options)
    suffix = Path(dst).suffix.lower()
    to = to or _BY_SUFFIX.get(suffix, "hf")
    if format_of(to).KIND == "folder" and suffix in FILES and _BY_SUFFIX.get(suffix) != to:
        raise UserError(f"{dst}: {to} is a folder: expected a name without {suffix}, or --to of a format in one file")
    _options(to, options)
    again = functools.partial(_verify, src, n_head=n_head, config=config) if verify else None
    try:
        opened = open_model(src, n_head, config)
    except UserError:
        found = None if n_head or config or verify else opening.known(Path(src).expanduser())
        if found is None:
            raise
        made = functools.partial(opening.write_map, whole=found[1])
        report = convert_opened(found[0], src, dst, to, force=force, verify=made, **options)
        return dataclasses.replace(report, verified=False)
    return convert_opened(opened, src, dst, to, force=force, verify=again, **options)


def convert_opened(
    opened: Opened,
    src: Path | str,
    dst: Path | str,
    to: str,
    *,
    force: bool = False,
    verify: Callable[[Path], None] | None = None,
    writer: Any = None,
    **options: Any,
) -> Report:
    """``convert`` of an opened model, such as one that no file holds; ``src`` names it in messages.

    ``writer`` is what writes it, as the modules of formats do, unless ``to`` is a format.
    """
    start = time.perf_counter()
    dst = Path(dst).expanduser()
    writer, made = writer or format_of(to), _options(to, options)
    if opened.config.labels and to != "hf":
        raise UserError(f"{src}: {opened.config.kind}: only --to hf has a place for it")
    check_places(opened, src, dst, to, force, writer.KIND)
    if hasattr(writer, "BESIDE"):
        output.check_free(dst.with_suffix(writer.BESIDE), force)
    if made.tokenizer:
        _take_tokenizer(opened, made.tokenizer)
    elif opened.format != "adopt" and opened.path.is_file() and not any(map(protocol.is_file_of, opened.companions)):
        opened.notes.append(f"{opened.path}: no tokenizer in it; --tokenizer FILE adds one")
    before = _stamps(opened)
    _check_room(dst, opened, to, made)
    guarded = dataclasses.replace(opened, tensors=_guarded(opened, made))
    with _as_user_errors(dst), output.workplace(dst, force) as place, _Digests(opened, made) as sources:
        notes = [*opened.notes, *writer.write(guarded, place, made)]
        notes += [f"{name}: {n} values are not finite (NaN or Inf)" for name, n in made.bad.items()]
        hashes = _result_digests(place, made) if made.hash else {}
        block = _provenance(opened, to, options, sources.result(), hashes)
        if _stamps(opened) != before:
            raise UserError(f"{opened.path}: changed while it was read")
        if writer.KIND == "folder":
            _seal(place, opened, block)
        if verify:
            verify(place)
        _put(place, dst, force, _beside(writer, opened, dst, block))
    seconds, count = time.perf_counter() - start, params.count(opened.config)
    return Report(dst, to, opened.path, opened.format, count, _size(dst), seconds, hashes, notes, verify is not None)


def _options(to: str, options: dict[str, Any]) -> Options:
    """The options as ``Options``.

    Raises:
        UserError: an option is unknown, has a wrong value, or does not apply to the format.
    """
    known = [each.name for each in dataclasses.fields(Options) if each.name not in ("digests", "bad")]
    for name in options:
        if name not in known:
            raise UserError(f"option {name!r}: expected one of {', '.join(known)}")
        if to not in _ONLY.get(name, (to,)):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {options[name]}: --to {to} has no such choice, only {' and '.join(_ONLY[name])}")
    if options.get("dtype", "float32") not in model_folder.DTYPES:
        raise UserError(f"dtype {options['dtype']!r}: expected one of {', '.join(model_folder.DTYPES)}")
    if "group_size" in options and not options.get("bits"):
        raise UserError(f"--group-size {options['group_size']}: expected --bits with it")
    return Options(**options)


def check_places(opened: Opened, src: Path | str, dst: Path, to: str, force: bool, kind: str = "folder") -> None:
    """Refuses a destination that exists, that overlaps the source, or that no ``kind`` of format ``to`` can replace.

    Raises:
        UserError: says which.
    """
    there = Path(os.path.realpath(dst))  # unlike resolve(), accepts a link that points to itself
    for source in {Path(os.path.realpath(place)) for place in (opened.path, Path(src).expanduser(), *opened.files)}:
        if source.exists() and (there == source or source in there.parents or there in source.parents):
            raise UserError(f"{dst}: is, holds or lies in the source {src}: expected another place")
    if not dst.parent.is_dir():
        raise UserError(f"{dst.parent}: no such folder")
    output.check_free(dst, force)
    if dst.is_dir() and not dst.is_symlink() and not (dst / "config.json").is_file() and any(dst.iterdir()):
        raise UserError(f"{dst}: --force replaces a model, but this folder holds none (no config.json)")
    if dst.exists() and dst.is_dir() != (kind == "folder"):
        raise UserError(f"{dst}: --force replaces a {kind} with a {to} model, and this is none")


def _beside(writer: Any, opened: Opened, dst: Path, block: dict[str, Any]) -> dict[Path, bytes | None]:
    """Files to write beside a single-file result: its provenance and the format's second file; None: remove it."""
    if writer.KIND == "folder":
        return {}
    made = {dst.with_name(dst.name + SIDECAR): (json.dumps(block, indent=2) + "\n").encode()}
    return made | ({dst.with_suffix(writer.BESIDE): writer.beside(opened, dst)} if hasattr(writer, "BESIDE") else {})


def _put(place: Path, dst: Path, force: bool, beside: dict[Path, bytes | None]) -> None:
    """Renames the result into place; the files beside an earlier result, which they describe, are removed first."""
    for path in beside:
        path.unlink(missing_ok=True)
    output.put(place, dst, force)
    for path, data in beside.items():
        if data is not None:
            with atomic_write(path) as file:
                file.write(data)


def _take_tokenizer(opened: Opened, path: Path) -> None:
    """Replaces the source's tokenizer with the one at ``path``.

    Raises:
        UserError: it cannot be read, or has more entries than the model's vocabulary.
    """
    tokenizer = load_tokenizer(path, opened.config.vocab_size)
    if tokenizer.n_vocab > opened.config.vocab_size:
        found = f"{tokenizer.n_vocab} tokens"
        raise UserError(f"{path}: {found}, but the model has a vocabulary of {opened.config.vocab_size}")
    dropped = put_tokenizer(opened, tokenizer)
    if dropped:
        opened.notes.append(f"{path}: in place of the source's {', '.join(dropped)}")


def put_tokenizer(opened: Opened, tokenizer: Tokenizer) -> list[str]:
    """Gives an opened model a tokenizer; returns the files that it had of another one."""
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(Path(place))
        files = protocol.read_files(Path(place))
    dropped = [name for name in opened.companions if protocol.is_file_of(name)]
    for name in dropped:
        del opened.companions[name]
    opened.companions.update(files)
    if tokenizer.eos_id is not None:
        opened.extra["eos_token_id"] = tokenizer.eos_id
        if ends.FILE in opened.companions:
            generation.set_ends(opened, ends.union([tokenizer.eos_id], sorted(tokenizer.ends)))
    return dropped


def _stamps(opened: Opened) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in opened.files)]


def _check_room(dst: Path, opened: Opened, to: str, options: Options) -> None:
    """Raises UserError if the result does not fit on the disk, before a byte is written."""
    needed = _MARGIN
    for tensor in opened.tensors.values():
        wide = model_folder.DTYPES[options.dtype].itemsize if options.dtype else tensor.dtype.itemsize
        matrix = len(tensor.shape) == 2
        each = options.bits / 8 + 2 * wide / options.group_size if options.bits and matrix else wide
        each = 34 / 32 if options.gguf_type and matrix else each  # the widest, q8_0
        needed += math.ceil(math.prod(tensor.shape) * (4 if to == "llama2c" else each))
    if opened.moments and to in ("hf", "nanogpt", "gptmodel", "map"):
        needed += 8 * params.count(opened.config)
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        room = f"{free / 2**20:.0f} MiB free, the result needs {needed / 2**20:.0f} MiB"
        raise UserError(f"{dst.parent}: {os.strerror(errno.ENOSPC)}: {room}")


def _guarded(opened: Opened, options: Options) -> dict[str, Tensor]:
    """The tensors, with a check for NaN and Inf in ``read``; code that streams stored bytes checks them itself."""

    def guard(name: str, tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            array = tensor.read()
            stream.note_bad(name, stream.count_not_finite(array), options)
            return array

        return dataclasses.replace(tensor, read=read)

    return {name: guard(families.to_foreign(opened.config, name)[0], tensor) for name, tensor in opened.tensors.items()}


class _Digests:
    """Computes sha256 of the source's files on a second thread, during the conversion."""

    def __init__(self, opened: Opened, options: Options):
        self._files = opened.files if options.hash else ()
        self._found, self._stopped = dict[str, str](), False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="source sha256", daemon=True)

    def __enter__(self) -> "_Digests":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        buffer = memoryview(bytearray(stream.BLOCK))
        try:
            for path in self._files:
                digest = hashlib.sha256()
                with open(path, "rb", buffering=0) as file:
                    while not self._stopped and (size := file.readinto(buffer)):
                        digest.update(buffer[:size])
                self._found[path.name] = digest.hexdigest()
        except OSError as error:
            self._error = error

    def result(self) -> dict[str, str]:
        """sha256 by file name; waits until all are computed.

        Raises:
            OSError: a file could not be read.
        """
        self._thread.join()
        if self._error:
            raise self._error
        return self._found


@contextlib.contextmanager
def _as_user_errors(dst: Path) -> Iterator[None]:
    """Turns an OSError into a UserError of one line that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else dst
        if f".{dst.name}.partial" in named.parts or named == dst:
            raise UserError(f"{dst}: cannot write: {reason}") from None
        raise UserError(f"{named}: {reason}") from None


def _weights(place: Path) -> list[Path]:
    """The files of weights of a result."""
    if place.is_file():
        return [place]
    return sorted(file for file in place.rglob("*") if file.suffix in (".safetensors", ".npz"))


def _result_digests(place: Path, options: Options) -> dict[str, str]:
    """sha256 of the result's files; those that the writer has not hashed are read again."""
    made = {}
    for file in _weights(place):
        name = file.relative_to(place).as_posix() if place.is_dir() else place.name
        if name not in options.digests:
            with open(file, "rb") as opened:
                options.digests[name] = hashlib.file_digest(opened, "sha256").hexdigest()
        made[name] = options.digests[name]
    return made


def _provenance(
    opened: Opened, to: str, options: dict[str, Any], sources: dict[str, str], results: dict[str, str]
) -> dict[str, Any]:
    """The provenance: source, program and time; None in place of a sha256 that was not requested."""
    return {
        "format_version": families.FORMAT_VERSION,
        "provenance": {
            "from": {
                "path": opened.path.name,
                "format": opened.format,
                "sha256": {file.name: sources.get(file.name) for file in opened.files},
            },
            "to": {"format": to, "sha256": results or None},
            "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
            **opened.origin,
            "mlxgpt": mlxgpt.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    }


def _seal(place: Path, opened: Opened, block: dict[str, Any]) -> None:
    """Writes the provenance into config.json, then the checksums of all files into a checkpoint's state."""
    values = read_json(place / "config.json")
    output.write_json(place / "config.json", values | {"mlxgpt": values.get("mlxgpt", {}) | block})
    if opened.moments and opened.moments.state and (place / "training").is_dir():
        names = {each.name for each in dataclasses.fields(checkpoint.RunState)}
        state = {name: value for name, value in opened.moments.state.items() if name in names}
        checkpoint.write_state(place, checkpoint.RunState(**state))


def _verify(src: Path | str, made: Path, n_head: int, config: Path | str | None) -> None:
    """Compares the result with the source before it is renamed into place.

    Raises:
        RunError: they differ, or a requested check could not run.
    """
    from convert.verify import verify

    report = verify(src, made, n_head=n_head, config=config)
    if not report.agrees:
        missing = [f"{item.what}: {item.reason}" for item in report.not_checked if item.requested]
        reasons = "; ".join([*map(str, report.findings[:3]), *missing[:3]])
        raise RunError(f"{src}: the result does not agree, nothing was kept: {reasons}")


def _size(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def line(report: Report) -> str:
    """One line that describes what was written."""
    agreed = ", agrees with the source" if report.verified else ""
    size = f"{report.size / 2**20:.1f} MiB" if report.size >= 2**20 else f"{report.size:,} bytes"
    return (
        f"{report.path}: {report.format}, from {report.source_format} {report.source}: "
        f"{report.parameters:,} parameters, "
        f"{size} in {report.seconds:.1f} s{agreed}"
    )
