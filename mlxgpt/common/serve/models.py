"""The models of a server: the base and its adapters, under names, with the base's weights in memory once."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.serve.work import Served
from mlxgpt.common.sft.template import Template, template_of
from mlxgpt.common.tokenizers import ends as text_ends
from mlxgpt.common.tokenizers.protocol import Tokenizer

SAMPLE = 2**20  # bytes of a file's beginning and end that its digest reads


@dataclass(frozen=True)
class Options:
    """What is served, as the command line says it."""

    model: str
    name: str = ""  # of the model; default: its folder's last name, or the hub's id
    adapters: Sequence[str] = ()  # NAME=DIR
    device: str = "auto"
    force: bool = False
    template: str = ""  # a file with a chat template for all
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop_tokens: Sequence[str] = ()


def names_of(options: Options) -> list[tuple[str, list[Path]]]:
    """The names that requests may give, what requests get by default first, and the adapter of each, if any.

    A model that is an adapter, or a run that trained one, is served with it; its base is there under its own name.

    Raises:
        UserError: no such model or adapter, or a name that is taken or none.
    """
    base, own = base_and_adapters.find_base(options.model)
    found = [(options.name or _called(options.model), [path for path, _ in own])]
    if own:
        found.append((base.name, []))
    for item in options.adapters:
        name, equals, folder = item.partition("=")
        if not equals or not folder:
            raise UserError(f"--adapter {item}: expected NAME=DIR, such as {_called(item)}={item}")
        _, path = base_and_adapters.find_base(base, folder)
        found.append((name, [each for each, _ in path]))
    for number, (name, _) in enumerate(found):
        if not name.strip() or name != name.strip() or not name.isprintable() or len(name) > 200:
            raise UserError(f"model name {name!r}: expected 1 to 200 printable characters, no space around them")
        if name in [other for other, _ in found[:number]]:
            raise UserError(f"model name {name}: given twice; --name and --adapter NAME=DIR give others")
    return found


def _called(model: str) -> str:
    """What a model is called by default."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def load_all(backend: Backend, options: Options) -> list[Served]:
    """Loads everything, in the order of ``names_of``; in the thread that will run the models.

    Raises:
        UserError: a model is damaged, a classifier, or its chat template not one.
    """
    base, _ = base_and_adapters.find_base(options.model)
    listed = names_of(options)
    load = backend.load.load
    model, tokenizer = load(base, device=options.device, force=options.force)
    base_and_adapters.expect_task(model.config, str(base))
    backend.generate.prepare(model)  # before the others take its weights
    made = []
    for name, adapters in listed:
        ours, reads = model, tokenizer
        if adapters:
            given = [(path, 1.0) for path in adapters]
            ours, reads = load(base, given, options.device, force=options.force, beside=model)
            base_and_adapters.expect_task(ours.config, name)
        made.append(_served(name, ours, reads, base, adapters, options))
    if options.template_kwargs and not any(each.template for each in made):
        raise UserError("--template-kwargs: is for a chat template, and none of the models has one")
    return made


def _served(
    name: str, model: Any, tokenizer: Tokenizer | None, base: Path, adapters: Sequence[Path], options: Options
) -> Served:
    """A model that is loaded, with everything around it."""
    template = _template(name, tokenizer, options)
    ends = {tokenizer.eos_id, *tokenizer.ends} if tokenizer else set(text_ends.generation_ends(base))
    if template:
        with contextlib.suppress(UserError):  # a template may end an answer with plain text
            ends.add(template.end_id)
    if tokenizer:
        ends |= set(text_ends.named(options.stop_tokens, tokenizer, "--stop-token"))
    elif word := next((word for word in options.stop_tokens if not word.isdecimal()), None):
        raise UserError(f"--stop-token {word!r}: text needs a tokenizer, and {name} has none; expected an id")
    else:
        ends |= set(map(int, options.stop_tokens))
    size = model.config.vocab_size
    return Served(
        name,
        model,
        tokenizer,
        template,
        frozenset(end for end in ends if end is not None),
        min(tokenizer.n_vocab, size) if tokenizer else size,
        _digest([base, *adapters], template),
    )


def _template(name: str, tokenizer: Tokenizer | None, options: Options) -> Template | None:
    """The chat template of a file, else the tokenizer's own."""
    if tokenizer is None:
        return None
    if not options.template:
        return template_of(tokenizer, f"{name}: chat template", kwargs=options.template_kwargs)
    try:
        text = Path(options.template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {options.template}: {getattr(error, 'strerror', None) or error}") from None
    kwargs = options.template_kwargs
    return Template({"default": text}, tokenizer, tokenizer.named, options.template, kwargs=kwargs)


def _digest(folders: Sequence[Path], template: Template | None) -> str:
    """sha256 over the files' names, sizes and a MiB of each end, and over the template.

    Whole files take a second a GB, which nobody waits for before the first answer.
    """
    digest = hashlib.sha256()
    for folder in folders:
        files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE))
                file.seek(max(SAMPLE, size - SAMPLE))
                digest.update(file.read(SAMPLE))
    for key, source in sorted(template.sources.items()) if template else ():
        digest.update(f"{key}\n{source}\n".encode())
    return digest.hexdigest()


def cache_bytes(served: Sequence[Served], rows: int) -> int:
    """Bytes of keys and values of so many rows whose context is full, in float32, of the largest model."""
    configs = [each.model.config for each in served]
    return max(8 * c.n_layer * c.n_kv_head * c.head_dim * c.block_size * rows for c in configs)
