"""How the rows of one batch draw, each by its own settings; rows whose settings are equal draw together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlxgpt.common.config import SampleConfig


class Choice(NamedTuple):
    """How one row's next token is drawn. V is the vocabulary that is drawn from."""

    sample: SampleConfig  # as ``settings`` gives it
    key: int  # of the noise
    seen: np.ndarray | None = None  # (V,) bool: what the repetition penalty is for; None where there is none
    added: np.ndarray | None = None  # (V,) float32, onto the logits
    top: int | None = None  # how many likeliest tokens to name, None: no log-probabilities


class Chosen(NamedTuple):
    """What a row drew: a token, -1 where the logits were not finite, and what was asked about it."""

    token: int
    logprob: float | None = None  # natural, under the raw logits
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and theirs, likeliest first


def settings(sample: SampleConfig) -> SampleConfig:
    """``sample`` without what a Choice has of its own, so that equal settings compare equal."""
    return SampleConfig(
        prompt="",
        max_tokens=0,
        temperature=sample.temperature,
        top_k=sample.top_k if sample.temperature else 0,
        top_p=sample.top_p if sample.temperature else 1.0,
        min_p=sample.min_p if sample.temperature else 0.0,
        repetition_penalty=sample.repetition_penalty,
    )


def groups(choices: Sequence[Choice]) -> list[list[int]]:
    """The rows that can draw together: those of equal settings."""
    found: dict[tuple[SampleConfig, bool], list[int]] = {}
    for index, choice in enumerate(choices):
        found.setdefault((choice.sample, choice.added is None), []).append(index)
    return list(found.values())


def stacked(choices: Sequence[Choice], name: str) -> np.ndarray | None:
    """``seen`` or ``added`` of rows that draw together, (B, V); None where they have none."""
    arrays = [getattr(choice, name) for choice in choices]
    return None if arrays[0] is None else np.stack(arrays)


def accepted(drafts: Sequence[Sequence[int]], told: Sequence[Chosen]) -> list[list[Chosen]]:
    """Of each draft the tokens that were drawn as drafted, up to the first that was not; ``told``: of all drafts."""
    made, at = [], 0
    for draft in drafts:
        drawn = told[at : at + len(draft)]
        same = next((n for n, (one, two) in enumerate(zip(draft, drawn, strict=True)) if one != two.token), len(draft))
        made.append(list(drawn[:same]))
        at += len(draft)
    return made


def told(tokens: np.ndarray, choices: Sequence[Choice], names: Sequence[np.ndarray]) -> list[Chosen]:
    """What the rows drew: ``tokens`` (B,); ``names``: of the rows that asked, log-probabilities (n,), the likeliest
    tokens (n, k) and theirs (n, k)."""
    made, asked = [], 0
    for token, choice in zip(tokens.tolist(), choices, strict=True):
        if choice.top is None:
            made.append(Chosen(token))
            continue
        logprobs, ids, values = names
        pairs = zip(ids[asked, : choice.top].tolist(), values[asked, : choice.top].tolist(), strict=True)
        made.append(Chosen(token, float(logprobs[asked]), tuple(pairs)))
        asked += 1
    return made
