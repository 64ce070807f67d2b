"""A request as work for the engine: its model, its prompts in tokens, its settings, and the noise of each choice."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.serve.api.errors import ApiError
from mlxgpt.common.serve.api.requests import ChatRequest, CompletionRequest
from mlxgpt.common.serve.api.values import SEEDS
from mlxgpt.common.serve.work import Begun, Constraint, Piece, Served, Work, Worker
from mlxgpt.common.tokenizers import beginning

DRAWN = 2**31  # seeds that are drawn lie below: every client's integers hold them


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens, and as it is echoed."""

    ids: list[int]
    text: str = ""
    added: int = 0  # tokens at its beginning that are not in the text


def find(worker: Worker, name: str | None) -> Served:
    """The model of a name; the base if there is none.

    Raises:
        ApiError: 404, with the names there are.
    """
    if name is None:
        return next(iter(worker.served.values()))
    if (found := worker.served.get(name)) is None:
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        names = ", ".join(worker.served)
        raise ApiError(404, f"model {shown!r} is not served: expected {names}", "model", "model_not_found")
    return found


def seed_of(given: int | None) -> int:
    """The seed of the noise: what was given, as 64 bits without a sign; drawn if nothing was."""
    if given is None:
        return secrets.randbelow(DRAWN)
    return given % (SEEDS[1] + 1)


def text_prompt(served: Served, text: str) -> Prompt:
    """A text as a prompt: behind what its tokenizer puts before one, an empty text else behind the end-of-text token.

    Raises:
        UserError: a character without a token, or no tokenizer.
    """
    tokenizer = served.tokenizer
    if tokenizer is None:
        raise UserError("text needs a tokenizer, and this model has none: expected token ids")
    own = tokenizer.encode(text)
    ids = beginning.begin(tokenizer, own).tolist()
    if not ids and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]
    return Prompt(ids, text, len(ids) - len(own))


def ids_prompt(served: Served, ids: list[int], echo: bool) -> Prompt:
    """Token ids as a prompt."""
    return Prompt(ids, served.tokenizer.decode(ids) if echo and served.tokenizer else "")


def text_behind(served: Served, ids: list[int], added: bool | None) -> str:
    """The text of ids; without what begins every text, unless ``added`` is False."""
    before = beginning.begins_with(served.tokenizer)
    if added is not False and before and ids[: len(before)] == before:
        ids = ids[len(before) :]
    return served.tokenizer.decode(ids) if served.tokenizer else ""


def check_prompt(served: Served, ids: Sequence[int], param: str) -> None:
    """Refuses a prompt that the model cannot read.

    Raises:
        ApiError: 400.
    """
    if not ids:
        raise ApiError(400, f"{param}: empty; expected at least one token", param, "invalid_value")
    if len(ids) > served.context:
        message = f"the prompt has {len(ids)} tokens: this model's maximum context length is {served.context} tokens"
        raise ApiError(400, message, param, "context_length_exceeded")
    check_ids(served, ids, param)


def check_ids(served: Served, ids: Sequence[int], param: str) -> None:
    """Refuses ids that the model does not have.

    Raises:
        ApiError: 400.
    """
    vocabulary = served.model.config.vocab_size
    if max(ids) >= vocabulary:
        message = f"{param}: token id {max(ids)}; expected 0 to {vocabulary - 1}, the model's vocabulary"
        raise ApiError(400, message, param, "invalid_value")


def works(
    request: ChatRequest | CompletionRequest,
    served: Served,
    prompts: Sequence[Prompt],
    seed: int,
    listener: Callable[[int], Callable[[Begun | Piece], None]],
    constrain: Callable[[], Constraint] | None = None,
) -> list[Work]:
    """A work for each prompt; ``listener`` gives who listens to each.

    Raises:
        ApiError: 400, a bias for a token that is not there, or a stop without a tokenizer.
    """
    bias = request.logit_bias or {}
    if bias and max(bias) >= served.n_vocab:
        message = f"logit_bias: token id {max(bias)}; expected 0 to {served.n_vocab - 1}, the model's vocabulary"
        raise ApiError(400, message, "logit_bias", "invalid_value")
    if request.stop and served.tokenizer is None:
        raise ApiError(400, "stop: a text needs a tokenizer, and this model has none", "stop", "invalid_value")

    def given(name: str, default: float) -> float:
        return default if (value := getattr(request, name)) is None else value

    sample = SampleConfig(
        prompt="",
        temperature=given("temperature", 1.0),
        top_p=given("top_p", 1.0),
        top_k=max(0, int(given("top_k", 0))),
        min_p=given("min_p", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        seed=seed,
    )
    n, logprobs = request.n or 1, request.likeliest
    made, seen = [], {}
    for number, prompt in enumerate(prompts):
        before = seen.get(key := tuple(prompt.ids), 0)
        seen[key] = before + n
        rest = served.context - len(prompt.ids) + 1  # the last token drawn need not fit into the context
        limit = rest if request.limit is None else min(request.limit, rest)
        work = Work(
            served=served,
            prompt=prompt.ids,
            sample=replace(sample, max_tokens=limit),
            say=listener(number),
            copies=range(before, before + n),
            stop=request.stop or [],
            bias=bias,
            constrain=constrain,
            logprobs=logprobs,
            score_prompt=logprobs is not None and bool(getattr(request, "echo", False)),
        )
        made.append(work)
    return made
