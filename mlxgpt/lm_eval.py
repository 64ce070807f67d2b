"""mlxgpt's models in lm-evaluation-harness (Gao et al. 2024): ``python -m mlxgpt.lm_eval`` is its command ``lm_eval``
with ``--model mlxgpt``; in a program ``import mlxgpt.lm_eval`` registers it.

lm_eval 0.4.13 looks for no entry points, so that its own command cannot find a model of another package.
"""

import sys
from collections.abc import Sequence
from typing import Any

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        print(f"mlxgpt: error: {error}: expected the extra: pip install 'mlxgpt[lm-eval]'", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(f"{error}: expected the extra: pip install 'mlxgpt[lm-eval]'") from error

from mlxgpt.common import backend as backends
from mlxgpt.common.config import SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.folders import base_and_adapters
from mlxgpt.common.sft.template import template_of
from mlxgpt.common.tasks import reading
from mlxgpt.common.tasks.scorer import ModelScorer

_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # in the order of lm_eval
_SAMPLE = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
_MOST = 256  # tokens of an answer, where a task says nothing


@register_model("mlxgpt")
class MlxgptLM(LM):
    """A model of mlxgpt, as --model_args describes it.

    Args:
        pretrained: a run, a checkpoint, a Hugging Face folder or a hub id.
        adapter: folders of adapters, as ``--adapter`` takes them, separated by ``+``.
        backend: ``mlx`` or ``torch``; default: as the other verbs choose.
        device: ``auto``, ``cpu`` or ``gpu``.
        dtype: ``float32`` or ``bfloat16``.
        batch_size: rows at once, or ``auto``; no number depends on it.
        add_bos_token: None: as the tokenizer does.

    Raises:
        UserError: nothing there that loads, no tokenizer, or an argument that it does not know.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str = "",
        backend: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = "auto",
        add_bos_token: bool | None = None,
        **other: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(other) - {"max_batch_size"})
        if unknown:
            raise UserError(f"--model_args {unknown[0]}: expected pretrained, adapter, backend, device, dtype, "
                            "batch_size or add_bos_token")  # fmt: skip
        if not (batch_size == "auto" or (str(batch_size).isdecimal() and int(batch_size))):
            raise UserError(f"batch_size = {batch_size}: expected a number of rows, or auto")
        half = backends.load(backend)
        given = base_and_adapters.parse_adapters(adapter.split("+") if adapter else [])
        model, tokenizer = half.load.load(pretrained, adapter=given or None, device=device or "auto", dtype=dtype)
        base_and_adapters.expect_task(model.config, pretrained)
        self._tokenizer = base_and_adapters.expect_tokenizer(tokenizer, pretrained)
        self._template = template_of(self._tokenizer, pretrained)
        bos = "auto" if add_bos_token is None else "yes" if add_bos_token else "no"
        rows = reading.ROWS if batch_size == "auto" else int(batch_size)
        self._scorer = ModelScorer(half, model, self._tokenizer, bos, rows=rows)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each (context, continuation)."""
        found = self._scorer.continuations([self._scorer.encode(*each.args) for each in requests], _say(disable_tqdm))
        self._tell_cut()
        return [self._kept("loglikelihood", each.args, tuple(one)) for each, one in zip(requests, found, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        found = self._scorer.texts([text for (text,) in (each.args for each in requests)], _say(disable_tqdm))
        return [self._kept("loglikelihood_rolling", each.args, one) for each, one in zip(requests, found, strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context."""
        made: dict[int, str] = {}
        settings = [_settings(each.args[1]) for each in requests]
        for stop, sample in dict.fromkeys(settings):
            chosen = [n for n, each in enumerate(settings) if each == (stop, sample)]
            contexts = [requests[n].args[0] for n in chosen]
            made |= zip(chosen, self._scorer.answers(contexts, stop, sample, _say(disable_tqdm)), strict=True)
        self._tell_cut()
        return [self._kept("generate_until", each.args, made[n]) for n, each in enumerate(requests)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it, for an answer; else up to the end of its last message."""
        if self._template is None:
            raise UserError("--apply_chat_template: this model has no chat template")
        text = self._template.render(chat_history, generation=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        return text[: text.rindex(last.strip())] + last

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which lm_eval logs."""
        sources = self._tokenizer.templates
        return sources.get(chat_template if isinstance(chat_template, str) else "default", "")

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval keys its cache of requests by."""
        return self._tokenizer.digest

    def _kept(self, kind: str, args: Any, result: Any) -> Any:
        self.cache_hook.add_partial(kind, args, result)
        return result

    def _tell_cut(self) -> None:
        if self._scorer.cut:
            print(f"mlxgpt: {self._scorer.cut} requests were longer than the context of {self._scorer.context} tokens: "
                  "they lost their first tokens", file=sys.stderr)  # fmt: skip
        self._scorer.cut = 0


def _settings(given: dict[str, Any]) -> tuple[tuple[str, ...], SampleConfig]:
    """Stop strings and sampling of generation_kwargs, read as lm_eval's normalize_gen_kwargs reads them."""
    left = {key: value for key, value in given.items() if value is not None}
    until = left.pop("until", [])
    counts = [left.pop(name) for name in _TOKENS if name in left]
    temperature = float(left.pop("temperature", 0.0))
    if not left.pop("do_sample", temperature > 0):
        temperature = 0.0
    more = {name: left.pop(name) for name in _SAMPLE if name in left}
    if left:
        expected = ", ".join(("until", "do_sample", "temperature", *_TOKENS, *_SAMPLE))
        raise UserError(f"generation_kwargs {sorted(left)[0]}: expected {expected}")
    stop = tuple(each for each in ([until] if isinstance(until, str) else until) if each)
    return stop, SampleConfig(temperature=temperature, max_tokens=int([*counts, _MOST][0]), **more)


def _say(quiet: bool) -> Any:
    """Shows the progress on a terminal."""
    live = sys.stderr.isatty() and not quiet
    return (lambda text: print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)) if live else lambda text: None


def main() -> None:
    """lm_eval's own command; this package's errors are one line."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except (UserError, RunError) as error:
        print(f"mlxgpt: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
