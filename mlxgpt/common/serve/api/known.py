"""Fields of other servers' requests that are not honored here; each with the values that ask for nothing, and why."""

from typing import Any

from mlxgpt.common.serve.api.errors import ApiError

_TEMPLATE = "give it in chat_template_kwargs where the model's template reads it"
_FORMAT = "use response_format"
_OPTIONS = "decoding has no such option"
_ONE_MODEL = "what is served is chosen when the server starts"

# OpenAI's, of both endpoints, or of one of them
_BOTH: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    # vLLM's, llama.cpp's and mlx-lm's, which would change the answer
    "stop_token_ids": (([],), "give stop as text"),
    "ignore_eos": ((False,), _OPTIONS),
    "min_tokens": ((0,), _OPTIONS),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": (([],), "use logit_bias"),
    "use_beam_search": ((False,), _OPTIONS),
    "length_penalty": ((1, 1.0), _OPTIONS),
    "guided_json": ((), _FORMAT),
    "guided_regex": ((), _FORMAT),
    "guided_choice": ((), _FORMAT),
    "guided_grammar": ((), _FORMAT),
    "structured_outputs": ((), _FORMAT),
    "grammar": (("",), _FORMAT),
    "json_schema": (({},), _FORMAT),
    "repeat_penalty": ((1, 1.0), "use repetition_penalty"),
    "typical_p": ((1, 1.0), _OPTIONS),
    "mirostat": ((0,), _OPTIONS),
    "xtc_probability": ((0, 0.0), _OPTIONS),
    "dry_multiplier": ((0, 0.0), _OPTIONS),
    "logit_processors": (([],), _OPTIONS),
    "adapters": ((), f"{_ONE_MODEL}: give an adapter's name as model"),
    "adapter": ((), f"{_ONE_MODEL}: give an adapter's name as model"),
    "lora": (([],), f"{_ONE_MODEL}: give an adapter's name as model"),
    "draft_model": ((), _ONE_MODEL),
}
_CHAT: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "answers are text"),
    "modalities": ((["text"],), "answers are text"),
    "functions": (([],), "use tools"),
    "function_call": (("none",), "use tool_choice"),
    "moderation": ((), "nothing is moderated"),
    "prediction": ((), "nothing is drawn faster for it"),
    "prompt_cache_options": (({},), "what was read is kept as long as --cache-bytes has room"),
    "prompt_cache_retention": (("in_memory", "in-memory"), "what was read is kept as long as --cache-bytes has room"),
    "verbosity": (("medium",), _TEMPLATE),
    "web_search_options": ((), "nothing is searched"),
    "prompt": ((), "use messages, or /v1/completions"),
    "echo": ((False,), "use /v1/completions"),
    "suffix": ((), "answers go on behind what is given"),
    "best_of": ((1,), "use n"),
    "chat_template": ((), "the model's own template is used"),
    "documents": (([],), "put them into messages"),
    "add_generation_prompt": ((True,), "what is asked for is an answer"),
    "continue_final_message": ((False,), "use /v1/completions with the text so far"),
    "thinking": ((), _TEMPLATE),
    "enable_thinking": ((), _TEMPLATE),
    "top_n_tokens": ((), "use logprobs and top_logprobs"),
}
_COMPLETIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": ((), "models here write what follows a text, not what stands in a gap"),
    "max_completion_tokens": ((), "use max_tokens"),
    "top_logprobs": ((), "use logprobs with a number"),
    "messages": ((), "use /v1/chat/completions, or prompt"),
    "response_format": (({"type": "text"},), "use /v1/chat/completions"),
    "tools": (([],), "use /v1/chat/completions"),
    "tool_choice": (("none",), "use /v1/chat/completions"),
    "chat_template_kwargs": (({},), "use /v1/chat/completions"),
    "prompt_embeds": ((), "use prompt"),
    "prompt_logprobs": ((), "use echo and logprobs"),
}
NOT_HERE = {"ChatRequest": _BOTH | _CHAT, "CompletionRequest": _BOTH | _COMPLETIONS}
# fields that ask for nothing that could change an answer: read by nobody, and not named as unknown
HARMLESS = frozenset({"metadata", "safety_identifier", "prompt_cache_key"})


def check_known(request: str, given: dict[str, Any]) -> dict[str, Any]:
    """The rest of a request, without these fields.

    Raises:
        ApiError: 400, for what would change the answer and is not honored: names the field and says what to do instead.
    """
    known = NOT_HERE.get(request, {})
    for name in known.keys() & given.keys():
        nothing, why = known[name]
        value = given[name]
        if value is not None and not any(type(value) is type(one) and value == one for one in nothing):
            raise ApiError(400, f"{name} is not honored: {why}", name, "unsupported_parameter")
    return {name: value for name, value in given.items() if name not in known and name not in HARMLESS}
