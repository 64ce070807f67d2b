"""``mlxgpt quantize``: a model in fewer bits, in MLX's affine format, which mlx-lm loads; and what that cost."""

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.conversion import check_places, convert_opened
from convert.formats import output
from convert.quantize import awq, folding, gptq, mixed, windows
from convert.quantize.course import Course
from convert.quantize.hessians import Hessians
from convert.quantize.source import Source, open_source
from convert.quantize.spool import Spool
from convert.quantize.work import Method, Scheme
from mlxgpt.common import backend as backends
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders.tensors import read_header
from mlxgpt.common.inference.calibration import Compared
from mlxgpt.common.model import params
from mlxgpt.common.model.affine import BITS, GROUP_SIZES

TOKENS = 131_072  # of calibration, and of measuring, at most
METHODS: dict[str, Method | None] = {"rtn": None, "gptq": gptq.quantize, "awq": awq.quantize}
"""None: rounding to nearest, as mx.quantize does it, which needs no text."""


@dataclass
class Report:
    """What was written, and what it cost; perplexities and KL where there was a text to measure on."""

    path: Path
    source: Path
    method: str
    bits: str
    group_size: int
    bits_per_weight: float  # of all tensors, with scales and biases
    size: int  # bytes of the tensors
    size_before: int
    parameters: int
    matrices: dict[int, int]  # bits -> how many have so many
    matrix_bits: dict[str, int]  # by module
    whole: list[str]  # modules that groups do not divide
    calibrated: int  # tokens
    measured: int  # tokens
    perplexity_before: float | None
    perplexity: float | None
    kl: float | None  # KL(before || after), nats a token
    seconds: float
    notes: list[str] = field(default_factory=list)


def quantize(
    src: Path | str,
    dst: Path | str,
    bits: str | int,
    method: str = "gptq",
    *,
    data: str | None = None,
    eval_data: str | None = None,
    adapters: Sequence[tuple[str | Path, float]] = (),
    group_size: int = 64,
    dtype: str | None = None,
    hessians: Path | str | None = None,
    tokens: int = TOKENS,
    text_key: str = "text",
    force: bool = False,
    backend: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Writes the model at ``src`` to ``dst`` in fewer bits per weight.

    Args:
        src: what ``convert`` reads; an adapter or the run that trained one means the merged model.
        dst: the folder to make.
        bits: 2, 3, 4, 5, 6 or 8, or ``mixed:4.5``: so many per weight in all, by what each matrix can bear.
        method: one of METHODS.
        data: text to calibrate on; its last tenth is held out and measured on.
        eval_data: text to measure on instead.
        adapters: merged first.
        group_size: inputs that share a scale.
        dtype: of scales and of what is not quantized; default: the source's.
        hessians: a folder for what the text gave the matrices, which is read if it is there.
        tokens: of each text, at most.
        text_key: the key or column of the text.
        force: replaces ``dst``; also merges an adapter of another base.
        backend: mlx or torch.
        device: as ``load`` has it.
        say: is told of the progress.

    Raises:
        UserError: bad input, before anything is written.
        RunError: what the model computes is not finite.
    """
    begun = time.perf_counter()
    count = _bits(bits)
    _check(method, count, data, eval_data, hessians, group_size)
    dst, spelled = Path(dst).expanduser(), str(bits)
    output.check_free(dst, force)
    if not dst.parent.is_dir():
        raise UserError(f"{dst.parent}: no such folder")
    source = open_source(src, adapters, dtype, force)
    check_places(source.opened, src, dst, "mlx-lm", force)
    _check_apart(dst, data, eval_data, hessians)
    modules, whole = source.matrices(group_size)
    text, fits = None, METHODS[method] is not None
    if data is not None or eval_data is not None:
        tokenizer = source.tokenizer()
        first = data if data is not None else eval_data
        assert first is not None
        text = windows.read(
            first, eval_data, tokenizer, source.config, text_key, tokens, fits or isinstance(count, float)
        )
    walk = backends.load(backend).calibrate.Walk(source.config, device) if text else None
    if isinstance(count, float):
        assert text is not None
        schemes = mixed.schemes(count, source, walk, text.calibration, modules, group_size, say)
    else:
        schemes = {module: Scheme(count, group_size) for module in modules}
    saved = _hessians(hessians, source, schemes, method, text)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as folder:
        spool = Spool(Path(folder))
        course = Course(source, walk, schemes, METHODS[method], spool, saved, say)
        compared = None if walk is None else _run(course, text)
        opened = spool.opened(source, schemes)
        report = _report(source, dst, spelled, method, schemes, whole, text, compared)
        opened.origin["quantized"] = _provenance(report, data, eval_data)
        written = convert_opened(opened, src, dst, "mlx-lm", force=force, keep_bits=True)
    report.size = _size(dst)
    report.bits_per_weight = 8 * report.size / report.parameters
    left = folding.left(source.config) if method == "awq" else []
    report.notes = [*written.notes, *left, *(text.notes if text else ())]
    report.seconds = time.perf_counter() - begun
    return report


def _bits(bits: str | int) -> int | float:
    """A number of bits, or, as a float, so many per weight in all."""
    text = str(bits)
    if text.isdecimal() and int(text) in BITS:
        return int(text)
    found = re.fullmatch(r"mixed:(\d+(?:\.\d+)?)", text)
    if not found or not float(found[1]) > 0:
        raise UserError(f"--bits {text}: expected {', '.join(map(str, BITS))}, or mixed:4.5")
    return float(found[1])


def _check(
    method: str,
    bits: int | float,
    data: str | None,
    eval_data: str | None,
    hessians: Path | str | None,
    group_size: int,
) -> None:
    """Refuses a request that is not whole."""
    if method not in METHODS:
        raise UserError(f"--method {method}: expected one of {', '.join(METHODS)}")
    if group_size not in GROUP_SIZES:
        raise UserError(f"--group-size {group_size}: expected one of {', '.join(map(str, GROUP_SIZES))}")
    fits = METHODS[method] is not None
    for wanted, what in ((fits, f"--method {method}"), (isinstance(bits, float), f"--bits mixed:{bits:g}")):
        if wanted and data is None:
            raise UserError(f"{what}: no text to calibrate on: expected --data FILE")
    if hessians is not None and not fits:
        raise UserError(f"--hessians {hessians}: --method {method} has none")


def _check_apart(dst: Path, data: str | None, eval_data: str | None, hessians: Path | str | None) -> None:
    """Refuses Hessians where the result goes, and to measure on the text that is fitted."""
    places = [None if each is None else Path(os.path.realpath(Path(each).expanduser())) for each in (dst, hessians)]
    if places[1] and (places[0] == places[1] or places[0] in places[1].parents):
        raise UserError(f"--hessians {hessians}: is or lies in {dst}, where the model goes: expected another folder")
    if data and eval_data and os.path.realpath(data) == os.path.realpath(eval_data):
        raise UserError(f"--eval-data {eval_data}: is --data: expected another text, or none to hold out a tenth of it")


def _hessians(
    folder: Path | str | None,
    source: Source,
    schemes: dict[str, Scheme],
    method: str,
    text: windows.Windows | None,
) -> Hessians | None:
    if folder is None or text is None:
        return None
    asked = {
        "model": source.digest(),
        "text": hashlib.sha256(np.ascontiguousarray(text.calibration, "<i4").tobytes()).hexdigest(),
        "method": method,
        "bits": {module: scheme.bits for module, scheme in schemes.items()},
        "group_size": next(iter(schemes.values())).group_size,
    }
    return Hessians(Path(folder).expanduser(), asked)


def _run(course: Course, text: windows.Windows | None) -> Compared | None:
    """The course; of Hessians that it leaves half done none stay."""
    try:
        compared = course.run(text)
    except BaseException:
        if course.hessians:
            course.hessians.discard()
        raise
    if course.hessians:
        course.hessians.finish()
    if compared and not all(np.isfinite(each).all() for each in compared):
        raise RunError(f"{course.source.opened.path}: the losses are not finite")
    return compared


def _report(
    source: Source,
    dst: Path,
    bits: str,
    method: str,
    schemes: dict[str, Scheme],
    whole: list[str],
    text: windows.Windows | None,
    compared: Compared | None,
) -> Report:
    """All but what the written files say."""
    counts = sorted(scheme.bits for scheme in schemes.values())
    before, after, kl = (None,) * 3 if compared is None else (float(each.mean(dtype=np.float64)) for each in compared)
    return Report(
        path=dst,
        source=source.opened.path,
        method=method,
        bits=bits,
        group_size=next(iter(schemes.values())).group_size,
        bits_per_weight=math.nan,
        size=0,
        size_before=sum(math.prod(each.shape) * each.dtype.itemsize for each in source.opened.tensors.values()),
        parameters=params.count(source.config),
        matrices={each: counts.count(each) for each in dict.fromkeys(counts)},
        matrix_bits={module: scheme.bits for module, scheme in schemes.items()},
        whole=whole,
        calibrated=0 if text is None else text.calibration[:, 1:].size,
        measured=0 if text is None else text.evaluation[:, 1:].size,
        perplexity_before=None if before is None else math.exp(min(before, 700.0)),
        perplexity=None if after is None else math.exp(min(after, 700.0)),
        kl=kl,
        seconds=0.0,
    )


def _provenance(report: Report, data: str | None, eval_data: str | None) -> dict[str, Any]:
    """What the result's config.json says of it."""
    names = ("method", "bits", "group_size", "calibrated", "measured", "perplexity_before", "perplexity", "kl")
    made = {name: getattr(report, name) for name in names if getattr(report, name) is not None}
    texts = {"data": data, "eval_data": eval_data}
    return made | {name: Path(path).name for name, path in texts.items() if path is not None}


def _size(folder: Path) -> int:
    """Bytes of the tensors of a model's folder."""
    files = (read_header(path)[0] for path in sorted(folder.glob("model*.safetensors")))
    return sum(entry.stop - entry.start for entries in files for entry in entries.values())


def show(report: Report) -> str:
    """The report as lines of text."""
    shares = ", ".join(f"{count} matrices at {bits} bits" for bits, count in report.matrices.items())
    whole = f"; {len(report.whole)} that groups of {report.group_size} do not divide stay" if report.whole else ""
    made = [
        f"method           {report.method}, groups of {report.group_size}: {shares}{whole}",
        f"bits per weight  {report.bits_per_weight:.3f}, all tensors counted",
        f"size             {report.size / 2**20:.2f} MiB, before {report.size_before / 2**20:.2f}",
    ]
    if report.perplexity is not None and report.perplexity_before is not None and report.kl is not None:
        made += [
            f"perplexity       {report.perplexity:.4f}, before {report.perplexity_before:.4f}: on {report.measured:,} "
            "tokens that were held out",
            f"KL               {report.kl:.5f} nats a token",
        ]
    calibrated = f", calibrated on {report.calibrated:,} tokens" if report.calibrated else ""
    return "\n".join([*made, f"{report.path}: from {report.source} in {report.seconds:.1f} s{calibrated}"])


def to_json(report: Report) -> str:
    """The report as a JSON object."""
    return json.dumps(dataclasses.asdict(report), default=str)
