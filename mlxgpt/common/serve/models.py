"""The models of a server: the base and its adapters, under names, with the base's weights in memory once."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxgpt.common.backend import Backend
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, base_and_adapters, model_folder
from mlxgpt.common.inference import kv_cache
from mlxgpt.common.model import params
from mlxgpt.common.serve.work import Served
from mlxgpt.common.sft.template import Template, template_of
from mlxgpt.common.tokenizers import ends as text_ends
from mlxgpt.common.tokenizers.protocol import Tokenizer

Adapters = Sequence[tuple[Path, float]]
"""Folders, with the weights that their updates are added with."""
SAMPLE = 4096  # bytes of a tensor that a digest reads


@dataclass(frozen=True)
class Options:
    """What is served, as the command line says it."""

    model: str
    name: str = ""  # of the model; default: its folder's last name, or the hub's id
    adapters: Sequence[str] = ()  # NAME=DIR, NAME=DIR:WEIGHT, NAME=DIR:WEIGHT+DIR:WEIGHT
    device: str = "auto"
    force: bool = False
    template: str = ""  # a file with a chat template for all
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop_tokens: Sequence[str] = ()
    kv_bits: int = 0  # of the cache; 0: not quantized


def check(options: Options) -> list[tuple[str, Adapters]]:
    """What can be known before anything is loaded: names that requests may give, and the adapters of each.

    The first is what requests get by default. A model that is an adapter, or a run that trained one, is served with
    it, and its base beside it under its own name.

    Raises:
        UserError: no such model or adapter, a name that is taken or none, a classifier, no such template, a cache of
            bits that the model cannot have.
    """
    base, own = base_and_adapters.find_base(options.model)
    config = model_folder.read_config(base)
    base_and_adapters.expect_task(config, str(base))
    kv_cache.group_size(config.head_dim, options.kv_bits)
    _template_text(options.template)
    found: list[tuple[str, Adapters]] = [(options.name or _called(options.model), own)]
    if own:
        found.append((_called(base), []))
    for item in options.adapters:
        name, equals, folder = item.partition("=")
        if not equals or not folder:
            raise UserError(f"--adapter {item}: expected NAME=DIR, such as {_called(item)}={item}")
        parts = [folder] if Path(folder).expanduser().exists() else folder.split("+")
        found.append((name, base_and_adapters.find_base(base, base_and_adapters.parse_adapters(parts))[1]))
    for number, (name, _) in enumerate(found):
        if not name.strip() or name != name.strip() or not name.isprintable() or len(name) > 200:
            raise UserError(f"model name {name!r}: expected 1 to 200 printable characters, no space around them")
        if name in [other for other, _ in found[:number]]:
            raise UserError(f"model name {name}: given twice; --name and --adapter NAME=DIR give others")
    return found


def _called(model: str | Path) -> str:
    """What a model is called by default: a run's name, the hub's id, else the folder's name."""
    path = Path(model).expanduser()
    if not path.exists():
        return str(model)
    path = path.resolve()
    if path.parent.name == "checkpoints":
        return path.parent.parent.name
    if path.parent.name == "snapshots":  # of huggingface_hub's cache
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def load_all(backend: Backend, options: Options) -> list[Served]:
    """Loads everything, in the order of ``check``; in the thread that will run the models.

    Raises:
        UserError: a model is damaged, a classifier, or its chat template not one.
    """
    base, _ = base_and_adapters.find_base(options.model)
    listed = check(options)
    load, prepare = backend.load.load, backend.generate.prepare
    plain = load(base, device=options.device, force=options.force)
    loaded = []
    for name, adapters in listed:
        ours = plain
        if adapters:
            ours = load(base, adapters, options.device, force=options.force, beside=plain[0])
            base_and_adapters.expect_task(ours[0].config, name)
        loaded.append(ours)
    others = [model for model, _ in loaded if model is not plain[0]]
    prepare(plain[0], *others)
    for model in others:
        prepare(model)  # what is its own
    made = [
        _served(name, model, tokenizer, base, adapters, options)
        for (name, adapters), (model, tokenizer) in zip(listed, loaded, strict=True)
    ]
    if options.template_kwargs and not any(each.template for each in made):
        raise UserError("--template-kwargs: is for a chat template, and none of the models has one")
    plain_name = next(name for name, adapters in listed if not adapters)
    made = [
        dataclasses.replace(each, parent=plain_name if adapters else None)
        for each, (_, adapters) in zip(made, listed, strict=True)
    ]
    return _with_stops(made, options.stop_tokens)


def _served(
    name: str, model: Any, tokenizer: Tokenizer | None, base: Path, adapters: Adapters, options: Options
) -> Served:
    """A model that is loaded, with everything around it."""
    template = _template(name, tokenizer, options)
    ends = {tokenizer.eos_id, *tokenizer.ends} if tokenizer else set(text_ends.generation_ends(base))
    if template:
        with contextlib.suppress(UserError):  # a template may end an answer with plain text
            ends.add(template.end_id)
    size = model.config.vocab_size
    return Served(
        name,
        model,
        tokenizer,
        template,
        frozenset(end for end in ends if end is not None),
        min(tokenizer.n_vocab, size) if tokenizer else size,
        _digest(base, adapters, template),
    )


def _with_stops(served: Sequence[Served], tokens: Sequence[str]) -> list[Served]:
    """The models with the tokens of --stop-token that each has.

    Raises:
        UserError: a token that none of them has.
    """
    refused: dict[str, UserError] = {}
    ends = [set(each.ends) for each in served]
    for token in tokens:
        found = False
        for each, theirs in zip(served, ends, strict=True):
            try:
                theirs |= set(_stops(each, token))
                found = True
            except UserError as error:
                refused.setdefault(token, error)
        if not found:
            raise refused[token]
    return [dataclasses.replace(each, ends=frozenset(theirs)) for each, theirs in zip(served, ends, strict=True)]


def _stops(served: Served, token: str) -> list[int]:
    if served.tokenizer:
        return text_ends.named([token], served.tokenizer, "--stop-token")
    if not token.isdecimal():
        raise UserError(f"--stop-token {token!r}: text needs a tokenizer, and {served.name} has none; expected an id")
    if int(token) >= served.n_vocab:
        raise UserError(f"--stop-token {token}: expected an id below {served.n_vocab}, the size of {served.name}")
    return [int(token)]


def _template(name: str, tokenizer: Tokenizer | None, options: Options) -> Template | None:
    """The chat template of a file, else the tokenizer's own."""
    if tokenizer is None:
        return None
    kwargs = options.template_kwargs
    if not options.template:
        return template_of(tokenizer, f"{name}: chat template", kwargs=kwargs)
    text = _template_text(options.template)
    return Template({"default": text}, tokenizer, tokenizer.named, options.template, kwargs=kwargs)


def _template_text(name: str) -> str:
    """The text of --template.

    Raises:
        UserError: it cannot be read.
    """
    if not name:
        return ""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {name}: {getattr(error, 'strerror', None) or error}") from None


def _digest(base: Path, adapters: Adapters, template: Template | None) -> str:
    """sha256 of what each of the base's tensors begins with, of the adapters' files, and of the template.

    All bytes of a base would take about a second a GB, before the first answer.
    """
    digest = hashlib.sha256(adapter_folder.base_sha256(base, SAMPLE).encode())
    for folder, weight in adapters:
        digest.update(f"{weight}\n".encode())
        for path in sorted(path for path in folder.glob("adapter*") if path.is_file()):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    for key, source in sorted(template.sources.items()) if template else ():
        digest.update(f"{key}\n{source}\n".encode())
    return digest.hexdigest()


def cache_bytes(served: Sequence[Served], rows: int, kv_bits: int) -> int:
    """Bytes of keys and values of so many rows whose context is full, float32 or in bits, of the largest model."""
    return max(kv_cache.size(each.model.config, rows, each.context, 4, kv_bits) for each in served)


def weight_bytes(options: Options) -> int:
    """Bytes of the model's weights in float32, before anything is loaded."""
    base, _ = base_and_adapters.find_base(options.model)
    return 4 * params.count(model_folder.read_config(base))
