"""Which base model and which adapters the command line means: ``--model DIR --adapter DIR[:WEIGHT]``."""

from collections.abc import Sequence
from pathlib import Path

from mlxgpt.common.config import ModelConfig
from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import adapter_folder, resolve
from mlxgpt.common.tokenizers.protocol import Tokenizer

Given = str | Path | Sequence[tuple[str | Path, float]] | None
"""An adapter, or several with their weights."""


def find_base(model: str | Path, given: Given = None) -> tuple[Path, list[tuple[Path, float]]]:
    """The base model's folder, and the folders of adapters with their weights.

    ``model`` may be an adapter, or a run that trained one: then its base is the one that it names.

    Raises:
        UserError: there is no such model or adapter, or the base that an adapter names is gone.
    """
    place = resolve.resolve_model(model)
    listed = [(given, 1.0)] if isinstance(given, str | Path) else list(given or ())
    found = [(_adapter(path), weight) for path, weight in listed]
    if adapter_folder.is_adapter(place):
        return adapter_folder.base_of(place), [(place, 1.0), *found]
    return place, found


def _adapter(path: str | Path) -> Path:
    """The folder of an adapter; of a run the best checkpoint, else the last.

    Raises:
        UserError: there is none, or it is a model.
    """
    place = resolve.resolve_model(path)
    if not (place / adapter_folder.CONFIG).is_file():
        raise UserError(f"{place}: a model, expected an adapter ({adapter_folder.CONFIG})")
    return place


def expect_task(config: ModelConfig, model: str, verb: str = "") -> None:
    """Refuses a model that another verb runs.

    Args:
        config: the model's.
        model: what to call it.
        verb: classify, score, or '' for those that run language models.

    Raises:
        UserError: it is a classifier where a language model is needed, or the like.
    """
    runs = "score" if config.scores else "classify" if config.labels else ""
    if runs == verb:
        return
    if runs:
        raise UserError(f"{model}: {config.kind}, which mlxgpt {runs} runs")
    task, expected = ("reward", "a reward model") if verb == "score" else ("classify", "a classifier")
    raise UserError(f"{model}: a language model: expected {expected} (mlxgpt finetune --task {task} makes one)")


def expect_tokenizer(tokenizer: Tokenizer | None, model: str, instead: str = "") -> Tokenizer:
    """``tokenizer``, which text needs; ``instead`` says what does without.

    Raises:
        UserError: it is None.
    """
    if tokenizer is not None:
        return tokenizer
    cure = f"mlxgpt convert {model} NEW --tokenizer FILE makes a folder with one"
    raise UserError(
        f"{model}: no tokenizer files; expected tokenizer.json or tokenizer.model: {cure}"
        + (f"; {instead}" if instead else "")
    )


def parse_adapters(items: Sequence[str]) -> list[tuple[str, float]]:
    """(path, weight) of ``DIR`` or ``DIR:WEIGHT``.

    Raises:
        UserError: a weight that is no number.
    """
    made = []
    for item in items:
        path, colon, text = item.rpartition(":")
        if not colon or Path(item).expanduser().exists():
            made.append((item, 1.0))
            continue
        try:
            weight = float(text)
        except ValueError:
            raise UserError(f"--adapter {item}: weight {text!r}: expected a number, such as {path}:0.5") from None
        if not abs(weight) < float("inf"):
            raise UserError(f"--adapter {item}: weight {text}: expected a finite number")
        made.append((path, weight))
    return made
