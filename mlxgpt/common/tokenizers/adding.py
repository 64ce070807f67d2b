"""A tokenizer with more special tokens, in files that transformers reads with the same ids."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.hf import JsonTokenizer
from mlxgpt.common.tokenizers.load import from_files
from mlxgpt.common.tokenizers.protocol import Tokenizer, read_json

# tokenizer_config.json says what these say, once tokens are added
_STALE = ("special_tokens_map.json", "added_tokens.json")


def with_tokens(tokenizer: Tokenizer, tokens: Sequence[str], settings: dict[str, Any]) -> Tokenizer:
    """``tokenizer`` with special tokens, which get new ids if they are missing, and with ``settings``.

    They go into its tokenizer.json; where it has none, into added_tokens_decoder of its tokenizer_config.json.

    Raises:
        UserError: a tokenizer.model of no class, which takes no more tokens.
    """
    config = read_json(tokenizer.files, "tokenizer_config.json", Path(".")) | tokenizer.named | settings
    stale = (*_STALE, *(name for name in tokenizer.files if name.endswith(".jinja") and "chat_template" in settings))
    files = {name: data for name, data in tokenizer.files.items() if name not in stale}
    there = tokenizer.backend.get_added_tokens_decoder() if isinstance(tokenizer, JsonTokenizer) else {}
    new = [tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens]
    listed = "added_tokens_decoder" in config
    if "tokenizer.json" in files:
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for _, token in sorted(there.items(), key=_by_id) if token.content not in known])
        backend.add_special_tokens(new)
        files["tokenizer.json"] = backend.to_str(pretty=True).encode()
    elif isinstance(tokenizer, JsonTokenizer):
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        backend.add_special_tokens(new)
        listed = True
    else:
        raise UserError(
            f"{', '.join(tokens)}: more tokens than a tokenizer.model that no class of transformers reads can take: "
            "expected a tokenizer.json (transformers' AutoTokenizer ... save_pretrained writes one), or a tokenizer "
            "with a chat template"
        )
    if listed:
        added = sorted(backend.get_added_tokens_decoder().items(), key=_by_id)
        config["added_tokens_decoder"] = {str(i): token.__getstate__() for i, token in added}
    files["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
    return from_files(files, Path("."))


def _by_id(item: tuple[int, tokenizers.AddedToken]) -> int:
    return item[0]
