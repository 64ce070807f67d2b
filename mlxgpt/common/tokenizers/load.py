"""Text <-> token ids behind one small protocol, and the folders in which tokenizers are kept.

A tokenizer folder is what transformers' AutoTokenizer reads: loaded there it gives the ids that it gives here. As
there, the text of a special token such as <|endoftext|> encodes to that token, and nothing is added to a text.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.ends import generation_ends, union
from mlxgpt.common.tokenizers.protocol import FILES, NAMES, Tokenizer, read_files, read_json

_PAIRS = {
    "vocab.json": "merges.txt",
    "encoder.json": "vocab.bpe",
    "merges.txt": "vocab.json",
    "vocab.bpe": "encoder.json",
}
KINDS = ("char", "bpe", "sp-bpe", "sp-unigram")


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds the files of a tokenizer."""
    return has_files({name for name in FILES if (Path(folder) / name).is_file()})


def has_files(names: Collection[str]) -> bool:
    """Whether files of these names make a tokenizer."""
    alone = "tokenizer.json" in names or "tokenizer.model" in names
    pairs = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    return alone or any(first in names and second in names for first, second in pairs)


def load_tokenizer(path: Path | str, rows: int | None = None) -> Tokenizer:
    """The tokenizer in a folder, or one file of it: tokenizer.json, a .model, or one of GPT-2's two files.

    Also what home-made projects have: a table of tokens, ranks, or a name such as ``bytes`` (``foreign.files``), for a
    model whose vocabulary has ``rows``.

    Raises:
        UserError: nothing there, a damaged file, or a kind that cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        _refuse_unread(path)
        folder, files = path, read_files(path)
    elif path.is_file():
        foreign = _foreign(path, rows)
        if foreign is not None:
            return foreign
        folder, files = path.parent, _files_beside(path)
    else:
        return _named(path)
    if set(files) == {"tokenizer.model"} and path.is_file():
        from mlxgpt.common.tokenizers.sentencepiece import lone_model

        return lone_model(files["tokenizer.model"], path)
    made = from_files(files, folder, _model(folder))
    if path.is_dir():
        made.ends = frozenset(generation_ends(path)) - {made.eos_id}
    return made


def _foreign(path: Path, rows: int | None) -> Tokenizer | None:
    """The tokenizer of a file that is no file of Hugging Face's, nor GPT-2's; None for one that is."""
    pair = _PAIRS.get(path.name)
    if pair and (path.parent / pair).is_file():
        return None
    from mlxgpt.common.tokenizers.foreign import files

    return files.read(path, rows)


def _named(path: Path) -> Tokenizer:
    """The tokenizer that has a name and no file.

    Raises:
        UserError: there is none.
    """
    if str(path) not in NAMES:
        names = ", ".join((*KINDS, *NAMES))
        raise UserError(f"{path}: no such tokenizer file or folder (or one of: {names})")
    from mlxgpt.common.tokenizers.foreign import files

    return files.by_name(str(path))


def _refuse_unread(folder: Path) -> None:
    """Refuses a folder without a tokenizer that is read here."""
    other = next((name for name in ("tekken.json", "tiktoken.model") if (folder / name).is_file()), None)
    if other and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: {other}, which is not read: expected a tokenizer.json (transformers' AutoTokenizer ... "
            "save_pretrained writes one)"
        )
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: no tokenizer here: expected tokenizer.json, tokenizer.model or vocab.json with merges.txt"
        )


def load_last(folders: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer of the last of these folders that has one; None where none has.

    Its ``ends`` are those of all folders, of a base and its adapters: what ended a text before still does.
    """
    found = [folder for folder in folders if has_tokenizer(folder)]
    if not found:
        return None
    made = load_tokenizer(found[-1])
    # a folder that names no end has its tokenizer's
    silent = [load_tokenizer(folder).eos_id for folder in found[:-1] if not generation_ends(folder)]
    ends = union(silent, *(generation_ends(folder) for folder in folders))
    made.ends = frozenset(end for end in ends if end != made.eos_id)
    return made


def _model(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder; {} where there is none."""
    path = folder / "config.json"
    return read_json({path.name: path.read_bytes()}, path.name, folder) if path.is_file() else {}


def from_files(files: dict[str, bytes], folder: Path, model: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer that files make, name -> bytes.

    ``folder`` is where they lie, for messages; ``model`` its config.json, whose model_type has a say.
    """
    if "tokenizer.json" in files:
        from mlxgpt.common.tokenizers.char import CharTokenizer, characters_of

        characters = characters_of(files, folder)
        if characters is not None:
            return CharTokenizer(characters, files)
        from mlxgpt.common.tokenizers.hf import JsonTokenizer

        return JsonTokenizer(files, folder, model)
    if "tokenizer.model" in files:
        from mlxgpt.common.tokenizers.sentencepiece import from_model

        return from_model(files, folder, model)
    from mlxgpt.common.tokenizers.hf import from_gpt2_files

    return from_gpt2_files(files, folder, model)


def other_class(tokenizer: Tokenizer, model_type: str) -> str | None:
    """The class of transformers that would give other ids than ``tokenizer`` in a folder of that model type, or None.

    Most types leave the class to the tokenizer's files; qwen2 and phi3 do not.
    """
    from mlxgpt.common.tokenizers.fast_bpe import PROBE
    from mlxgpt.common.tokenizers.folder.classes import PLAIN, class_of
    from mlxgpt.common.tokenizers.folder.specification import made_here

    here, model = Path("."), {"model_type": model_type}
    settings = read_json(tokenizer.files, "tokenizer_config.json", here)
    over_bytes = b'"ByteLevel"' in tokenizer.files.get("tokenizer.json", b"")
    found = class_of(settings, model, over_bytes, here)
    if not tokenizer.files or found == class_of(settings, {}, over_bytes, here):
        return None
    if made_here(settings):
        return found if found != PLAIN else None
    again = from_files(tokenizer.files, here, model)
    pairs = zip(again.encode_batch(PROBE), tokenizer.encode_batch(PROBE), strict=True)
    return None if all(one.tolist() == other.tolist() for one, other in pairs) else found


def _files_beside(path: Path) -> dict[str, bytes]:
    """The file under its standard name, with the settings that lie beside it."""
    siblings = read_files(path.parent)
    settings = {
        name: siblings[name] for name in ("tokenizer_config.json", "special_tokens_map.json") if name in siblings
    }
    if path.name in _PAIRS:
        other = _PAIRS[path.name]
        if other not in siblings:
            raise UserError(f"{path}: expected {other} beside it")
        return settings | {path.name: siblings[path.name], other: siblings[other]}
    if path.suffix == ".json":
        return settings | {"tokenizer.json": path.read_bytes()}
    if path.suffix == ".model":
        return settings | {"tokenizer.model": path.read_bytes()}
    raise UserError(f"{path}: not a tokenizer file: expected tokenizer.json, a .model, vocab.json or vocab.bpe")


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer learned from ``texts``, which are read once and as a stream; char ignores ``vocab_size``.

    The vocabulary may come out smaller than asked for where the texts are short: see ``n_vocab``.

    Raises:
        UserError: an unknown kind, no text, or a vocabulary too small for the kind.
    """
    if kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r}: expected one of {', '.join(KINDS)}")
    texts = _not_empty(texts)
    if kind == "char":
        from mlxgpt.common.tokenizers.char import train_characters

        return train_characters(texts)
    if kind == "bpe":
        from mlxgpt.common.tokenizers.hf import train_byte_bpe

        return train_byte_bpe(texts, vocab_size)
    from mlxgpt.common.tokenizers.sentencepiece import train_sentencepiece

    return train_sentencepiece(kind, texts, vocab_size)


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    found = False
    for text in texts:
        if text:
            found = True
            yield text
    if not found:
        raise UserError("no text to train a tokenizer on")
