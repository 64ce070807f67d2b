"""What the files of a tokenizer folder say about its tokenizer, as transformers' AutoTokenizer (5.23) reads them.

The files are read once, into a ``Specification``; ``pipelines.py`` makes a tokenizer of it. Where two files disagree,
transformers' choice is taken and a note says so.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.folder.classes import class_of
from mlxgpt.common.tokenizers.protocol import TEMPLATES, read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Token = str | tokenizers.AddedToken
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class Specification:
    """A tokenizer's class and what it is given.

    ``settings`` are tokenizer_config.json's with the other files' merged in; tokens in them are str or AddedToken.
    """

    class_name: str
    settings: dict[str, Any]
    added: dict[int, tokenizers.AddedToken]  # by the id that a file gives it
    saved_class: str | None = None  # what tokenizer_config.json must name so that a copy elsewhere is read the same
    flags: dict[str, Any] = field(
        default_factory=dict
    )  # add_bos_token and add_eos_token that a tokenizer.json overrules
    notes: list[str] = field(default_factory=list)


def read(
    files: dict[str, bytes], where: Path, model: dict[str, Any] | None = None, content: dict[str, Any] | None = None
) -> Specification:
    """The specification of a folder's files, name -> bytes.

    ``model`` is its config.json, where it has one; ``content`` its tokenizer.json.

    Raises:
        UserError: a damaged file, or one that asks for what is not known here.
    """
    settings = read_json(files, "tokenizer_config.json", where)
    text = files.get("tokenizer.json", b"")
    name = class_of(settings, model or {}, b'"ByteLevel"' in text, where)
    alone = class_of(settings, {}, b'"ByteLevel"' in text, where) if model else name
    kind = f"config.json's model_type {(model or {}).get('model_type')!r}"
    theirs, name = name, alone if made_here(settings) else name
    made = Specification(name, settings, {}, None if alone == name else name)
    if theirs != name:
        made.notes.append(
            f"{kind}: transformers reads this tokenizer, trained here, as {theirs}, which may give other ids"
        )
    elif alone != name and settings.get("tokenizer_class"):
        made.notes.append(
            f"{kind}: read as {name}, whatever tokenizer_config.json says ({settings['tokenizer_class']})"
        )
    _refuse_versions(settings, where)
    if "tokenizer.json" in files:
        for flag in ("add_bos_token", "add_eos_token"):
            if flag in settings:
                made.flags[flag] = settings.pop(flag)
    for key in ("tokenizer_class", "init_inputs", "chat_template"):
        settings.pop(key, None)
    _check_extra(settings, where / "tokenizer_config.json")
    _merge_extra(settings)
    if "added_tokens_decoder" in settings:
        made.added = _listed(settings.pop("added_tokens_decoder"), where / "tokenizer_config.json")
        _note_ignored_map(made, read_json(files, "special_tokens_map.json", where))
    else:
        _merge_older_files(made, files, where, (content or {}).get("added_tokens"))
    made.settings = settings = {key: _token(value) for key, value in settings.items()}
    by_text = {token.content: token for token in made.added.values()}
    for key in NAMES:
        value = settings.get(key)
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            settings[key] = value = _added(value | {"special": True}, where / "tokenizer_config.json")
        if value is not None and not isinstance(value, Token):
            del settings[key]
            made.notes.append(f"tokenizer_config.json: {key} is a {type(value).__name__}, not a token: left out")
        elif value is not None:
            settings[key] = by_text.get(str(getattr(value, "content", value)), value)
    return made


def made_here(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer_config.json is that of a tokenizer trained here: its ids are those of the training."""
    says = {name: settings.get(name) for name in (*_MADE[0], "add_prefix_space", "legacy", "add_bos_token")}
    return any(all(says[name] == value for name, value in made.items()) for made in _MADE)


_MADE = [
    {"clean_up_tokenization_spaces": False, "tokenizer_class": name, "bos_token": bos, "unk_token": unknown} | more
    for name, bos, unknown, more in (
        ("PreTrainedTokenizerFast", "<|endoftext|>", "<|endoftext|>", {"add_prefix_space": False}),
        ("PreTrainedTokenizerFast", "<s>", "<unk>", {}),
        ("LlamaTokenizer", "<s>", "<unk>", {"add_prefix_space": False, "legacy": False, "add_bos_token": False}),
    )
]


def _refuse_versions(settings: dict[str, Any], where: Path) -> None:
    versions = settings.get("fast_tokenizer_files")
    if isinstance(versions, list) and [name for name in versions if name != "tokenizer.json"]:
        raise UserError(
            f"{where / 'tokenizer_config.json'}: fast_tokenizer_files: a file for each version of transformers: "
            "expected tokenizer.json alone"
        )


def _check_extra(settings: dict[str, Any], where: Path) -> None:
    """Refuses special tokens that are no list of tokens, nor a dict of them."""
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        value = settings.get(key)
        tokens = value.values() if isinstance(value, dict) else value or []
        listed = isinstance(value, list | dict | None) and not (isinstance(value, list) and key.startswith("model_"))
        if not listed or not all(isinstance(_text(token), str) for token in tokens):
            raise UserError(f"{where}: {key}: expected a list of tokens, found {str(value)[:60]}")


def _merge_extra(settings: dict[str, Any]) -> None:
    """additional_special_tokens under its new name; tokens with names of their own in one dict."""
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    own = {
        key: settings.pop(key)
        for key in list(settings)
        if key not in NAMES and key.endswith("_token") and isinstance(settings[key], str)
    }
    if isinstance(settings.get("extra_special_tokens"), dict):
        own |= settings.pop("extra_special_tokens")
    if own:
        settings["model_specific_special_tokens"] = own


def _listed(value: Any, where: Path) -> dict[int, tokenizers.AddedToken]:
    """The tokens of added_tokens_decoder."""
    if not isinstance(value, dict) or not all(key.isdecimal() and key.isascii() for key in value):
        raise UserError(f"{where}: added_tokens_decoder: expected tokens with their content by id")
    return {int(key): _added(token, where) for key, token in value.items()}


def _added(value: Any, where: Path) -> tokenizers.AddedToken:
    """An AddedToken of a file.

    Raises:
        UserError: no content, or a flag that is not true or false.
    """
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{where}: added_tokens_decoder: expected tokens with their content by id")
    flags = {name: value[name] for name in _FLAGS if value.get(name) is not None}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise UserError(f"{where}: token {value['content']!r}: {name} = {flag!r}: expected true or false")
    return tokenizers.AddedToken(value["content"], **flags)


def _merge_older_files(made: Specification, files: dict[str, bytes], where: Path, listed: Any) -> None:
    """special_tokens_map.json over the settings, added_tokens.json, and the added tokens of tokenizer.json."""
    settings = made.settings
    named = read_json(files, "special_tokens_map.json", where)
    _check_extra(named, where / "special_tokens_map.json")
    for key, value in named.items():
        before = settings.get(key)
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = _in_map(value, key, where)
        elif isinstance(value, list) and key == "extra_special_tokens":
            value = [*(before or []), *(v for v in (_in_map(v, key, where) for v in value) if v not in (before or []))]
        if key in NAMES and key in settings and _text(before) != _text(value):
            taken, left = _text(value), _text(before)
            made.notes.append(
                f"{key}: special_tokens_map.json's {taken!r} is taken, not tokenizer_config.json's {left!r}"
            )
        settings[key] = value
    if isinstance(settings.get("extra_special_tokens"), dict):
        own = settings.setdefault("model_specific_special_tokens", {})
        own.update(settings.pop("extra_special_tokens"))
    roles = (*map(settings.get, NAMES), *(settings.get("extra_special_tokens") or []))
    special = {_text(token) for token in roles if not isinstance(token, dict)}  # of others transformers does not know
    for token, number in read_json(files, "added_tokens.json", where).items():
        if type(number) is not int:
            raise UserError(f"{where / 'added_tokens.json'}: {token!r}: {number!r}: expected ids by token")
        flags = {"normalized": token not in special, "special": token in special}
        made.added[number] = tokenizers.AddedToken(token, **flags)
    for token in listed if isinstance(listed, list) else []:
        if isinstance(token, dict) and type(token.get("id")) is int:
            made.added[token["id"]] = _added(token, where / "tokenizer.json")


def _in_map(value: Any, key: str, where: Path) -> Any:
    """A token of special_tokens_map.json, special whatever it says."""
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("content"), str):
        raise UserError(f"{where / 'special_tokens_map.json'}: {key}: expected a token with its content")
    return _added(value | {"special": True}, where / "special_tokens_map.json")


def _note_ignored_map(made: Specification, named: dict[str, Any]) -> None:
    for key, value in named.items():
        ours = made.settings.get(key)
        if key in NAMES and _text(value) != _text(ours):
            taken, left = _text(ours), _text(value)
            made.notes.append(
                f"{key}: tokenizer_config.json's {taken!r} is taken, not special_tokens_map.json's {left!r}"
            )


def _text(value: Any) -> str | None:
    """The text of a token however a file writes it; None for what is none."""
    if isinstance(value, tokenizers.AddedToken):
        return value.content
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _token(value: Any) -> Any:
    """``value`` with every {"__type": "AddedToken"} in it made one."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken" and isinstance(value.get("content"), str):
        flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
        return tokenizers.AddedToken(value["content"], **flags)
    if isinstance(value, list):
        return [_token(one) for one in value]
    return {key: _token(one) for key, one in value.items()} if isinstance(value, dict) else value


def chat_templates(files: dict[str, bytes], where: Path) -> dict[str, str]:
    """Chat templates by name: the folder's .jinja files, else tokenizer_config.json's; {} for none.

    Raises:
        UserError: chat_template is neither text nor a list of named texts.
    """
    found = read_json(files, "tokenizer_config.json", where).get("chat_template")
    apart = _jinja_files(files)
    if apart:
        found = {name: _decoded(source, where / f"{name}.jinja") for name, source in sorted(apart.items())}
    if isinstance(found, list) and all(isinstance(item, dict) and {"name", "template"} <= set(item) for item in found):
        found = {item["name"]: item["template"] for item in found}
    sources = {"default": found} if isinstance(found, str) and found else found or {}
    if not isinstance(sources, dict) or not all(isinstance(source, str) for source in sources.values()):
        raise UserError(f"tokenizer_config.json: chat_template is a {type(found).__name__}: expected text")
    return sources


def template_notes(files: dict[str, bytes], where: Path) -> list[str]:
    """What ``chat_templates`` does not take."""
    inside, apart = read_json(files, "tokenizer_config.json", where).get("chat_template"), _jinja_files(files)
    default = apart.get("default", b"").decode(errors="replace").replace("\r\n", "\n")
    if apart and inside and inside != default:
        return [f"chat template: {', '.join(sorted(apart))} of .jinja files, not tokenizer_config.json's"]
    if not apart and not inside and "chat_template.json" in files:
        return ["chat_template.json is read by processors only: copy its text to chat_template.jinja to use it"]
    return []


def _jinja_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """Templates in files of their own, by name."""
    apart = {"default": files["chat_template.jinja"]} if "chat_template.jinja" in files else {}
    return apart | {name[len(TEMPLATES) : -len(".jinja")]: files[name] for name in files if name.startswith(TEMPLATES)}


def _decoded(source: bytes, where: Path) -> str:
    try:
        return source.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
