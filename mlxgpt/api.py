"""The public face of mlxgpt in MLX: ``from mlxgpt.api import load, new, generate, Trainer``.

docs/api/index.md describes it. What stands in __all__ keeps its names and arguments; torch_ref.api has the same.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, overload

from mlxgpt import blas  # noqa: F401  (a BLAS must be loaded before MLX)

# isort: split
import mlx.core as mx

from mlxgpt import device as devices
from mlxgpt import generate as generation
from mlxgpt.common.batch import Batch
from mlxgpt.common.config import ModelConfig, SampleConfig
from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.inference import prompts as prompting
from mlxgpt.common.inference.generation import OnText, Result
from mlxgpt.common.model import params
from mlxgpt.common.recipes import build
from mlxgpt.common.serve import alone
from mlxgpt.common.tokenizers.protocol import Tokenizer
from mlxgpt.common.train import own
from mlxgpt.load import load
from mlxgpt.losses import cross_entropy
from mlxgpt.model import Model

Config = ModelConfig | Mapping[str, Any]

__all__ = [
    "Batch", "ModelConfig", "RunError", "SampleConfig", "Trainer", "UserError",
    "cross_entropy", "generate", "load", "new",
]  # fmt: skip


def new(config: Config, seed: int = 1337, device: str = "auto", dtype: str = "float32", dropout: float = 0.0) -> Model:
    """A model with initial weights, which are a function of ``seed`` alone: bit for bit those of torch_ref.api.new.

    A run whose train.seed is ``seed`` starts from the same. The model is in training mode.

    Args:
        config: a dict of keys of a recipe's [model], such as ``{"family": "llama", "n_layer": 2, "vocab_size": 65}``,
            where the rest follows from the family; or a ModelConfig, taken as it is. vocab_size is needed.
        seed: of weights and dropout.
        device: ``auto``, ``cpu`` or ``gpu``.
        dtype: ``float32`` or ``bfloat16``: what the blocks compute in; weights are float32, so that they can train.
        dropout: the rate in training mode; ``model.dropout`` changes it.

    Raises:
        UserError: an unknown key, a value that does not fit, or no vocab_size.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: expected float32 or bfloat16")
    made = config if isinstance(config, ModelConfig) else build({"model": config}, "config").model  # type: ignore[dict-item]
    devices.use(device)
    model = Model(made, getattr(mx, dtype), seed=params.seed_of(seed))
    model.dropout = dropout
    mx.eval(model.parameters())
    return model


@overload
def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: str | Sequence[int],
    sample: SampleConfig | None = None,
    *,
    stop: Sequence[str] = (),
    on_text: OnText | None = None,
    logit_bias: Mapping[int, float] = MappingProxyType({}),
    lookup: bool = False,
    draft: Model | None = None,
    **settings: Any,
) -> Result: ...
@overload
def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Any,
    sample: SampleConfig | None = None,
    *,
    stop: Sequence[str] = (),
    on_text: OnText | None = None,
    logit_bias: Mapping[int, float] = MappingProxyType({}),
    lookup: bool = False,
    draft: Model | None = None,
    **settings: Any,
) -> Result | list[Result]: ...
def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Any,
    sample: SampleConfig | None = None,
    *,
    stop: Sequence[str] = (),
    on_text: OnText | None = None,
    logit_bias: Mapping[int, float] = MappingProxyType({}),
    lookup: bool = False,
    draft: Model | None = None,
    **settings: Any,
) -> Result | list[Result]:
    """What follows a prompt: ``generate(model, tokenizer, "Once", max_tokens=50).text``. Nothing is dropped meanwhile.

    Args:
        model: of ``load`` or ``new``.
        tokenizer: of ``load``; None: prompts are token ids.
        prompts: a text or a row of token ids, which gives a Result; or a list of them, or ids (B, T), which gives a
            list. Each prompt gets in a batch what it gets alone.
        sample: settings of the draw; else SampleConfig's defaults (100 tokens at temperature 0.8).
        stop: texts, or one, that end the answer and are left out of it.
        on_text: called with the prompt's index and each new piece of text.
        logit_bias: what is added to the logits of tokens, by id.
        lookup: read several tokens at once where the text repeats itself; the tokens are the same.
        draft: a smaller model of the same tokenizer, which guesses what comes; the tokens are the same.
        settings: fields of SampleConfig, such as max_tokens, temperature, top_k, top_p, min_p, seed.

    Returns:
        Result, or one each: ``text`` (without the prompt), ``tokens``, ``prompt_tokens`` and ``finish_reason`` (eos,
        stop, length or context).

    Raises:
        UserError: a prompt that is empty, longer than the context, or has what the vocabulary does not; such an
            id in logit_bias; an unknown setting; a classifier, or a tokenizer of another library; a draft of other ids.
        RunError: the model's logits are not finite.
    """
    prompting.check_model(model, tokenizer)
    rows, single = prompting.rows_of(prompts)
    texts = (stop,) if isinstance(stop, str) else stop
    drawn = prompting.sampling_of(sample, settings)
    if lookup and draft is not None:
        raise UserError("lookup and draft: expected one of them")
    if lookup or draft is not None:
        found = alone.generate("mlx", model, tokenizer, rows, drawn, texts, on_text, logit_bias, draft)
    else:
        found = generation.generate(model, tokenizer, rows, drawn, texts, on_text, bias=logit_bias)
    return found[0] if single else found


class Trainer(own.Trainer):
    __doc__ = own.Trainer.__doc__
    backend = "mlx"
