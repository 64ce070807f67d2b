"""The model that is quantized: its tensors, read when they are asked for, and what of them becomes words."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from convert.formats import stream
from convert.formats.adapter import fused
from convert.formats.opened import Opened, Options
from convert.formats.registry import open_model
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.folders.model_folder import DTYPES
from mlxgpt.common.model import families, params
from mlxgpt.common.tokenizers.load import from_files
from mlxgpt.common.tokenizers.protocol import Tokenizer, is_file_of


class Source(Mapping[str, np.ndarray]):
    """The parameters of an opened model by name, as they would be stored, in float32; none is kept.

    Raises:
        UserError: on access, values that are not finite, or do not fit ``dtype``.
    """

    def __init__(self, opened: Opened, dtype: str | None = None):
        self.opened, self._dtype = opened, DTYPES[dtype] if dtype else None

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.opened.config

    def dtype(self, name: str) -> np.dtype:
        """What a parameter is stored as, and a matrix's scales and biases."""
        return self._dtype or self.opened.tensors[name].dtype

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.opened.tensors[name].read()
        stream.note_bad(name, stream.count_not_finite(array), Options())
        return stream.cast(name, array, self.dtype(name)).astype(np.float32, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.opened.tensors)

    def __len__(self) -> int:
        return len(self.opened.tensors)

    def take(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Some of them, in memory."""
        return {name: self[name] for name in names}

    def matrices(self, group_size: int) -> tuple[list[str], list[str]]:
        """The modules whose matrices groups divide, tables included as mlx-lm has it, and those that stay whole.

        Raises:
            UserError: they divide none.
        """
        shapes = {name: param.shape for name, param in params.table(self.config).items() if len(param.shape) == 2}
        modules = {name.removesuffix(".weight"): shape[1] % group_size == 0 for name, shape in shapes.items()}
        if not any(modules.values()):
            widths = sorted({shape[1] for shape in shapes.values()})
            found = f"divides the inputs of no matrix ({', '.join(map(str, widths))})"
            raise UserError(f"{self.opened.path}: --group-size {group_size} {found}")
        return [name for name, fits in modules.items() if fits], [name for name, fits in modules.items() if not fits]

    def tokenizer(self) -> Tokenizer | None:
        """The model's, None if it has none."""
        files = {
            name: content if isinstance(content, bytes) else content.read_bytes()
            for name, content in self.opened.companions.items()
            if is_file_of(name)
        }
        return from_files(files, self.opened.path, dict(self.opened.extra)) if files else None

    def digest(self) -> str:
        """sha256 of all parameters as they would be stored."""
        found = hashlib.sha256()
        for name in self:
            array = self[name]
            found.update(f"{name} {list(array.shape)}\n".encode())
            found.update(np.ascontiguousarray(array, "<f4").view(np.uint8).data)
        return found.hexdigest()


def open_source(
    src: Path | str, adapters: Sequence[tuple[str | Path, float]], dtype: str | None, force: bool = False
) -> Source:
    """The model at ``src``, with adapters merged as ``mlxgpt fuse`` does; ``force``: also those of another base.

    Raises:
        UserError: it cannot be read, is quantized already, a classifier, or of an architecture that mlx-lm lacks.
    """
    if adapters:
        place, found = base_and_adapters.find_base(src, adapters)
        base = open_model(place)
        opened = fused(base, found, force, dtype)
    else:
        base = opened = open_model(src)
    if any(tensor.packed for tensor in base.tensors.values()):
        cure = f"mlxgpt fuse -m {src} --dequantize -o NEW" if opened is not base or opened.format == "adapter" else (
            f"mlxgpt convert {src} NEW --dtype bfloat16"
        )  # fmt: skip
        raise UserError(f"{src}: quantized already: expected a base in float32, float16 or bfloat16: {cure}")
    base_and_adapters.expect_task(opened.config, str(src))
    if families.family_of(opened.config).own:
        raise UserError(f"{src}: family mlxgpt: mlx-lm has no such architecture, so nothing would load the result")
    return Source(opened, dtype)
