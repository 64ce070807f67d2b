"""The settings of mlxgpt rl: defaults, over them --config (TOML), flags and --set; and what training cannot have."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from mlxgpt.common import recipes
from mlxgpt.common.align.rl.user_rewards import parse
from mlxgpt.common.config import Recipe
from mlxgpt.common.errors import UserError
from mlxgpt.common.recipes import apply_sets
from mlxgpt.common.sft import settings
from mlxgpt.common.sft.settings import Chosen, Sections
from mlxgpt.common.train import schedule

# the rate is trl's for all weights, ten times as much for adapters; nothing is validated: rewards are what counts
DEFAULTS: Sections = {
    "optim": {
        "lr": 1e-5, "min_lr": 1e-6, "schedule": "constant", "warmup": 0, "beta2": 0.999, "weight_decay": 0.0,
    },
    "train": {"steps": 200, "eval_every": 0, "save_every": 50, "sample_every": 50, "log_every": 10},
    "tune": {},
    "rl": {},
}  # fmt: skip
FULL_RATES = {"lr": 1e-6, "min_lr": 1e-7}
_FLAGS = {"steps": "train.steps", "lr": "optim.lr"}
_READ = ("model", "adapter", "source", "prompt_key", "messages_key", "chat_template_kwargs", "date", "template")
_UNREAD = {
    "train.dropout": "the policy that draws has none", "train.label_smoothing": "it changes log-probabilities",
    "train.z_loss": "it is not of the objective", "train.eval_every": "nothing is validated: rewards are what counts",
    "train.eval_batches": "nothing is validated", "train.early_stop": "nothing is validated",
    "train.tasks": "nothing is validated: mlxgpt eval --task asks a checkpoint", "train.task_limit": "no tasks",
    "adapter.dropout": "the policy that draws has none",
}  # fmt: skip


def gather(args: Namespace) -> Chosen:
    """The settings of the command line.

    Raises:
        UserError: a section or a key that is not of reinforcement learning, or a value that it cannot have.
    """
    written: Sections = {}
    where = "--set"
    if args.config:
        where = args.config
        written = recipes.read(Path(args.config).expanduser())
    flags = {"tune.model": args.model, "tune.adapter": args.adapter, "tune.source": args.prompts}
    flags |= {"rl.method": args.method, "rl.replay": args.replay, "rl.check": "true" if args.check else None}
    sets = [f"{key}={value}" for key, value in flags.items() if value is not None]
    written = apply_sets(written, [*sets, *recipes.flag_sets(args, _FLAGS), *args.set])
    if args.reward:
        written.setdefault("rl", {})["rewards"] = list(args.reward)
    _check(written, where)
    for key, flag in (("model", "--model DIR"), ("source", "--prompts FILE")):
        if not written.get("tune", {}).get(key):
            raise UserError(f"tune.{key}: expected {flag}")
    made = {key: dict(values) for key, values in DEFAULTS.items()}
    if written.get("adapter", {}).get("method") == "full":
        made["optim"] |= FULL_RATES
    rate = written.get("optim", {}).get("lr")
    if isinstance(rate, int | float) and "min_lr" not in written["optim"]:
        made["optim"]["min_lr"] = rate / 10
    sections = {key: made.get(key, {}) | written.get(key, {}) for key in dict.fromkeys([*made, *written])}
    return Chosen(sections, written, where, args.out or "")


def _check(written: Sections, where: str) -> None:
    settings.check_sections(written, where)
    for section in ("sample", "prefer"):
        for key in written.get(section, {}):
            instead = ": completions are drawn with rl.temperature and rl.max_tokens alone, as they are learned from"
            raise UserError(f"{where}: {section}.{key}: not with mlxgpt rl{instead if section == 'sample' else ''}")
    for key in written.get("tune", {}):
        if key not in _READ:
            raise UserError(f"{where}: tune.{key}: of mlxgpt finetune: expected keys of rl, or {', '.join(_READ)}")
    for name, why in _UNREAD.items():
        section, _, key = name.partition(".")
        if written.get(section, {}).get(key):
            raise UserError(f"{where}: {name} = {written[section][key]!r}: {why}")


def recipe(sections: Sections, where: str) -> Recipe:
    """The recipe of the sections, with a batch that is a rollout, and paths that are absolute.

    Raises:
        UserError: an unknown key or a wrong value.
    """
    rl = dict(sections.get("rl") or {})
    rl["rewards"] = [_absolute(str(each)) for each in rl.get("rewards") or ()]
    if rl.get("replay"):
        rl["replay"] = str(Path(rl["replay"]).expanduser().resolve())
    made = settings.recipe(sections | {"rl": rl}, where)
    assert made.rl and made.tune
    rows, asked = made.rl.prompts * made.rl.completions, (sections.get("train") or {}).get("batch_size")
    if asked not in (None, rows):
        raise UserError(
            f"{where}: train.batch_size = {asked}: expected rl.prompts x rl.completions = {rows}, an update's rows; "
            "train.micro_batch_size says how many pass through the model at once"
        )
    if made.rl.replay and made.rl.rewards:
        raise UserError("--replay and --reward: the rewards are those of the replayed run: expected one of them")
    schedule.check_schedule(made.optim, made.train.steps)
    return dataclasses.replace(made, train=dataclasses.replace(made.train, batch_size=rows))


def _absolute(reward: str) -> str:
    """A reward whose file or folder has its whole path, so that a run may move."""
    path, function = parse(reward)
    place = Path(path).expanduser()
    if not (path.endswith(".py") or place.is_dir()):
        return reward
    return str(place.resolve()) + (f":{function}" if function else "")


def digests(rewards: tuple[str, ...]) -> dict[str, str]:
    """``reward N`` -> sha256 of a reward's file, of a model's weights, or of its name."""
    import hashlib

    from mlxgpt.common.folders import adapter_folder, resolve

    found: dict[str, Any] = {}
    for number, each in enumerate(rewards, 1):
        path, function = parse(each)
        if path.endswith(".py") and Path(path).is_file():
            made = hashlib.sha256(Path(path).read_bytes() + function.encode()).hexdigest()
        elif Path(path).is_dir():
            made = adapter_folder.base_sha256(resolve.resolve_model(path))
        else:
            made = hashlib.sha256(each.encode()).hexdigest()
        found[f"reward {number}"] = made
    return found
