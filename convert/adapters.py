"""Converts adapters between PEFT's layout and mlx-lm's; of the base the sizes are read, and what an adapter copied."""

import shlex
from pathlib import Path

import numpy as np

from convert.conversion import FILES
from convert.formats import output
from convert.formats.torch_files import file as torch_file
from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json
from mlxgpt.common.folders import adapter_folder, model_folder, peft_adapter, quantized, resolve
from mlxgpt.common.folders.adapter import Adapter, with_adapter
from mlxgpt.common.model import families, module_names
from mlxgpt.common.tokenizers import ends
from mlxgpt.common.tokenizers import protocol as tokenizer_protocol

LAYOUTS = ("peft", "mlx-lm")
PICKLED = "adapter_model.bin"


def is_adapter(src: Path | str) -> bool:
    """Whether SRC of ``convert`` is an adapter's folder, or a run that trained an adapter."""
    place = Path(src).expanduser()
    if not place.is_dir() or not (resolve.is_model(place) or resolve.is_run(place)):
        return False
    return adapter_folder.is_adapter(resolve.resolve_model(place))


def convert(
    src: Path | str, dst: Path | str, to: str | None = None, model: Path | str | None = None, force: bool = False
) -> tuple[Adapter, list[str]]:
    """Writes the adapter at ``src`` to the folder ``dst``; the adapter, and lines to say.

    Args:
        src: its folder, as PEFT, mlx-lm or a run of ours left it; also PEFT's older adapter_model.bin.
        dst: the folder to make.
        to: peft or mlx-lm; default: both layouts, as far as they can hold it.
        model: the base, or a folder with its config.json; default: the one that the adapter names.
        force: replace what is at ``dst``, once the new one is complete.

    Raises:
        UserError: the adapter is damaged or not of this model, the layout cannot hold it, or ``dst`` is there.
    """
    place, dst = resolve.resolve_model(src), Path(dst).expanduser()
    if to not in (None, *LAYOUTS):
        raise UserError(
            f"--to {to}: {place} is an adapter: expected {' or '.join(LAYOUTS)}; {_fuse_first(src, dst, to)}"
        )
    if dst.suffix.lower() in FILES:
        raise UserError(f"{dst}: {place} is an adapter, which is a folder; {_fuse_first(src, dst)}")
    there = dst.exists() or dst.is_symlink()
    if there and not (force and adapter_folder.is_adapter(dst)):
        raise UserError(f"{dst}: exists" + ("; --force replaces an adapter, but this is none" * force))
    if not dst.parent.is_dir():
        raise UserError(f"{dst.parent}: no such folder")
    base = Path(model).expanduser() if model else adapter_folder.base_of(place)
    pickled = _pickled(place / PICKLED) if (place / PICKLED).is_file() else None
    weights = any((base / file).is_file() for file in (model_folder.SINGLE, model_folder.INDEX))
    known = model_folder.read_config(base) if weights else _config(base)
    # of other weights is fine here: only what an adapter carries of its base's is held against them
    adapter = adapter_folder.read_adapter(place, base if weights else None, known, force=True, pickled=pickled)
    config = with_adapter(known, adapter)
    with output.workplace(dst, force) as made:
        made.mkdir()
        gaps = adapter_folder.save(made, config, adapter, LAYOUTS if to is None else (to,))
        tokenizer_protocol.write_files(made, tokenizer_protocol.read_files(place))
        if (place / ends.FILE).is_file():
            (made / ends.FILE).write_bytes((place / ends.FILE).read_bytes())
        output.put(made, dst, force)
    return adapter, [*adapter.notes, *gaps]


def _fuse_first(src: Path | str, dst: Path, to: str | None = None) -> str:
    """The two commands that make a model of an adapter in the format that was asked for."""
    model = shlex.join(["mlxgpt", "fuse", "--model", str(adapter_folder.base_of(resolve.resolve_model(src))),
                        "--adapter", str(src), "--out", "FUSED"])  # fmt: skip
    more = shlex.join(["mlxgpt", "convert", "FUSED", str(dst), *(["--to", to] if to else [])])
    return f"fuse it first: {model}, then {more}"


def _config(base: Path) -> ModelConfig:
    where = base / "config.json"
    return families.config_from_hf(quantized.plain_values(base, read_json(where)), str(where))


def _pickled(path: Path) -> dict[str, np.ndarray]:
    """The tensors of PEFT's adapter_model.bin, read without executing code from the pickle."""
    found = torch_file.state_dict(str(path), torch_file.load_file(path), module_names.OUTER)
    return {name: tensor.float().numpy() for name, tensor in found.items()}


def line(adapter: Adapter, dst: Path | str) -> str:
    """One line that describes what was written."""
    layouts = [
        name
        for name, file in (("peft", peft_adapter.TENSORS), ("mlx-lm", adapter_folder.mlx_lm_adapter.TENSORS))
        if (Path(dst) / file).is_file()
    ]
    count = sum(array.size for name, array in adapter.params.items() if not name.endswith(".tokens"))
    return f"{dst}: {' and '.join(layouts)}, {adapter.method} of {len(adapter.targets)} matrices, {count:,} parameters"
