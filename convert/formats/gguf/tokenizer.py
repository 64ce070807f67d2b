"""Tokenizer, chat templates and card in GGUF's metadata.

``tokenizer.ggml.*`` is what llama.cpp reads (vocabulary.py). The folder's own files travel beside, as they are:
tokenizer.json under ``tokenizer.huggingface.json``, which the specification has, the others under ``mlxgpt.file.NAME``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.gguf import observed, vocabulary
from convert.formats.gguf.file import Value
from convert.formats.gguf.vocabulary import CONTROL, GGML, UNKNOWN, UNUSED, Vocabulary
from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers import ends as token_ends
from mlxgpt.common.tokenizers.protocol import Tokenizer, is_file_of, read_json

HF_JSON, FILE = "tokenizer.huggingface.json", "mlxgpt.file."
TEMPLATE, TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
# transformers' name of a token -> llama.cpp's key, of which one is spelled so
IDS = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "sep_token": "seperator_token_id",
    "unk_token": "unknown_token_id", "pad_token": "padding_token_id", "mask_token": "mask_token_id",
}  # fmt: skip
# what llama.cpp ends a text at by its name, whatever the keys say
_ENDING = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<eos>",
    "<|eom_id|>", "<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
)  # fmt: skip
_PHI3 = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
_DEFAULT_EOS = {"gpt2": 11, "llama": 2, "t5": 1}  # llama.cpp's, where no key says one


def describe(
    companions: Mapping[str, Path | bytes], n_vocab: int, model: Mapping[str, Any], arch: str
) -> tuple[dict[str, Value], list[str]]:
    """The metadata that says the companions, and what llama.cpp cannot follow.

    Args:
        companions: files of a Hugging Face folder by name.
        n_vocab: rows of the embedding.
        model: config.json.
        arch: llama.cpp's architecture.
    """
    files = {name: one if isinstance(one, bytes) else one.read_bytes() for name, one in companions.items()}
    made: dict[str, Value] = {}
    for name, data in files.items():
        try:
            made[HF_JSON if name == "tokenizer.json" else FILE + name] = Value("str", data.decode("utf-8"))
        except UnicodeDecodeError:
            made[FILE + name] = Value("u8[]", np.frombuffer(data, np.uint8))
    license = re.search(
        r"\A---\n(?:.*\n)*?license: *[\"']?([\w.-]+)", files.get("README.md", b"").decode("utf-8", "replace")
    )
    if license:
        made["general.license"] = Value("str", license[1])
    notes: list[str] = []
    tokenizer = found = None
    try:
        tokenizer = tokenizer_of(files, model)
        found = vocabulary.of(tokenizer, files, n_vocab, arch) if tokenizer else None
        if tokenizer and found:
            observed.observe(found, tokenizer)
    except UserError as error:
        notes.append(f"llama.cpp gets no tokenizer: {error}")
        found = None
    if tokenizer and found:
        made |= found.values() | _ids(tokenizer, found, ends_of(files, model), model)
        notes += found.notes
    else:
        made[GGML + "model"] = Value("str", "none")
    return made | (_templates(tokenizer) if tokenizer else {}), notes


def loadable_name(name: str, values: Mapping[str, Value]) -> str:
    """``name`` as general.name, at which llama.cpp looks: it cannot load a phi-3 without Phi-3's special tokens."""
    tokens = set(values[GGML + "tokens"].value) if GGML + "tokens" in values else set()
    return name if tokens >= _PHI3 else re.sub("(?i)phi-?3", "phi_3", name)


def tokenizer_of(files: Mapping[str, bytes], model: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that a folder of these files has; None for none. ``model``: its config.json.

    Raises:
        UserError: see ``load.from_files``.
    """
    from mlxgpt.common.tokenizers import load  # imports `tokenizers`, which takes longer than a small model's copy

    own = {name: data for name, data in files.items() if is_file_of(name)}
    return load.from_files(own, Path(), dict(model)) if load.has_files(set(own)) else None


def ends_of(files: Mapping[str, bytes], model: Mapping[str, Any]) -> list[int]:
    """What ends a generated text by generation_config.json, else by config.json.

    Raises:
        UserError: it is neither an id nor a list of them.
    """
    said = read_json(dict(files), token_ends.FILE, Path()).get("eos_token_id")
    return token_ends.as_list(model.get("eos_token_id") if said is None else said, Path(token_ends.FILE))


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The token that ends an assistant's turn in the tokenizer's chat template; None where none says one."""
    from mlxgpt.common.sft.template import template_of

    try:
        template = template_of(tokenizer)
        return template.end_id if template else None
    except UserError:
        return None


def modelfile_of(
    companions: Mapping[str, Path | bytes], model: Mapping[str, Any], file: str, context: int
) -> bytes | None:
    """The Modelfile that stands beside ``file``; None where there is no tokenizer. ``context``: tokens at the most."""
    from convert.formats.gguf.modelfile import modelfile

    files = {name: one if isinstance(one, bytes) else one.read_bytes() for name, one in companions.items()}
    try:
        tokenizer = tokenizer_of(files, model)
    except UserError:
        return None
    if tokenizer is None:
        return None
    ends = token_ends.union([tokenizer.eos_id], ends_of(files, model), [turn_end(tokenizer)])
    return modelfile(tokenizer, file, ends, context).encode()


def _ids(tokenizer: Tokenizer, found: Vocabulary, ends: list[int], model: Mapping[str, Any]) -> dict[str, Value]:
    """Special ids, and what is put before and after a text. Adds notes to ``found`` for what llama.cpp cannot do."""
    count, notes = len(found.tokens), found.notes
    ids: dict[str, int] = {}
    for name, key in IDS.items():
        token = tokenizer.named.get(name)
        i = tokenizer.id_of(token) if token is not None else model.get(f"{name}_id")
        i = i[0] if isinstance(i, list) and i else i
        if type(i) is int and 0 <= i < count:
            ids[key] = i
    if found.model != "gpt2" and UNKNOWN in found.types:
        ids["unknown_token_id"] = found.types.index(UNKNOWN)
    before, after = list(tokenizer.before), list(tokenizer.after)
    if len(before) == 1:
        ids["bos_token_id"] = before[0]
    if len(after) == 1:
        ids["eos_token_id"] = after[0]
    for what, around in (("before", before), ("after", after)):
        if len(around) > 1:
            shown = " ".join(found.tokens[i] for i in around)
            notes.append(f"llama.cpp can put one token {what} a text, this tokenizer puts {shown}: it gets none there")
    if "eos_token_id" not in ids and tokenizer.eos_id is not None and tokenizer.eos_id < count:
        ids["eos_token_id"] = tokenizer.eos_id
    if "eos_token_id" not in ids:
        ids["eos_token_id"] = ends[0] if ends else _no_end(found)
    eos = ids["eos_token_id"]
    turn = turn_end(tokenizer)
    rest = [i for i in token_ends.union(ends, [turn]) if i != eos and 0 <= i < count]
    if turn is not None:
        ids["eot_token_id"] = turn
    elif rest:
        ids["eot_token_id"] = next((i for i in rest if found.tokens[i] in _ENDING[:6]), rest[0])
    rest = [i for i in rest if i != ids.get("eot_token_id")]
    if rest:
        ids["eom_token_id"] = next((i for i in rest if found.tokens[i] == "<|eom_id|>"), rest[0])
    lost = [found.tokens[i] for i in rest if i != ids["eom_token_id"] and found.tokens[i] not in _ENDING]
    if lost:
        notes.append(f"llama.cpp has no key for so many ends: it goes on after {', '.join(lost)}")
    made = {GGML + key: Value("u32", i) for key, i in ids.items()}
    made[GGML + "add_bos_token"] = Value("bool", len(before) == 1)
    made[GGML + "add_eos_token"] = Value("bool", len(after) == 1)
    return made


def _no_end(found: Vocabulary) -> int:
    """An id to call the end of text where the tokenizer has none, since llama.cpp takes one of its own then."""
    unused = next((i for i, kind in enumerate(found.types) if kind == UNUSED), None)
    if unused is not None:
        return unused
    i = next((i for i, kind in enumerate(found.types) if kind == CONTROL), _DEFAULT_EOS[found.model])
    i = min(i, len(found.tokens) - 1)
    found.notes.append(f"this tokenizer has no end of text: llama.cpp ends at {found.tokens[i]!r}, as it must have one")
    return i


def _templates(tokenizer: Tokenizer) -> dict[str, Value]:
    """Chat templates as transformers resolves them, the default one apart."""
    try:
        found = tokenizer.templates
    except UserError:
        return {}
    made: dict[str, Value] = {}
    for name, source in found.items():
        made[TEMPLATE if name == "default" else f"{TEMPLATE}.{re.sub(r'[^A-Za-z0-9]', '_', name)}"] = Value(
            "str", source
        )
    others = [key.removeprefix(TEMPLATE + ".") for key in made if key != TEMPLATE]
    return made | ({TEMPLATES: Value("str[]", others)} if others else {})
