"""A config.json of more than one decoder: the text part of Gemma 3's vision models, and in words what is refused."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
# model_type of the whole -> of its text part, that one's class, and what transformers takes where its table is silent
_TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
}
_OTHER = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
# what the whole says of its text part too: token ids, how the weights lie, and whether the head is tied
_SHARED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version"),
    *("quantization", "quantization_config", "tie_word_embeddings"),
)
_PARTS = re.compile(r"(vision|audio|visual|image|speech|thinker|talker|encoder|decoder)\w*_config")
_EXPERTS = re.compile(
    r"(num|n|moe_num)_(local_|routed_|shared_|moe_)?experts|num_experts_per_tok|moe_intermediate_size"
)
_MIXTURES = {"arctic", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "flex_olmo", "gpt_oss", "jamba", "jetmoe",
             "llama4_text", "minimax", "mixtral", "olmoe"}  # fmt: skip
_EXPERT_TENSOR = re.compile(r".*\b(experts?|router|block_sparse_moe)\b.*")


class TextPart(dict[str, Any]):
    """config.json of the text part; ``note`` says in a line what was taken out of what."""

    def __init__(self, values: Mapping[str, Any], note: str):
        super().__init__(values)
        self.note = note


def of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """``values``, or what they say of the text model in a model of several parts."""
    whole, part = values.get("model_type"), values.get("text_config")
    if not isinstance(whole, str) or whole not in _TEXT or not isinstance(part, dict):
        return values
    kind, architecture, defaults = _TEXT[whole]
    shared = {key: values[key] for key in _SHARED if values.get(key) is not None}
    made = {"tie_word_embeddings": True} | defaults | part | shared
    named = values.get("architectures")
    name = named[0] if isinstance(named, list) and named else whole
    note = f"the text model was taken out of {name}: its vision tower and projector are left out"
    return TextPart(made | {"model_type": kind, "architectures": [architecture]}, note)


def kept(values: Mapping[str, Any], entries: Mapping[str, T]) -> dict[str, T]:
    """The tensors of what ``of`` gave: those of the text part alone."""
    parts = isinstance(values, TextPart)
    return {name: entry for name, entry in entries.items() if not (parts and _OTHER.fullmatch(name))}


def experts_of(values: Mapping[str, Any]) -> str:
    """In words, why a config.json is one of a mixture of experts; '' if it is not."""
    inner = values.get("text_config")
    for table in (values, inner if isinstance(inner, dict) else {}):
        for key, value in table.items():
            if _EXPERTS.fullmatch(key) and value and not isinstance(value, bool):
                return f"{key} = {value!r} is of a mixture of experts, and experts are not read"
        name = str(table.get("model_type"))
        if name in _MIXTURES or "moe" in name.split("_") or name.endswith("moe"):
            return f"{name} is a mixture of experts, and experts are not read"
    return ""


def unread(values: Mapping[str, Any]) -> str:
    """In words, what a config.json of an unknown model_type is of, as far as it says; '' where it does not."""
    if experts := experts_of(values):
        return experts
    parts = sorted(key for key in values if _PARTS.fullmatch(key) and isinstance(values[key], dict))
    inner = values.get("text_config")
    text = f", beside a text model {inner.get('model_type')!r}" if isinstance(inner, dict) else ""
    if parts:
        return f"{', '.join(parts)}: a model of several parts{text}, of which none but gemma3's text is taken out"
    return ""


def experts_among(names: Any) -> str:
    """In words, which tensor is one of a mixture of experts; '' if none is."""
    found = next((name for name in names if _EXPERT_TENSOR.fullmatch(name)), "")
    return found and f"{found} is of a mixture of experts, and experts are not read"
