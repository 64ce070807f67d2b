"""Adapter folders: what a LoRA or DoRA run saves, loads in PEFT and in mlx-lm as it is, and theirs are read here.

    adapter_config.json          PEFT's keys and mlx-lm's side by side; ours under "mlxgpt"
    adapter_model.safetensors    PEFT's names and layout (peft_adapter.py)
    adapters.safetensors         mlx-lm's (mlx_lm_adapter.py), where it can hold the adapter
    tokenizer files              where training added tokens or a chat template
    generation_config.json       eos_token_id: what ends a text, of the base and of the template that was tuned with

Reading prefers PEFT's file, which keeps ranks and scales as they are, and holds mlx-lm's against it. PiSSA is written
as one update of rank 2 r, [A; A0] and [B, -B0], which acts on the untouched base; "mlxgpt" says that it is one.
"""

import dataclasses
import functools
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.config import AdapterConfig, ModelConfig, Recipe
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.files import read_json, write_json
from mlxgpt.common.folders import mlx_lm_adapter, model_folder, peft_adapter, resolve
from mlxgpt.common.folders.adapter import VOCABULARY, Adapter
from mlxgpt.common.folders.peft.names import by_suffix, suffixes, tidy, usual
from mlxgpt.common.folders.tensors import read_header, read_tensor, write_tensors
from mlxgpt.common.model import adapters, families, params, quantization_methods
from mlxgpt.common.model.adapters import Target
from mlxgpt.common.recipes import SECTIONS
from mlxgpt.common.tokenizers import ends as text_ends

CONFIG = "adapter_config.json"
LAYOUTS = ("peft", "mlx-lm")
FORMAT_VERSION = 1
_BLOCK = 1 << 22
_ROUNDED = 2.0**-22  # of an element of scale b: that factor, rounded twice
_AGREES = 1e-6  # of the largest weight of an update: the factor that mlx-lm's file has in b is rounded


def write_adapter(
    place: Path,
    recipe: Recipe,
    base_folder: Path | str,
    arrays: Mapping[str, np.ndarray],
    tokenizer: Any = None,
    base: str | None = None,
    ends: Sequence[int] = (),
) -> None:
    """Writes the adapter that a run trains; ``place`` exists.

    Args:
        place: the folder.
        recipe: of the run; its model is the one that runs, also where training added tokens.
        base_folder: the base model's files.
        arrays: by name what adapters.trainable(recipe) lists, and start_a and start_b with PiSSA.
        tokenizer: written beside it, where training added tokens or a chat template.
        base: what is recorded of where the base is, such as a hub id; default: the folder's whole path.
        ends: the tokens that end a generated text, the base's among them.

    Raises:
        UserError: neither PEFT nor mlx-lm can hold it, or the system refuses to write.
        RunError: a tensor is not finite.
    """
    assert recipe.adapter is not None
    base_folder = Path(base_folder)
    adapter = Adapter(
        method=recipe.adapter.method,
        targets=adapters.targets(recipe.model, recipe.adapter),
        params=dict(arrays),
        adapter=recipe.adapter,
        base=base or str(base_folder.resolve()),
        base_sha256=base_sha256(base_folder),
        apart=model_folder.read_config(base_folder).tied and not recipe.model.tied,
    )
    save(place, recipe.model, adapter)
    if tokenizer is not None:
        tokenizer.save(place)
    if ends:
        write_json(place / text_ends.FILE, {"eos_token_id": text_ends.as_value(ends)})


def save(place: Path, config: ModelConfig, adapter: Adapter, layouts: tuple[str, ...] = LAYOUTS) -> list[str]:
    """Writes ``adapter`` into the folder ``place`` in these layouts, as far as they can hold it; one must.

    Returns:
        Why one cannot.

    Raises:
        UserError: none of them can, or the system refuses to write.
        RunError: a tensor is not finite.
    """
    for name, array in adapter.params.items():
        if not np.isfinite(array).all():
            raise RunError(f"{name} has values that are not finite (NaN or Inf); nothing was written")
    targets, arrays = _joined(adapter)
    ours = adapter.adapter
    dropout = ours.dropout if ours else 0.0
    made, refused = {}, []
    if "peft" in layouts:
        refused.append(peft_adapter.gap(config, adapter.method, targets, arrays))
        if refused[-1] is None:
            rslora = bool(ours and ours.rslora)
            made["peft"] = peft_adapter.encode(config, adapter.method, targets, arrays, rslora, dropout)
    if "mlx-lm" in layouts:
        refused.append(mlx_lm_adapter.gap(targets, arrays, adapter.apart))
        if refused[-1] is None:
            made["mlx-lm"] = mlx_lm_adapter.encode(config, adapter.method, targets, arrays, dropout)
    if not made:
        raise UserError("; ".join(filter(None, refused)))
    values: dict[str, Any] = {"base_model_name_or_path": adapter.base or ""}
    for layout, file in (("peft", peft_adapter.TENSORS), ("mlx-lm", mlx_lm_adapter.TENSORS)):
        if layout in made:
            said, tensors = made[layout]
            values |= said
            metadata = {"format": "pt" if layout == "peft" else "mlx"}
            write_tensors(place / file, tensors, metadata, np.dtype(np.float32))
    own: dict[str, Any] = {"format_version": FORMAT_VERSION}
    if adapter.base_sha256:
        own["base_sha256"] = adapter.base_sha256
    own["pissa"] = any(name.endswith(".start_a") for name in adapter.params)
    own["vocab_size"] = config.vocab_size
    if config.labels:
        own["labels"] = list(config.labels)
    own["targets"] = {path: {"rank": t.rank, "scale": t.scale} for path, t in adapter.targets.items()}
    if ours:
        own["adapter"] = dataclasses.asdict(ours)
    write_json(place / CONFIG, values | {"mlxgpt": own})
    return [line for line in refused if line]


def limits(recipe: Recipe, apart: bool = False) -> list[str]:
    """Lines about who cannot load what a run will save; said before it trains.

    Args:
        recipe: of the run.
        apart: its base is tied, and the run's model is not.

    Raises:
        UserError: neither PEFT nor mlx-lm can hold it.
    """
    assert recipe.adapter is not None
    targets, names = adapters.targets(recipe.model, recipe.adapter), adapters.trainable(recipe)
    gaps = [
        peft_adapter.gap(recipe.model, recipe.adapter.method, targets, names),
        mlx_lm_adapter.gap(targets, names, apart),
    ]
    if all(gaps):
        raise UserError("; ".join(filter(None, gaps)))
    return [line for line in gaps if line]


def read_adapter(
    path: Path | str,
    base_folder: Path | str | None,
    config: ModelConfig,
    force: bool = False,
    pickled: Mapping[str, np.ndarray] | None = None,
) -> Adapter:
    """The adapter in a folder that was written here, by PEFT or by mlx-lm, for the model ``config``.

    Args:
        path: the folder.
        base_folder: the model it goes on; None: nothing is held against it.
        config: that model's; its vocabulary may be smaller than the adapter's, if training added tokens.
        force: take it although it was trained on a model with other weights.
        pickled: tensors of PEFT's adapter_model.bin, which is not read here.

    Raises:
        UserError: it is damaged or incomplete, for another model, or of a kind that is not supported.
    """
    path = Path(path)
    values = read_json(path / CONFIG)
    own = _own(values.get("mlxgpt"), path)
    labels = tuple(own.get("labels", ()))
    made, notes = list[Adapter](), list[str]()
    if pickled is not None or (path / peft_adapter.TENSORS).exists():
        tensors = pickled if pickled is not None else _tensors(path / peft_adapter.TENSORS)
        labels = labels or config.labels or peft_adapter.labels(values, tensors)
        made.append(peft_adapter.decode(values, tensors, dataclasses.replace(config, labels=labels), str(path)))
    for file in (mlx_lm_adapter.TENSORS, mlx_lm_adapter.OLD_TENSORS):
        if (path / file).exists():
            tensors = _tensors(path / file)
            made.append(mlx_lm_adapter.decode(values, tensors, config, str(path), old=file.endswith(".npz")))
            notes += made[-1].notes
            break
    if not made:
        others = ", ".join(sorted(p.name for p in path.glob("adapter*") if p.name != CONFIG)) or "neither"
        others += " (mlxgpt convert reads it)" * others.endswith(".bin")
        raise UserError(f"{path}: found {others}, expected {peft_adapter.TENSORS} or {mlx_lm_adapter.TENSORS}")
    adapter = made[0]
    if len(made) == 2:
        _check_same(path, adapter, made[1])
    if labels and "wte.weight" not in adapter.params and own.get("vocab_size", 0) > config.vocab_size:
        adapter.vocab_size = own["vocab_size"]  # the padding token's row, which does not train
    found = adapter.vocab_size or config.vocab_size
    if own.get("vocab_size", found) != found:
        raise UserError(
            f"{path / CONFIG}: mlxgpt.vocab_size = {own['vocab_size']}: the tensors and the base have {found}"
        )
    for name, array in adapter.params.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} has values that are not finite (NaN or Inf)")
        adapter.params[name] = np.ascontiguousarray(array, array.dtype if name.endswith(".tokens") else np.float32)
    adapter.adapter, adapter.labels, adapter.notes = own.get("adapter"), labels or config.labels, notes
    adapter.base = values.get("base_model_name_or_path") or values.get("model")
    adapter.base_sha256 = own.get("base_sha256")
    if own.get("pissa"):
        _split(adapter)
    if base_folder is not None:
        _check_base(path, Path(base_folder), adapter, force)
    _settle(path, None if base_folder is None else Path(base_folder), adapter, config)
    return adapter


def to_config(adapter: Adapter, config: ModelConfig) -> AdapterConfig:
    """The settings that give these targets, ranks and scales again: an adapter is trained on with them."""
    if adapter.adapter is not None:
        return adapter.adapter
    able = [name.removesuffix(".weight") for name, param in params.table(config).items() if param.adaptable]
    layer = {path: int(path.split(".")[1]) for path in able if path.startswith("h.")}
    first = min((layer[path] for path in adapter.targets if path in layer), default=0)
    able = [path for path in able if layer.get(path, first) >= first]
    ranks = {path: target.rank for path, target in adapter.targets.items()}
    alphas = {path: tidy(target.scale * target.rank) for path, target in adapter.targets.items()}
    rank, alpha = usual(ranks, 8), usual(alphas, 16)
    whole = [name for name in params.table(config) if name in adapter.params]
    saved = [name.removesuffix(".weight") for name in whole if name.endswith(".weight")]
    biases = [name.removesuffix(".bias") for name in whole if name.endswith(".bias")]
    biases = [path for path in biases if path not in saved]
    return AdapterConfig(
        method=adapter.method,
        targets=tuple(suffixes(set(ranks), able) or ranks),
        layers=config.n_layer - first if first else 0,
        rank=rank,
        alpha=float(alpha),
        ranks=tuple(f"{name}={value}" for name, value in by_suffix(ranks, rank).items()),
        alphas=tuple(f"{name}={value}" for name, value in by_suffix(alphas, alpha).items()),
        init="pissa" if any(name.endswith(".start_a") for name in adapter.params) else "default",
        train=tuple(saved),
        bias="none" if not biases else "adapted" if set(biases) <= set(ranks) else "all",
    )


def _joined(adapter: Adapter) -> tuple[dict[str, Target], dict[str, np.ndarray]]:
    """Targets and tensors with PiSSA's start as part of one update of rank 2 r."""
    targets, arrays = dict(adapter.targets), dict(adapter.params)
    for path, target in adapter.targets.items():
        if f"{path}.start_a" in arrays:
            targets[path] = dataclasses.replace(target, rank=2 * target.rank)
            start_a, start_b = arrays.pop(f"{path}.start_a"), arrays.pop(f"{path}.start_b")
            arrays[f"{path}.lora_a"] = np.concatenate([arrays[f"{path}.lora_a"], start_a])
            arrays[f"{path}.lora_b"] = np.concatenate([arrays[f"{path}.lora_b"], -start_b], axis=1)
    return targets, arrays


def _split(adapter: Adapter) -> None:
    """Undoes ``_joined``."""
    for path, target in list(adapter.targets.items()):
        half = target.rank // 2
        adapter.targets[path] = dataclasses.replace(target, rank=half)
        a, b = adapter.params[f"{path}.lora_a"], adapter.params[f"{path}.lora_b"]
        adapter.params |= {f"{path}.lora_a": a[:half], f"{path}.lora_b": np.ascontiguousarray(b[:, :half])}
        adapter.params |= {f"{path}.start_a": a[half:], f"{path}.start_b": np.ascontiguousarray(-b[:, half:])}


def _own(own: Any, path: Path) -> dict[str, Any]:
    """Our part of adapter_config.json, checked."""
    if own is None:
        return {}
    if not isinstance(own, dict) or own.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path / CONFIG}: mlxgpt: expected a table with format_version {FORMAT_VERSION}")
    made = dict(own)
    for key, kind in (("base_sha256", str), ("vocab_size", int), ("pissa", bool), ("adapter", dict), ("labels", list)):
        if key in own and type(own[key]) is not kind:
            raise UserError(f"{path / CONFIG}: mlxgpt.{key}: expected {kind.__name__}")
    if "adapter" in own:
        fields = {f.name: f for f in dataclasses.fields(SECTIONS["adapter"])}
        given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in own["adapter"].items()}
        for key, value in given.items():
            if key not in fields or type(value) is not type(fields[key].default):
                raise UserError(f"{path / CONFIG}: mlxgpt.adapter.{key} = {value!r} is not understood")
        made["adapter"] = AdapterConfig(**given)
    return made


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as float32; an .npz without pickles."""
    if file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as opened:
                made = {name: opened[name] for name in opened.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{file}: damaged: {error}") from None
    else:
        made = {name: read_tensor(entry) for name, entry in read_header(file)[0].items()}
    for name, array in made.items():
        if array.dtype not in model_folder.DTYPES.values():
            raise UserError(f"{file}: {name} has dtype {array.dtype}, expected one of {', '.join(model_folder.DTYPES)}")
    return {name: array.astype(np.float32, copy=False) for name, array in made.items()}


def _update(targets: Mapping[str, Target], arrays: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    return targets[path].scale * (arrays[f"{path}.lora_b"] @ arrays[f"{path}.lora_a"])


def _check_same(path: Path, ours: Adapter, theirs: Adapter) -> None:
    """Holds mlx-lm's file against PEFT's: what of the two is not the other's is named."""
    stale = f"{path}: {mlx_lm_adapter.TENSORS} and {peft_adapter.TENSORS} differ"
    for name in sorted(set(ours.targets) - set(theirs.targets)):
        raise UserError(f"{stale}: {name} is adapted in the second alone; remove the one that is old")
    for name in theirs.targets:
        m, n = (each.params.get(f"{name}.magnitude") for each in (ours, theirs))
        if m is not None and n is not None and not np.array_equal(m, n):
            raise UserError(f"{stale} in the magnitude of {name}; remove the one that is old")
        if name in ours.targets and _same_factors(ours, theirs, name):
            continue
        other = _update(theirs.targets, theirs.params, name)
        own = _update(ours.targets, ours.params, name) if name in ours.targets else np.zeros_like(other)
        same = own.shape == other.shape
        if not same or not np.abs(other - own).max() <= _AGREES * max(np.abs(own).max(), np.abs(other).max(), 1e-30):
            raise UserError(f"{stale} in {name}; remove the one that is old")


def _same_factors(ours: Adapter, theirs: Adapter, name: str) -> bool:
    """Whether A is equal and scale B equal but for rounding, which is quicker to see than the same of B A."""
    a, b = f"{name}.lora_a", f"{name}.lora_b"
    if not np.array_equal(ours.params[a], theirs.params[a]) or ours.params[b].shape != theirs.params[b].shape:
        return False
    own, other = (each.targets[name].scale * each.params[b] for each in (ours, theirs))
    return bool((np.abs(own - other) <= _ROUNDED * np.abs(own)).all())


def _check_base(path: Path, base: Path, adapter: Adapter, force: bool) -> None:
    """Refuses an adapter of other weights."""
    if adapter.base_sha256 and not force:
        found = base_sha256(base)
        if found != adapter.base_sha256:
            raise UserError(
                f"{path}: was trained on a model with sha256 {adapter.base_sha256[:12]}, but {base} has {found[:12]}: "
                f"expected {adapter.base or 'its own base'}, or --force"
            )


def _settle(path: Path, base: Path | None, adapter: Adapter, config: ModelConfig) -> None:
    """Drops what the adapter carries of its base's weights where it is the base's own, and puts new rows into the rest.

    What differs takes the base's place if it is of the vocabulary, as in PEFT; else it is refused.
    """
    shapes = {name: param.shape for name, param in params.table(config).items()}
    weights: Mapping[str, np.ndarray] | None = None
    kept = []
    for name in adapter.carried:
        ours = "wte.weight" if name == "lm_head.weight" and config.tied else name
        if adapter.params[name].shape == shapes.get(ours):
            if base is not None and weights is None:
                weights = model_folder.read_params(base, model_folder.read_config(base))
            if weights is None or np.array_equal(adapter.params[name], weights[ours]):
                adapter.notes += [f"{path}: {name} is a copy of the base's, and left out"] * (weights is None)
                del adapter.params[name]
                continue
            if name not in VOCABULARY:
                leaf = "modules_to_save does not name it" if name.endswith(".weight") else "bias is none"
                raise UserError(f"{path}: unexpected tensor {name}, which is not the base's: {leaf}")
            adapter.notes.append(f"{path}: {name} is not the base's, and takes its place (as in PEFT)")
        kept.append(name)
    adapter.carried = tuple(kept)
    for place in ("wte", "lm_head"):
        if f"{place}.rows" in adapter.params and f"{place}.weight" in adapter.params:
            adapter.params[f"{place}.weight"] = adapters.with_rows(
                adapter.params[f"{place}.weight"], adapter.params, place
            )
            del adapter.params[f"{place}.rows"], adapter.params[f"{place}.tokens"]


def is_adapter(place: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (place / CONFIG).is_file() and not (place / "config.json").is_file()


def base_of(adapter: Path) -> Path:
    """The folder of the model that an adapter says it was trained on.

    Raises:
        UserError: it says none, or that one is not there.
    """
    values = read_json(adapter / CONFIG)
    name = values.get("base_model_name_or_path") or values.get("model")
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter}: an adapter that names no base: expected --model BASE --adapter {adapter}")
    try:
        place = resolve.resolve_model(name)
    except UserError as error:
        raise UserError(
            f"{adapter}: its base is gone: {error}; --model BASE --adapter {adapter} names another"
        ) from None
    if is_adapter(place):
        raise UserError(f"{adapter}: its base {name} is an adapter: expected a model (mlxgpt fuse makes one)")
    return place


def base_sha256(base: Path | str, most: int | None = None) -> str:
    """What identifies a model's weights: sha256 over name, dtype, shape and bytes of every tensor, sorted by name.

    Independent of how they are spread over files. A head that is the embedding's copy, and buffers, do not count.
    ``most``: bytes of each tensor that count, for who has no time; training changes the first ones, too. None: all.
    """
    base = Path(base)
    files = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(base.glob("model*")))
    return _hashed(base, files, most)


@functools.lru_cache(maxsize=8)
def _hashed(base: Path, files: tuple[tuple[str, int, int], ...], most: int | None) -> str:
    config = model_folder.read_config(base)
    head = families.to_foreign(config, "lm_head.weight")[0] if config.tied else None
    own = quantization_methods.is_mlx_lm(read_json(base / "config.json"))  # then names are those of mlx-lm's modules
    found = model_folder.find_tensors(base)
    entries = {name if own else families.strip(config, name): entry for name, entry in found.items()}
    digest = hashlib.sha256()
    for name in sorted(name for name in entries if name not in (None, head)):
        entry = entries[name]
        digest.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
        with open(entry.path, "rb") as file:
            file.seek(entry.start)
            rest = entry.stop - entry.start
            rest = rest if most is None else min(rest, most)
            while rest:
                block = file.read(min(rest, _BLOCK))
                if not block:
                    raise UserError(f"{entry.path}: truncated while it was read")
                digest.update(block)
                rest -= len(block)
    return digest.hexdigest()
