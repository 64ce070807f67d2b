"""What --model and --adapter may name: a run, a checkpoint, a folder, a hub id."""

import errno
import os
import re
from pathlib import Path

from mlxgpt.common.errors import UserError
from mlxgpt.common.folders import weight_files
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

_STEP = re.compile(r"step-(\d{7,})")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WEIGHTS = (".bin", ".gguf", ".npz", ".pt", ".pth", ".safetensors")  # files that convert may read
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def path_of(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:07d}"


def steps_of(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending; whether they hold is not looked at."""
    names = os.listdir(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def is_run(place: Path) -> bool:
    """Whether a folder was made by ``train``."""
    return (place / "recipe.toml").is_file() and (
        (place / "checkpoints").is_dir() or (place / "metrics.jsonl").exists()
    )


def follow(run: Path, name: str) -> Path | None:
    """The checkpoint that ``best`` or ``last`` names, if it is there."""
    link = run / name
    try:
        target = Path(os.readlink(link)) if link.is_symlink() else Path(link.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None
    found = run / target
    return found if _STEP.fullmatch(found.name) and is_model(found) else None


def is_model(place: Path) -> bool:
    """Whether a folder looks like a model, or an adapter."""
    return (place / "config.json").is_file() or (place / "adapter_config.json").is_file()


def resolve_model(path: str | Path) -> Path:
    """The folder that ``--model`` means: of a run its best, else last; a checkpoint or plain folder; a hub id.

    It holds a model or an adapter. A hub id is looked up in the local cache of huggingface_hub first.

    Raises:
        UserError: there is no such model.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if is_model(place):
            return place
        if not is_run(place) and (place / weight_files.META).is_file() and weight_files.pickled(place):
            found = f"{weight_files.pickled(place)[0].name} and {weight_files.META}"
            raise UserError(f"{place}: found {found}, expected config.json: mlxgpt convert {place} NEW makes a folder")
        if not is_run(place):
            raise UserError(f"{place}: neither a model folder (config.json) nor a run (recipe.toml, checkpoints)")
        found = follow(place, "best") or follow(place, "last")
        if found is None and steps_of(place):
            found = path_of(place, steps_of(place)[-1])
        if found is None:
            raise UserError(f"{place}: this run has no checkpoint yet")
        return found
    if place.exists():
        cure = f": mlxgpt convert {place} NEW makes a folder of it, of a GPT of your own mlxgpt adopt {place} --out NEW"
        cure *= place.suffix in _WEIGHTS
        raise UserError(f"{place}: a file; expected a model folder, a run or a hub id{cure}")
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(f"{path}: no such folder")
    return _from_hub(str(path))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder; if it is a hub id: pip install huggingface_hub") from None
    for local in (True, False):
        try:
            found = Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=local))
        except Exception as error:
            # the hub's client raises what its HTTP library raises; all of it means that the model is not to be had
            reason = _hub_reason(error)
            continue
        if is_model(found) and any(found.glob("*.safetensors")):
            return found
        reason = "it has no config.json with safetensors weights; mlxgpt convert reads .bin and .gguf files from disk"
    raise UserError(f"{name}: no such folder, and not to be had from the Hugging Face hub: {reason}")


def _hub_reason(error: BaseException) -> str:
    """What a failed download means and what helps, in one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "gated: accept its terms on its page there, then hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one: check the name; hf auth login for your own"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not in the local cache"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on disk ({error.filename or 'HF_HOME'}): set HF_HOME to another one"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub did not accept the token: hf auth login"
    if status is not None:
        return f"the hub answers {status}: try again later"
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return "no connection to it, and not in the local cache: download it elsewhere and give its folder"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def resolve_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer at ``path``: a file or folder of one, or a run, whose checkpoint has it.

    Raises:
        UserError: there is none, or it is damaged.
    """
    place = Path(path)
    return load_tokenizer(resolve_model(place) if place.is_dir() and is_run(place) else place)


def new_path(path: Path | str) -> Path:
    """``path``, which must not exist yet.

    Raises:
        UserError: it does.
    """
    place = Path(path)
    if place.exists() or place.is_symlink():
        raise UserError(f"{place}: exists already: name a new one or remove it")
    return place
