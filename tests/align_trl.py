"""The curves that trl makes of tests/align_cases.py, written to tests/align_curves.json.

    VENV/bin/python tests/align_trl.py [CASE ...] [--check]      VENV: pip install '.[trl]'

Batches are not shuffled, weights and adapters are the cases' own, AdamW decays matrices alone, as ours does. --check
compares with the file and writes nothing.
"""

import argparse
import importlib
import json
import platform
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import align_cases
import align_rollouts
from align_cases import BATCH, CASES, CURVES, OPTIM, STEPS, Case
from align_rollouts import METHODS, Method

from mlxgpt.common.folders import adapter_folder, model_folder
from mlxgpt.common.model import adapters

ALL = [*CASES, *METHODS]
TRAINERS = {
    "DPO": ("trl", "DPOTrainer", "DPOConfig"),
    "KTO": ("trl", "KTOTrainer", "KTOConfig"),
    "ORPO": ("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig"),
    "CPO": ("trl.experimental.cpo", "CPOTrainer", "CPOConfig"),
    "Reward": ("trl", "RewardTrainer", "RewardConfig"),
}


def dataset(case: Case) -> Any:
    """The rows as trl reads them: text, to which it adds the end."""
    made = []
    for each in align_cases.pairs():
        keys = ("prompt", "chosen", "rejected", "margin") if case.margin else ("prompt", "chosen", "rejected")
        row = {key: each[key] for key in keys}
        if case.trainer == "KTO":
            answer = each["chosen" if each["label"] else "rejected"]
            row = {"prompt": each["prompt"], "completion": answer, "label": each["label"]}
        made.append(row)
    return importlib.import_module("datasets").Dataset.from_list(made)


def _settings(place: Path, size: int) -> dict[str, Any]:
    """What all trainers are told; ``size``: rows of a micro-batch."""
    return {
        "output_dir": str(place / "out"), "num_train_epochs": 1, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "log_level": "error", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
        "per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, BATCH // size),
        "bf16": False, "gradient_checkpointing": False, "max_grad_norm": OPTIM.clip,
    }  # fmt: skip


def _optimize(trainer: Any) -> None:
    """Gives a trainer AdamW as ours is, and its constant rate."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (OPTIM.beta1, OPTIM.beta2)
    trainer.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], OPTIM.lr, betas, OPTIM.eps)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)


def curve(case: Case, place: Path) -> dict[str, list[float]]:
    """``loss``, ``norm`` and, where there are pairs, ``margin`` of every step; ``place``: an empty folder."""
    from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    ours = align_cases.recipe(case)
    weights = align_cases.weights(ours)
    model_folder.write_model(place / "base", ours.model, weights, tokenizer=align_cases.tokenizer())
    read = AutoTokenizer.from_pretrained(str(place / "base"))
    read.pad_token, read.bos_token = read.pad_token or read.eos_token, None  # orpo and cpo would begin rows with it
    kind = AutoModelForSequenceClassification if case.task == "reward" else AutoModelForCausalLM
    model: Any = kind.from_pretrained(place / "base", dtype=torch.float32)
    peft = None
    if case.adapter:
        (place / "adapter").mkdir()
        whole = {name: weights[name] for name in adapters.trainable(ours) if name in weights}  # a score
        own = align_cases.adapter(case, ours, weights) | whole
        adapter_folder.write_adapter(place / "adapter", ours, place / "base", own)
        if case.adapter == "given":
            model = PeftModel.from_pretrained(model, str(place / "adapter"), is_trainable=True)
        else:
            peft = LoraConfig.from_pretrained(str(place / "adapter"))
            peft.inference_mode = False
    module, trainer_name, config_name = TRAINERS[case.trainer]
    where = importlib.import_module(module)
    size = case.micro or BATCH

    class Sequential(getattr(where, trainer_name)):  # type: ignore[misc]
        """Takes the rows in their order, and keeps what every step lost."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            found = super().training_step(*args, **kwargs)
            lost.append(float(found))
            return found

    lost = list[float]()
    trainer = Sequential(
        model=model,
        args=getattr(where, config_name)(**_settings(place, size) | case.trl),
        train_dataset=dataset(case),
        processing_class=read,
        **({"peft_config": peft} if peft else {}),
    )
    if peft:
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(place / "adapter")))
    _optimize(trainer)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "grad_norm" in line]
    parts = BATCH // size
    assert len(logs) == STEPS and len(lost) == STEPS * parts, (len(logs), len(lost))
    made = {
        "loss": [sum(lost[n : n + parts]) for n in range(0, len(lost), parts)],
        "norm": [float(line["grad_norm"]) for line in logs],
    }
    for name in ("rewards/margins", "margin"):
        if all(name in line for line in logs):  # a batch of KTO may lack a kind
            made["margin"] = [float(line[name]) for line in logs]
    return made


def rollout_curve(method: Method, place: Path) -> dict[str, list[float]]:
    """``loss`` and ``norm`` of every update by trl's trainer, which is given recorded completions for its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = align_rollouts.recipe(method)
    model_folder.write_model(place / "base", ours.model, align_cases.weights(ours), tokenizer=align_cases.tokenizer())
    read = AutoTokenizer.from_pretrained(str(place / "base"))
    read.pad_token = read.pad_token or read.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(str(place / "base"), dtype=torch.float32)
    where, held = importlib.import_module("trl"), align_rollouts.rollouts()

    class Recorded(getattr(where, f"{method.trainer}Trainer")):  # type: ignore[misc]
        """Takes the completions of the rollouts in turn."""

        def _logps(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
                mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
                return self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, inputs["completion_ids"].shape[1]
                )[0]

        def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor]:
            number, rest = divmod(len(lost), align_rollouts.UPDATES)
            if not lost:  # the policy is the reference
                reference.extend(self._logps(each) for each in given)
            if rest == 0:
                made = dict(given[number])
                made["advantages"] = torch.tensor(align_rollouts.advantages(method, held[number]), dtype=torch.float32)
                made["num_items_in_batch"] = made["completion_mask"].sum()
                old = self._logps(made)
                made["old_per_token_logps"], made["old_logps"] = old, (old * made["completion_mask"]).sum(1)
                made["ref_per_token_logps"] = reference[number]
                self.kept = made
            return self.kept

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            found = super().training_step(*args, **kwargs)
            lost.append(float(found))
            return found

    lost, rows = list[float](), [{"prompt": "a"}] * 2 * STEPS
    given = [
        {name: torch.from_numpy(array) for name, array in align_rollouts.padded(each.rows).items()} for each in held
    ]
    reference = list[torch.Tensor]()
    config = getattr(where, f"{method.trainer}Config")(
        **_settings(place, 2 * align_rollouts.GROUP), num_generations=align_rollouts.GROUP,
        max_completion_length=align_rollouts.MOST, num_iterations=align_rollouts.UPDATES, max_steps=STEPS, **method.trl,
    )  # fmt: skip
    data = importlib.import_module("datasets").Dataset.from_list(rows)
    trainer = Recorded(
        model=model, args=config, train_dataset=data, processing_class=read, reward_funcs=lambda **_: [0.0]
    )
    _optimize(trainer)
    trainer.train()
    norms = [float(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    assert len(lost) == len(norms) == STEPS, (len(lost), len(norms))
    return {"loss": lost, "norm": norms}


def made_by_trl(name: str) -> dict[str, list[float]]:
    """The curve of a case or a method."""
    with tempfile.TemporaryDirectory() as place:
        return rollout_curve(METHODS[name], Path(place)) if name in METHODS else curve(CASES[name], Path(place))


def again(name: str) -> float:
    """The largest difference of a case's curve, made anew, from the file's; relative where a figure is over 1."""
    made = made_by_trl(name)
    before = json.loads(CURVES.read_text())["curves"][name]
    assert made.keys() == before.keys()
    pairs = [pair for key, values in made.items() for pair in zip(values, before[key], strict=True)]
    return max(abs(one - other) / max(1.0, abs(other)) for one, other in pairs)


def main() -> int:
    """Makes the curves of the cases; 1 where --check finds another one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(ALL)}; default: all")
    parser.add_argument("--check", action="store_true", help="compare with the file and write nothing")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.check:
        found = {name: again(name) for name in args.cases or ALL}
        print("\n".join(f"{name}: {off:.1e}" for name, off in found.items()))
        return int(max(found.values()) > 1e-5)
    held = json.loads(CURVES.read_text())["curves"] if args.cases else {}
    for name in args.cases or ALL:
        made = made_by_trl(name)
        held[name] = {key: [float(f"{value:.8g}") for value in values] for key, values in made.items()}
        print(f"{name}: {made['loss'][0]:.6f} ... {made['loss'][-1]:.6f}", flush=True)
    write(held)
    return 0


def write(curves: dict[str, Any]) -> None:
    """The file, a line a figure of a case."""
    about = {name: version(name) for name in ("trl", "transformers", "torch", "peft")} | {"machine": platform.machine()}
    lines = []
    for name, each in curves.items():
        figures = ",\n".join(f" {json.dumps(key)}: {json.dumps(made)}" for key, made in each.items())
        lines.append(f"{json.dumps(name)}: {{\n{figures}}}")
    CURVES.write_text(f'{{"versions": {json.dumps(about)},\n"curves": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    sys.exit(main())
