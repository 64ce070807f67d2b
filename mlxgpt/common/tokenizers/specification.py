"""What the files of a tokenizer folder say about its tokenizer, as transformers' AutoTokenizer reads them."""

from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.tokenizers.protocol import read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def named_tokens(files: dict[str, bytes], where: Path) -> dict[str, str]:
    """bos_token and the like, from the folder's settings."""
    made = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(files, file, where)
        for name in NAMES:
            value = settings.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                made[name] = value
    return made


def chat_templates(files: dict[str, bytes], where: Path) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja, else tokenizer_config.json's; {} where there is none.

    Raises:
        UserError: chat_template is neither text nor a list of named texts.
    """
    found = read_json(files, "tokenizer_config.json", where).get("chat_template")
    if "chat_template.jinja" in files:
        found = files["chat_template.jinja"].decode()
    if not found:
        return {}
    if isinstance(found, list) and all(isinstance(item, dict) and {"name", "template"} <= set(item) for item in found):
        found = {item["name"]: item["template"] for item in found}
    sources = {"default": found} if isinstance(found, str) else found
    if not isinstance(sources, dict) or not all(isinstance(source, str) for source in sources.values()):
        raise UserError(f"tokenizer_config.json: chat_template is a {type(found).__name__}: expected text")
    return sources
