"""The interface of readers and writers: an opened model, whose tensors are read one at a time.

A format is one file of this package with ``recognize(path) -> bool``, ``read(path) -> Opened`` and, where it can be
written, ``write(opened, place, options)``. Names and layouts are those of mlxgpt/common/model/params.py in between, so
a format knows nothing of another.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.folders.tensors import Entry
from mlxgpt.common.tokenizers.protocol import read_json


@dataclass(frozen=True)
class Tensor:
    """One tensor: ``shape`` in our layout, matrices [out, in]; ``dtype`` as stored.

    ``read`` gives the whole of it in our layout. ``stored`` is where its very bytes lie, little-endian and without
    gaps, as our layout or, with ``transposed``, as [in, out]; None where they take arithmetic to get at. A writer whose
    layout and dtype are the same copies them in pieces and never calls ``read``. What mlx-lm has quantized is read
    as float32; ``packed`` says how it was.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    stored: Entry | None = None
    transposed: bool = False
    packed: "Packed | None" = None


@dataclass(frozen=True)
class Packed:
    """How a matrix is quantized; ``parts``: its packed integers, scales and biases, None if the matrix changed."""

    bits: int
    group_size: int
    dtype: np.dtype  # of scales and biases
    parts: tuple[Entry, Entry, Entry] | None = None


@dataclass(frozen=True)
class Moments:
    """AdamW's state, by our names and in our layout; ``step`` is the last finished step, ``t`` the number of updates.

    ``state`` has the fields of checkpoint.RunState, as far as the source says them; None where it says none.
    """

    m: Mapping[str, Tensor]
    v: Mapping[str, Tensor]
    t: int
    step: int
    state: Mapping[str, Any] | None = None


@dataclass
class Opened:
    """A model in some format; everything except the tensors' data has been read and checked."""

    path: Path
    format: str  # the name that --to knows it by
    config: ModelConfig
    tensors: Mapping[str, Tensor]  # exactly params.table(config), in its order
    files: tuple[Path, ...]  # the files of weights, for the provenance
    companions: dict[str, Path | bytes] = field(
        default_factory=dict
    )  # file of a Hugging Face folder -> it, or its bytes
    extra: dict[str, Any] = field(
        default_factory=dict
    )  # keys of config.json that do not describe the model: token ids and the like
    moments: Moments | None = None
    notes: list[str] = field(default_factory=list)  # lines to print: what was dropped, rewritten or cannot be expressed
    origin: dict[str, Any] = field(default_factory=dict)  # what the result's provenance says beside


def companion_json(opened: Opened, name: str) -> dict[str, Any]:
    """A JSON file that travels with a model; {} where it is not there.

    Raises:
        UserError: it is not a JSON object.
    """
    content = opened.companions.get(name)
    if content is None:
        return {}
    data = content if isinstance(content, bytes) else content.read_bytes()
    return read_json({name: data}, name, opened.path)


@dataclass(frozen=True)
class Options:
    """Options of ``convert``, apart from the format."""

    dtype: str | None = None  # float32, float16, bfloat16; None: as stored
    bits: int = 0  # mlx-lm: 4 or 8 bits a weight; gguf: 4 is Q4_0, 8 is Q8_0; 0: not quantized
    gguf_type: str | None = None  # q4_0, q4_1, q5_0, q5_1 or q8_0
    keep_bits: bool = False  # mlx-lm: quantized as the source is, what did not change bit for bit
    group_size: int = 64  # mlx-lm: inputs that share a scale
    max_shard: int = 5 * 10**9  # bytes of a file of weights at the most
    version: int = 0  # llama2c: 0 or 1
    tokenizer: Path | None = None  # a tokenizer that the source does not have
    hash: bool = True  # sha256 of source and result in the provenance
    allow_nan: bool = False
    # filled in by writers: sha256 by file name, number of values that are not finite by tensor name
    digests: dict[str, str] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
