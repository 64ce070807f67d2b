"""Every recipe key, once: section, default and meaning; and which of them somebody means who names another.

Peers are nanoGPT, mlx-lm, Hugging Face's Trainer with PEFT, and litgpt. A name of theirs is looked up without dashes
(``--num-train-epochs``, ``num_train_epochs``), and where that is unknown without its section (``train.max_steps``).
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mlxgpt.common.align_config import PreferConfig, RLConfig
from mlxgpt.common.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    TuneConfig,
)

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "tune": TuneConfig,
    "adapter": AdapterConfig,
    "prefer": PreferConfig,
    "rl": RLConfig,
}
PRETRAINING = ("model", "data", "optim", "train", "sample")
FINETUNING = ("tune", "adapter", "prefer", "optim", "train", "sample")

FLAGS = {
    "data.source": "--data", "tune.source": "--data", "tune.model": "--model", "tune.adapter": "--adapter",
    "tune.task": "--task", "tune.epochs": "--epochs", "tune.train_on_prompt": "--train-on-prompt",
    "adapter.method": "--method", "adapter.rank": "--rank", "optim.lr": "--lr", "train.batch_size": "--batch-size",
    "train.steps": "--steps", "sample.prompt": "--prompt", "sample.max_tokens": "--max-tokens",
    "sample.temperature": "--temperature", "sample.top_k": "--top-k", "sample.top_p": "--top-p",
    "sample.min_p": "--min-p", "sample.repetition_penalty": "--repetition-penalty", "sample.seed": "--seed",
    "sample.presence_penalty": "--presence-penalty", "sample.frequency_penalty": "--frequency-penalty",
}  # fmt: skip
"""Flags that set a key, in the verbs that have them."""

PEERS = {
    "model.family": "model_type",
    "model.n_layer": "num_hidden_layers n_layers num_layers",
    "model.n_head": "num_attention_heads n_heads num_heads",
    "model.n_kv_head": "num_key_value_heads n_query_groups",
    "model.n_embd": "hidden_size d_model emb_dim embed_dim",
    "model.n_hidden": "intermediate_size",
    "model.block_size": "block_size max_position_embeddings context_length context_size context ctx_len seq_len"
    " max_seq_length max_seq_len max_length",
    "model.activation": "hidden_act",
    "model.tied": "tie_word_embeddings",
    "model.qkv_bias": "bias",
    "model.mlp_bias": "bias",
    "model.norm_bias": "bias",
    "data.source": "dataset dataset_name dataset_path train_file train_data data_path data_dir data_file input source",
    "data.tokenizer": "tokenizer_dir",
    "data.text_key": "text_feature text_column",
    "data.vocab_size": "vocab vocab_size",
    "data.val_fraction": "val_split validation_split val_split_fraction",
    "data.workers": "dataloader_num_workers num_proc",
    "optim.name": "optimizer optim",
    "optim.lr": "learning_rate",
    "optim.beta1": "adam_beta1 betas momentum",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon epsilon",
    "optim.weight_decay": "wd",
    "optim.clip": "grad_clip max_grad_norm max_norm",
    "optim.schedule": "decay_lr lr_schedule lr_scheduler_type scheduler",
    "optim.warmup": "warmup_iters warmup_steps warmup_ratio lr_warmup_steps",
    "train.steps": "max_iters lr_decay_iters iters num_iters max_steps steps",
    "train.batch_size": "batch_size per_device_train_batch_size global_batch_size bs",
    "train.micro_batch_size": "per_device_eval_batch_size",
    "train.seed": "seed",
    "train.dropout": "dropout drop_rate",
    "train.label_smoothing": "label_smoothing_factor",
    "train.compute_dtype": "dtype bf16 fp16 precision amp",
    "train.checkpoint_activations": "grad_checkpoint gradient_checkpointing",
    "train.compile": "compile torch_compile",
    "train.eval_every": "eval_interval steps_per_eval eval_steps do_eval interval",
    "train.eval_batches": "eval_iters val_batches eval.max_iters",
    "train.tasks": "eval_tasks tasks",
    "train.task_limit": "eval_limit limit",
    "train.log_every": "log_interval steps_per_report logging_steps verbose",
    "train.save_every": "always_save_checkpoint save_steps save_interval",
    "train.keep": "save_total_limit",
    "train.early_stop": "early_stopping_patience patience",
    "train.tensorboard": "logging_dir",
    "train.wandb": "wandb_log wandb_project report_to project_name logger_name",
    "sample.prompt": "start",
    "sample.max_tokens": "max_new_tokens max_tokens max_length length",
    "sample.temperature": "temp do_sample",
    "sample.seed": "seed",
    "tune.model": "model_name_or_path model_name pretrained checkpoint_dir init_from",
    "tune.adapter": "resume_adapter_file",
    "tune.source": "dataset dataset_name dataset_path train_file train_data data_path data_dir data_file input source",
    "tune.block_size": "block_size max_seq_length max_seq_len max_length",
    "tune.prompt_key": "prompt_feature",
    "tune.completion_key": "completion_feature",
    "tune.messages_key": "chat_feature",
    "tune.text_key": "text_feature text_column",
    "tune.val_fraction": "val_split validation_split val_split_fraction",
    "tune.neftune": "neftune_noise_alpha",
    "tune.test": "test",
    "adapter.method": "fine_tune_type use_dora lora",
    "adapter.rank": "lora_rank lora_r r rank",
    "adapter.alpha": "lora_alpha lora_scale scale alpha",
    "adapter.rslora": "use_rslora",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target_modules lora_query lora_key lora_value lora_projection lora_mlp",
    "adapter.layers": "lora_layers num_layers layers_to_transform",
    "adapter.train": "modules_to_save",
    "adapter.bits": "load_in_4bit load_in_8bit quantize q_bits",
    "rl.rewards": "reward_funcs reward_model reward_functions",
    "rl.weights": "reward_weights",
    "rl.prompts": "num_prompts",
    "rl.completions": "num_generations group_size rollouts_per_prompt",
    "rl.max_tokens": "max_completion_length max_new_tokens",
    "rl.updates": "num_iterations num_ppo_epochs",
    "rl.clip": "epsilon cliprange clip_ratio",
    "rl.clip_high": "epsilon_high",
    "rl.scale": "scale_rewards",
    "rl.mean": "loss_type",
    "rl.kl": "beta kl_coef",
    "rl.kl_ratio": "use_bias_correction_kl",
    "rl.mask_truncated": "mask_truncated_completions",
    "--epochs": "num_train_epochs epochs num_epochs",
    "--size": "size model_size",
    "--init-from": "model init_from model_name_or_path pretrained checkpoint_dir initial_checkpoint_dir",
    "--model": "model_name_or_path model_name checkpoint_dir checkpoint init_from",
    "--out": "out_dir adapter_path output_dir output save_path run_name wandb_run_name name",
    "--adapter": "adapter_path adapter_file resume_adapter_file",
    "--resume": "resume resume_from_checkpoint checkpoint",
    "--device": "device devices accelerator gpu cpu cuda",
    "--bits": "q_bits quantize load_in_4bit load_in_8bit",
}
"""Key or flag -> what peers call it."""
_ACCUMULATION = "train.batch_size counts all rows of an update, --set train.micro_batch_size=N those at once"
ADVICE = {
    "train": "the verb trains: leave it out",
    "do_train": "the verb trains: leave it out",
    "mask_prompt": "only the assistant's tokens train, unless --train-on-prompt: leave it out",
    "completion_only_loss": "only the assistant's tokens train, unless --train-on-prompt: leave it out",
    "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accumulation_steps": _ACCUMULATION,
    "gradient_accumulation_iters": _ACCUMULATION,
    "eval_only": "mlxgpt eval scores a model",
    "num_samples": "repeat --prompt",
    "hf_path": "mlxgpt convert IN OUT takes both as they stand",
    "mlx_path": "mlxgpt convert IN OUT takes both as they stand",
    "hf_dataset": "download it, and give --data FILE",
    "init_from=resume": "--resume RUN continues a run",
    "init_from=scratch": "new weights are where a run starts: leave it out",
    "train bias": "--set model.qkv_bias=false, and so model.out_bias, model.mlp_bias and model.norm_bias",
    "lora_parameters": "--rank N, and --set adapter.alpha=X, adapter.dropout or adapter.targets",
    "recipe": "it needs no flag: mlxgpt train RECIPE",
    "config": "a recipe needs no flag: mlxgpt train FILE.toml",
    "eval tasks": "--task TASK, once for each",
    "eval num_fewshot": "--shots N",
    "eval apply_chat_template": "--chat",
    "eval add_bos_token": "--bos yes or no",
    "eval log_samples": "--log FILE.jsonl",
    "eval output_path": "--log FILE.jsonl for each question, --json for the scores",
    "eval model_args": "--model DIR; python -m mlxgpt.lm_eval is lm_eval itself",
    "eval batch_size": "batches are chosen by length: leave it out",
    "quantize q_mode": "the format is MLX's affine one: leave it out",
    "quantize quantize": "the verb quantizes, to --bits N: leave it out",
    "target_bpw": "--bits mixed:4.5",
    "draft_model": "--draft DIR",
    "assistant_model": "--draft DIR",
    "num_draft_tokens": "the length of drafts follows from what they gain: leave it out",
    "prompt_lookup_num_tokens": "--lookup, which chooses the length of drafts itself",
    "max_kv_size": "the cache holds the whole context; --kv-bits 8 makes it smaller",
    "kv_group_size": "groups are of 64, or of 32 where 64 does not divide the heads: leave it out",
    "quantized_kv_start": "--kv-bits holds for all tokens: leave it out",
    "trust_remote_code": "code of a model's repository is never run: leave it out",
}
"""What peers call it, perhaps with its value or after the verb -> what to do where it is neither key nor flag."""


# Peers' values here: of flags that have none or true and false, and of others.
_SWITCHES = {
    "bf16": "bfloat16", "fp16": "bfloat16", "amp": "bfloat16", "load_in_4bit": "4", "load_in_8bit": "8",
    "use_dora": "dora", "lora": "lora", "compile": "on", "compile false": "off", "torch_compile": "on",
    "decay_lr": "cosine", "decay_lr false": "constant",
}  # fmt: skip
_SPELLED = {
    "bf16": "bfloat16", "fp16": "bfloat16", "float16": "bfloat16", "fp32": "float32", "bf16-true": "bfloat16",
    "bf16-mixed": "bfloat16", "32-true": "float32", "adam": "adamw", "AdamW": "adamw", "adamw_torch": "adamw",
    "constant_with_warmup": "constant", "cosine_decay": "cosine", "linear_schedule": "linear",
}  # fmt: skip
_READ = {
    "train": PRETRAINING,
    "plan": PRETRAINING,
    "finetune": FINETUNING,
    "rl": ("rl", *FINETUNING),
}  # verb -> the sections that it reads


class Key(NamedTuple):
    """A setting: section.key, its default, what it means."""

    name: str
    default: Any
    help: str


def default_of(field: dataclasses.Field) -> Any:
    """The default of a setting."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def every(sections: Iterable[str] = SECTIONS) -> list[Key]:
    """Every key of the sections, in their order."""
    return [
        Key(f"{section}.{field.name}", default_of(field), field.metadata["help"])
        for section in sections
        for field in dataclasses.fields(SECTIONS[section])
    ]


def plain(name: str) -> str:
    """A name as PEERS has it: ``--Num-Train-Epochs`` is num_train_epochs."""
    return name.lstrip("-").replace("-", "_").lower()


def of_peers(name: str) -> list[str]:
    """The keys and flags that peers call ``name``, in the order of PEERS."""
    for asked in dict.fromkeys((plain(name), plain(name).rpartition(".")[2])):
        if found := [ours for ours, names in PEERS.items() if asked in names.split()]:
            return found
    return []


def search(words: Iterable[str]) -> list[Key]:
    """The keys that hold every word, in name, meaning or a peer's name."""
    wanted, found = [plain(word) for word in words], []
    for key in every():
        text = plain(" ".join([key.name, FLAGS.get(key.name, ""), PEERS.get(key.name, ""), key.help]))
        if all(word in text for word in wanted):
            found.append(key)
    return found


def meant(name: str, sections: Iterable[str] = SECTIONS) -> list[str]:
    """The keys that ``name`` means, likeliest first: of another section, a peer's, or misspelled."""
    import difflib  # not at every start of the command line

    section, _, last = plain(name).rpartition(".")
    known = [key.name for key in every(sections)]
    same = [key for key in known if key.partition(".")[2] == last]
    peers = [key for key in of_peers(name) if key in known]
    if found := [key for key in peers if key in same] or same or peers:
        return found[:3]
    scores = []
    for key in known:
        place, _, own = key.partition(".")
        ratio = difflib.SequenceMatcher(None, last, own).ratio()
        scores.append((ratio + 0.1 * (place == section), key))
        for peer in PEERS.get(key, "").split():
            scores.append((difflib.SequenceMatcher(None, last, peer).ratio() - 0.2, key))
    score, best = max(scores, key=lambda each: each[0])
    return [best] if score >= 0.6 else []


def flag_meant(flag: str, value: str, verb: str, known: Sequence[str]) -> str:
    """What to say behind an unknown ``flag`` of a verb with the ``known`` flags: '' or a cure; ``value`` may be ''."""
    import difflib  # not at every start of the command line

    name = plain(flag)
    advice = (ADVICE.get(each) for each in (f"{name}={value}", f"{verb} {name}", name))
    if found := next(filter(None, advice), ""):
        return f": {found}"
    if own := next((each for each in known if plain(each) == name), ""):
        return or_list([own])  # --batch_size
    exact = [key.name for key in every() if key.name.partition(".")[2] == name.rpartition(".")[2]]
    ours = of_peers(flag) or exact
    found = [_as_flag(each, name, value, verb, known) for each in ours]
    if found := list(dict.fromkeys(filter(None, found))):
        return or_list(found[: 1 if found[0] in known else 3])
    if verb == "train" and any(each.startswith(("adapter.", "tune.")) for each in ours):
        return ": of mlxgpt finetune --model DIR --data PATH: mlxgpt train trains every weight"
    if verb == "finetune" and (ours == ["--size"] or any(each.startswith("model.") for each in ours)):
        return ": of mlxgpt train: fine-tuning keeps the sizes of --model DIR"
    spelled = {plain(each): each for each in known}
    if "--set" in known:
        spelled |= {peer: "" for names in PEERS.values() for peer in names.split()}
    close = difflib.get_close_matches(name, list(spelled), n=1, cutoff=0.5)
    if close and not spelled[close[0]]:
        return flag_meant(close[0], value, verb, known) if plain(close[0]) != name else ""  # a peer's, of no use here
    return or_list(spelled[each] for each in close)


def _as_flag(ours: str, name: str, value: str, verb: str, known: Sequence[str]) -> str:
    """A key or flag of PEERS, who call it ``name``, as the verb takes it: a flag, --set KEY=VALUE, or ''."""
    flag = ours if ours.startswith("--") else FLAGS.get(ours, "")
    section = ours.partition(".")[0]
    if flag in known and (flag == ours or section in _READ.get(verb, (section,))):
        return flag
    if flag == ours or "--set" not in known or section not in _READ.get(verb, ()):
        return ""
    default = next(key.default for key in every([section]) if key.name == ours)
    return f"--set {ours}={_fitting(default, name, value)}"


def _fitting(default: Any, name: str, value: str) -> str:
    """A value that a key with this default takes, as near to the peer's as there is one; else VALUE."""
    said = value.lower()
    if isinstance(default, bool):
        return "false" if said in ("false", "0", "no", "off") else "true"
    if isinstance(default, (int, float)):
        form = r"\d+" if isinstance(default, int) else r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
        return value if re.fullmatch(form, said) else _SWITCHES.get(name, "VALUE")
    if said == "false":
        return _SWITCHES.get(f"{name} false", "VALUE")
    return _SWITCHES.get(name, "VALUE") if said in ("", "true") else _SPELLED.get(value, value)


def or_list(names: Iterable[str]) -> str:
    """`` (did you mean 'a' or 'b'?)``, or nothing."""
    found = " or ".join(repr(name) for name in names)
    return f" (did you mean {found}?)" if found else ""
