"""Reads an mlx-lm LoRA config (`mlx_lm.lora --config FILE.yaml`) as settings of finetune.

Omitted keys have mlx-lm's defaults, not ours, so the file means the same here. Settings that we do not have are
refused by name; a note says where the same name means something else here.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlxgpt.common.errors import UserError, nearest

# of mlx_lm/lora.py, mlx-lm 0.32.2
DEFAULTS: dict[str, Any] = {
    "model": None, "train": True, "fine_tune_type": "lora", "optimizer": "adam", "optimizer_config": {}, "data": None,
    "seed": 0, "num_layers": 16, "batch_size": 4, "iters": 1000, "val_batches": 25, "learning_rate": 1e-5,
    "steps_per_report": 10, "steps_per_eval": 200, "resume_adapter_file": None, "adapter_path": "adapters",
    "save_every": 100, "test": False, "test_batches": 500, "max_seq_length": 2048, "grad_checkpoint": False,
    "grad_accumulation_steps": 1, "clear_cache_threshold": 0, "lr_schedule": None, "mask_prompt": False,
    "report_to": None, "project_name": None, "trust_remote_code": False,
    "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
}  # fmt: skip
_REFUSED = {"hf_dataset": "download it, and give --data FILE", "config": "one file at a time"}
_KEYS = {
    "prompt_feature": "tune.prompt_key",
    "completion_feature": "tune.completion_key",
    "chat_feature": "tune.messages_key",
    "text_feature": "tune.text_key",
}
_TYPES = {"lora", "dora", "full"}
_OPTIONS = {  # of optimizer_config: mlx's argument -> ours
    "adam": {"betas": "betas", "eps": "eps", "bias_correction": ""},
    "adamw": {"betas": "betas", "eps": "eps", "weight_decay": "weight_decay", "bias_correction": ""},
    "muon": {"momentum": "muon_momentum", "weight_decay": "weight_decay", "nesterov": "", "ns_steps": ""},
}
_SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}

Sections = dict[str, dict[str, Any]]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, as mlx-lm reads them: 1e-5 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Config:
    """A file's settings under our names. ``notes`` are lines to print."""

    sections: Sections
    out: str
    layers: int  # the last n blocks that train; -1 = all
    chosen: bool  # the file sets it; the default of 16 means all layers of a smaller model
    notes: tuple[str, ...]


def read_config(path: Path) -> Config:
    """The settings of a YAML file.

    Raises:
        UserError: not YAML, an unknown key (with the nearest), a value of the wrong type, or an unsupported setting.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: found {type(given).__name__}, expected the keys of mlx_lm.lora, such as model: NAME")
    for key, value in given.items():
        if key in _KEYS:
            raise UserError(f"{path}: {key}: expected --set {_KEYS[key]}={value}")
        if key in _REFUSED:
            raise UserError(f"{path}: {key}: not supported: {_REFUSED[key]}")
        if key not in DEFAULTS:
            raise UserError(f"{path}: unknown key {key}{nearest(str(key), DEFAULTS)}")
    return _Reader(
        path, {**DEFAULTS, **{key: value for key, value in given.items() if value is not None}}, given
    ).config()


class _Reader:
    """The values of one file, each checked when it is read."""

    def __init__(self, path: Path, values: dict[str, Any], given: dict[str, Any]):
        self._path, self._values, self._given = path, values, given
        self._notes: list[str] = []

    def _fail(self, key: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self._path}: {key} = {value!r}: expected {expected}")

    def _number(self, key: str, value: Any, whole: bool = False, least: float = 0) -> Any:
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
            raise self._fail(key, value, f"a {'whole ' if whole else ''}number of at least {least}")
        return value if whole else float(value)

    def _whole(self, key: str, least: int = 0) -> int:
        return self._number(key, self._values[key], whole=True, least=least)

    def _flag(self, key: str) -> bool:
        if not isinstance(self._values[key], bool):
            raise self._fail(key, self._values[key], "true or false")
        return self._values[key]

    def _table(self, key: str, value: Any, known: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._fail(key, value, "keys with values")
        for name in value:
            if name not in known:
                raise UserError(f"{self._path}: unknown key {key}.{name}{nearest(str(name), known)}")
        return value

    def config(self) -> Config:
        """All settings."""
        values = self._values
        if not self._flag("train"):
            raise self._fail("train", False, "true: mlxgpt eval scores a model")
        if values["fine_tune_type"] not in _TYPES:
            raise self._fail("fine_tune_type", values["fine_tune_type"], "lora, dora or full")
        if self._flag("trust_remote_code"):
            raise self._fail("trust_remote_code", True, "false: code of a model's repository is never run")
        optim, every = self._optim(), self._whole("grad_accumulation_steps", 1)
        steps = self._whole("iters", 1) // every
        if not steps:
            raise self._fail("iters", values["iters"], f"at least grad_accumulation_steps = {every}")
        optim |= self._schedule(optim["lr"], steps, every)
        batch = self._whole("batch_size", 1)
        train: dict[str, Any] = {
            "steps": steps,
            "batch_size": batch * every,
            "micro_batch_size": batch if every > 1 else 0,
            "seed": self._whole("seed"),
            "eval_every": max(1, self._whole("steps_per_eval", 1) // every),
            "eval_batches": max(0, self._whole("val_batches", -1)),
            "log_every": max(1, self._whole("steps_per_report", 1) // every),
            "save_every": max(1, self._whole("save_every", 1) // every),
            "checkpoint_activations": self._flag("grad_checkpoint"),
            **self._reports(),
        }
        if every > 1:
            self._notes.append(f"iters, steps_per_* and save_every count batches: an update is {every} of them here")
        threshold = self._whole("clear_cache_threshold")
        if threshold:
            train["clear_cache"] = max(1, threshold // 2**20)
        longest = self._whole("max_seq_length", 2)
        tune = {
            "train_on_prompt": not self._flag("mask_prompt"),
            "block_size": 0 if longest == DEFAULTS["max_seq_length"] else longest,  # 0: that, or a shorter context
            "overflow": "truncate",
            "packing": False,
            "test": self._flag("test"),
            "model": self._text("model"),
            "source": self._text("data"),
            "adapter": self._text("resume_adapter_file"),
        }
        self._notes.append(
            f"batch_size: {batch} rows, as in mlx-lm; --set tune.packing=true is faster: {batch} packed rows"
        )
        if values["mask_prompt"]:
            self._notes.append("mask_prompt: every turn of the assistant is trained, not only the last")
        if values["test"] and "test_batches" in self._given and values["test_batches"] != -1:
            self._notes.append("test_batches: the whole test split is scored")
        layers = self._whole("num_layers", -1)
        return Config(
            {"optim": optim, "train": train, "tune": tune, "adapter": self._adapter()},
            self._text("adapter_path"),
            layers,
            "num_layers" in self._given,
            tuple(self._notes),
        )

    def _text(self, key: str) -> str:
        value = self._values[key]
        if value is not None and not isinstance(value, str):
            raise self._fail(key, value, "text")
        return value or ""

    def _optim(self) -> dict[str, Any]:
        name, rate = self._values["optimizer"], self._number("learning_rate", self._values["learning_rate"])
        if name not in _OPTIONS:
            raise self._fail("optimizer", name, f"one of {', '.join(_OPTIONS)}: {name} is not supported")
        configs = self._table("optimizer_config", self._values["optimizer_config"], ("sgd", "adafactor", *_OPTIONS))
        options = self._table(f"optimizer_config.{name}", configs.get(name) or {}, _OPTIONS[name])
        made: dict[str, Any] = {"lr": rate, "min_lr": 0.0, "schedule": "constant", "warmup": 0, "clip": 0.0}
        made |= {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01 if name != "adam" else 0.0}
        for key, value in options.items():
            where = f"optimizer_config.{name}.{key}"
            if key == "betas":
                if not isinstance(value, list) or len(value) != 2:
                    raise self._fail(where, value, "two numbers")
                made["beta1"], made["beta2"] = (self._number(where, each) for each in value)
            elif _OPTIONS[name][key]:
                made[_OPTIONS[name][key]] = self._number(where, value)
            elif (key, value) not in (("nesterov", True), ("ns_steps", 5), ("bias_correction", True)):
                raise self._fail(where, value, {"ns_steps": "5"}.get(key, "true"))
        if name == "muon":
            made |= {"name": "muon", "muon_lr": rate}
        elif not options.get("bias_correction"):
            self._notes.append(
                f"optimizer: {name} corrects its bias here, as in PyTorch; mlx-lm does not by default, and its first "
                "updates are up to 3 times as large"
            )
        return made

    def _schedule(self, rate: float, steps: int, every: int) -> dict[str, Any]:
        """lr_schedule: a warm-up, then cosine_decay(init, decay_steps, end = 0) or linear_schedule(init, end, n)."""
        if self._values["lr_schedule"] is None:
            return {}
        known = ("name", "warmup", "warmup_init", "arguments")
        given = self._table("lr_schedule", self._values["lr_schedule"], known)
        name, arguments = given.get("name"), given.get("arguments")
        if name not in _SCHEDULES:
            raise self._fail("lr_schedule.name", name, f"one of {', '.join(_SCHEDULES)}")
        if not isinstance(arguments, list) or not 2 <= len(arguments) <= 3 or (name[0] == "l" and len(arguments) < 3):
            raise self._fail(
                "lr_schedule.arguments", arguments, "[init, steps, end]" if name[0] == "c" else "[init, end, steps]"
            )
        numbers = [self._number("lr_schedule.arguments", each) for each in arguments]
        peak, length, end = (
            (numbers[0], numbers[1], (*numbers, 0.0)[2])
            if name == "cosine_decay"
            else (numbers[0], numbers[2], numbers[1])
        )
        warmup = int(self._number("lr_schedule.warmup", given.get("warmup", 0), whole=True))
        # mlx-lm's schedules count updates
        if length not in (steps, steps - warmup, steps * every):
            raise self._fail("lr_schedule.arguments", arguments, f"{steps} steps: the decay ends with the run")
        if self._number("lr_schedule.warmup_init", given.get("warmup_init", 0.0)):
            self._notes.append("lr_schedule.warmup_init: the warm-up starts at the peak / warmup here")
        if warmup and length == steps:
            self._notes.append(f"lr_schedule: the decay ends at step {steps} here, not {warmup} steps later")
        if peak != rate and "learning_rate" in self._given:
            self._notes.append(f"learning_rate: {peak:g} of lr_schedule, as in mlx-lm, not {rate:g}")
        return {"lr": peak, "min_lr": end, "schedule": _SCHEDULES[name], "warmup": warmup}

    def _reports(self) -> dict[str, Any]:
        kinds = [kind.strip() for kind in self._text("report_to").split(",") if kind.strip()]
        for kind in kinds:
            if kind != "wandb":
                raise self._fail("report_to", kind, "wandb: others are not supported")
        return {"wandb": self._text("project_name") or "mlxgpt"} if kinds else {}

    def _adapter(self) -> dict[str, Any]:
        method = self._values["fine_tune_type"]
        if method == "full":
            return {"method": "full"}
        known = ("keys", "rank", "scale", "dropout", "alpha")
        given = self._table("lora_parameters", self._values["lora_parameters"], known)
        rank = self._number("lora_parameters.rank", given.get("rank", 8), whole=True, least=1)
        if "scale" not in given and "alpha" not in given:
            raise UserError(f"{self._path}: lora_parameters.scale is missing, which mlx-lm requires")
        scale = self._number("lora_parameters.scale", given.get("scale", given.get("alpha", 0) / rank))
        alpha = self._number("lora_parameters.alpha", given.get("alpha", scale * rank))
        if abs(alpha - scale * rank) > 1e-6 * alpha:
            raise UserError(
                f"{self._path}: lora_parameters: alpha = {alpha:g} and scale = {scale:g} disagree: expected one of "
                f"them, or alpha = scale * rank = {scale * rank:g}"
            )
        made = {"method": method, "rank": rank, "alpha": scale * rank,
                "dropout": self._number("lora_parameters.dropout", given.get("dropout", 0.0))}  # fmt: skip
        if given.get("keys") is not None:
            keys = given["keys"]
            if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
                raise self._fail("lora_parameters.keys", keys, "a list of names, such as self_attn.q_proj")
            made["targets"] = tuple(keys)
        return made
