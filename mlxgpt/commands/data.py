"""The verbs ``data fetch|inspect|prepare|export``; each returns its exit code."""

import json
import tarfile
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common import errors, recipes
from mlxgpt.common.config import DataConfig
from mlxgpt.common.data import corpus as corpora
from mlxgpt.common.data import prepare as preparing
from mlxgpt.common.data import shards
from mlxgpt.common.data.fetch import CORPORA
from mlxgpt.common.data.fetch import fetch as fetch_corpus
from mlxgpt.common.data.inspect import inspect_corpus, inspect_shards
from mlxgpt.common.data.split import told
from mlxgpt.common.data.token_source import is_flat
from mlxgpt.common.errors import UserError
from mlxgpt.common.files import put
from mlxgpt.common.folders import resolve
from mlxgpt.common.runs import checkpoint
from mlxgpt.common.tokenizers.load import KINDS, load_tokenizer


def fetch_command(args: Namespace) -> int:
    """``data fetch NAME [--from FILE] [--out DIR]``."""
    if args.name not in CORPORA:
        known = ", ".join(f"{name} ({known.about})" for name, known in CORPORA.items())
        raise UserError(f"unknown corpus {args.name!r}{errors.nearest(args.name, CORPORA)}: one of {known}")
    folder = Path(args.out) if args.out else preparing.cache_folder() / "corpora"
    path = fetch_corpus(CORPORA[args.name], folder, Path(args.from_file) if args.from_file else None)
    print(f"train on it: mlxgpt train shakespeare-char-cpu --data {path}")
    return 0


def inspect_command(args: Namespace) -> int:
    """``data inspect SOURCE|SHARDS [--tokenizer PATH] [--json]``; with ``--model``, fine-tuning examples."""
    if args.model:
        from mlxgpt.common.align.source import open_recipe
        from mlxgpt.common.sft.inspect import inspect_examples

        task = recipes.apply_sets({}, args.set).get("tune", {}).get("task")
        return inspect_examples(args, open_recipe) if task in ("prefer", "reward") else inspect_examples(args)
    if args.set or args.rows is not None:
        raise UserError("--set and --rows: only with --model, for fine-tuning examples")
    notes: list[str] = []
    say = notes.append if args.json else print
    if shards.is_shards(Path(args.source)):
        if args.tokenizer:
            raise UserError(f"{args.source}: shards already hold tokens: expected no --tokenizer")
        found = inspect_shards(Path(args.source))
    else:
        tokenizer = resolve.resolve_tokenizer(args.tokenizer) if args.tokenizer else None
        found = inspect_corpus(corpora.open_corpus(args.source, args.text_key), tokenizer, say)
    if args.json:
        print(json.dumps(found))
        return 0
    for note in found["notes"]:
        print(note)
    _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    kind = found["tokenizer"]
    origin = f", {kind['origin']}" if "origin" in kind else ""
    rows = [
        ("documents", f"{found['documents']:,}"),
        ("bytes", f"{found['bytes']:,}"),
        ("tokens", f"{found['tokens']:,} ({kind['kind']} of {kind['vocab_size']:,}{origin})"),
        ("begins with", _beginning(found)),
        ("tokens per byte", f"{found['tokens_per_byte']:.3f}"),
        (
            "duplicates",
            "cannot tell without an eos token" if found["duplicates"] is None else f"{found['duplicates']:,}",
        ),
    ]
    for name, split in found.get("splits", {}).items():
        count = f"{split['tokens']:,} tokens, {split['documents']:,} documents, {split['shards']} shards"
        rows.append((name, count))
    if found.get("byte_order_marks"):
        rows.append(("byte order marks", f"{found['byte_order_marks']:,} documents start with one; it is kept as text"))
    for place, item in enumerate(found["longest"] or []):
        unit = "tokens" if "tokens" in item else "characters"
        rows.append(("longest" if place == 0 else "", f"{item[unit]:,} {unit}: {item['document']}"))
    for line in told(found.get("held_out", {})):
        rows.append(("validation", line.removeprefix("validation: ")))
    for name, value in rows:
        print(f"{name:<17}{value}")
    print(f"{'sample':<17}{found['sample']!r}")


def _beginning(found: dict[str, Any]) -> str:
    numbers = ", ".join(map(str, found["begins_with"]))
    return f"{found['begins_with_text']} ({numbers})" if numbers else "nothing"


def prepare_command(args: Namespace) -> int:
    """``data prepare SOURCE --out DIR``."""
    out = resolve.new_path(args.out)
    data = DataConfig(
        source=args.source,
        text_key=args.text_key,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        val_fraction=args.val_fraction,
        workers=args.workers or 0,
    )
    tokenizer = None if data.tokenizer in KINDS else resolve.resolve_tokenizer(data.tokenizer)
    preparing.prepare(corpora.open_corpus(data.source, data.text_key), data, out, tokenizer)
    print(f"train on it: mlxgpt train --data {out}")
    return 0


def export_command(args: Namespace) -> int:
    """``data export RUN --out FILE.tar``: packs a run's shards, to unpack them into the run on another machine."""
    out, run = resolve.new_path(args.out), Path(args.run)
    if out.suffix != ".tar":
        raise UserError(f"--out {out}: expected a name that ends in .tar")
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run: no recipe.toml in it")
    data = recipes.build(recipes.read_toml(run / "recipe.toml"), str(run / "recipe.toml")).data
    with tempfile.TemporaryDirectory() as temporary:
        _export(run, data, out, Path(temporary))
    print(f"on the other machine, where the run is RUN: tar -xf {out.name} -C RUN && mlxgpt train --resume RUN")
    return 0


def _export(run: Path, data: DataConfig, out: Path, temporary: Path) -> None:
    files, digests = _files_of(run, data, temporary)
    newest = resolve.steps_of(run)
    if newest:
        state = json.loads((resolve.path_of(run, newest[-1]) / checkpoint.STATE).read_text(encoding="utf-8"))
        for name, digest in digests.items():
            if state["data"].get(name) != digest:
                raise UserError(f"{name} of {data.source}: sha256 {digest[:16]}...: not what {run} was trained on")
    _pack(files, out)
    print(f"{out}: {out.stat().st_size:,} bytes, {len(files)} files")


def _files_of(run: Path, data: DataConfig, temporary: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Files to pack, name -> path, and the sha256 of each token file; a tokenizer is saved to ``temporary``."""
    source = Path(data.source) if isinstance(data.source, str) else None
    places = [place for place in (run / "data", source) if place and shards.is_shards(place)]
    if source and not places and is_flat(source):
        _, _, files = shards.open_flat(source, data.val_fraction)
        if data.tokenizer not in KINDS:
            load_tokenizer(data.tokenizer).save(temporary)
        packed = {file.name: file for file in files}
        packed |= {f"tokenizer/{file.relative_to(temporary).as_posix()}": file for file in _files_in(temporary)}
        return packed, {file.name: shards.hash_and_largest(file)[0] for file in files}
    folder = places[0] if places else preparing.cached(data)
    index = shards.read_index(folder)
    shards.verify(folder, index)
    digests = {s["file"]: s["sha256"] for split in index["splits"].values() for s in split["shards"]}
    files = [folder / "index.json", *(folder / name for name in digests), *_files_in(folder / "tokenizer")]
    return {str(file.relative_to(folder)): file for file in files}, digests


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _pack(files: dict[str, Path], out: Path) -> None:
    """Writes a tar of ``files`` under data/, complete or not at all; the same bytes each time."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        with tarfile.open(part, "w") as tar:
            for name, path in files.items():
                entry = tarfile.TarInfo(f"data/{name}")
                entry.size, entry.mode = path.stat().st_size, 0o644
                with open(path, "rb") as file:
                    tar.addfile(entry, file)
        put(part, out)
    finally:
        part.unlink(missing_ok=True)
