"""Every setting, once: frozen dataclasses, which recipes.py fills; ``ModelConfig`` is in model_config.py.

The classes check what can be checked without the data; they import nothing heavy, so a wrong recipe fails at once.
"""

import dataclasses
import datetime
from dataclasses import dataclass

from mlxgpt.common.align_config import PreferConfig, RLConfig
from mlxgpt.common.fields import check, field, one_of
from mlxgpt.common.model_config import ModelConfig

LOGITS = 1 << 25
"""Logits of a chunk on a GPU: 128 MiB in float32."""

LARGEST = 1e10
"""Of settings that logits are multiplied with, divided by or lowered by: what comes of it stays finite in float32."""


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how they are cut into batches."""

    source: str | tuple = field(
        "pydocs", "pydocs, or a path: .txt .md .jsonl .parquet, a folder, shards, a flat .bin; or a list of text files"
    )
    text_key: str = field("text", "key or column with the document in .jsonl and .parquet")
    tokenizer: str = field("bpe", "char, bpe (byte-level), sp-bpe, sp-unigram, bytes, a name of tiktoken's, or a path")
    vocab_size: int = field(2048, "vocabulary size of a tokenizer trained here; char ignores it")
    val_fraction: float = field(
        0.1, "share of documents, chosen by hash, used for validation; a single document is split"
    )
    sampling: str = field("random", "random (windows with replacement) or epoch (a new permutation each epoch)")
    workers: int = field(0, "processes that tokenize the corpus; 0 = one per core")

    def __post_init__(self) -> None:
        if isinstance(self.source, tuple) and len(self.source) == 1:
            object.__setattr__(self, "source", self.source[0])
        one_of("data", self, "sampling", "random", "epoch")
        check("data", 0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        check("data", self.vocab_size > 0, "vocab_size", self.vocab_size, "a positive number")
        check("data", self.workers >= 0, "workers", self.workers, "0 or a positive number")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The update rule and its schedule. Decay acts on matrices only; eps lies outside the square root."""

    name: str = field("adamw", "adamw, or muon for the matrices of the blocks and adamw for the rest")
    lr: float = field(1e-3, "peak learning rate")
    min_lr: float = field(1e-4, "learning rate at the last step; unused by a constant schedule")
    beta1: float = field(0.9, "decay of the first moment")
    beta2: float = field(0.99, "decay of the second moment")
    eps: float = field(1e-8, "added to the root of the second moment")
    weight_decay: float = field(0.1, "decoupled weight decay, times the learning rate; matrices only")
    clip: float = field(1.0, "maximum global gradient norm; 0 = no clipping")
    schedule: str = field("cosine", "cosine, linear, constant or wsd (warmup-stable-decay)")
    warmup: int = field(100, "steps of linear warmup")
    decay_fraction: float = field(0.2, "wsd: share of the steps, at the end, in which the learning rate decays")
    muon_lr: float = field(0.02, "muon: peak learning rate of the matrices; the same schedule")
    muon_momentum: float = field(0.95, "muon: Nesterov momentum")

    def __post_init__(self) -> None:
        one_of("optim", self, "name", "adamw", "muon")
        one_of("optim", self, "schedule", "cosine", "linear", "constant", "wsd")
        for name in ("lr", "eps", "muon_lr"):
            check("optim", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("min_lr", "weight_decay", "clip", "warmup"):
            check("optim", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        for name in ("beta1", "beta2", "muon_momentum"):
            check("optim", 0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        check("optim", 0 < self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "above 0 and at most 1")
        check("optim", self.min_lr <= self.lr, "min_lr", self.min_lr, f"at most optim.lr = {self.lr}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: length, batch, precision, regularization, validation and checkpoints."""

    steps: int = field(1000, "optimizer updates; also the length of the schedule")
    batch_size: int = field(16, "sequences in a batch, that is, in one update")
    micro_batch_size: int = field(0, "sequences that pass through the model at once; 0 = batch_size")
    seed: int = field(1337, "determines initial weights, batches and dropout")
    dropout: float = field(0.0, "dropout on embeddings, attention weights and both residual branches")
    label_smoothing: float = field(0.0, "probability taken from the target and spread over the vocabulary")
    z_loss: float = field(0.0, "weight of logsumexp(logits)^2, which keeps logits from growing")
    compute_dtype: str = field("float32", "float32 or bfloat16; weights, moments, logits and loss stay float32")
    checkpoint_activations: bool = field(False, "activation checkpointing: recompute blocks in the backward pass")
    loss_chunk: int | str = field(
        "auto", "vocabulary entries per chunk of head and loss; 0 = whole logits; auto: 1024, on a GPU more"
    )
    compile: str = field("auto", "on, off or auto: mx.compile always, torch.compile (slow to start) on CUDA only")
    deterministic: bool = field(False, "bit-equal results on a GPU too, at a cost in speed")
    tf32: bool = field(
        False, "round the operands of float32 products to TF32 (M5, CUDA): faster, and not the same curve"
    )
    memory_limit: int = field(0, "MiB of arrays above which the framework waits for memory; 0 = its default")
    cache_limit: int = field(0, "MLX: maximum MiB of freed memory kept for reuse; 0 = its default")
    clear_cache: int = field(0, "MiB of kept memory above which it is released after a step; 0 = never")
    wired_limit: int = field(0, "Metal: MiB that may be wired; 0 = untouched (raising it can crash a Mac)")
    eval_every: int = field(250, "steps between validations; 0 = never")
    eval_batches: int = field(0, "validation batches, evenly spaced; 0 = the whole split, every token once")
    tasks: str | tuple = field(
        (),
        "tasks asked at each validation: .jsonl or YAML files, or published ones as NAME=PATH, where their files lie",
    )
    task_limit: int = field(100, "questions of each of them, the first ones; 0 = all")
    sample_every: int = field(0, "steps between printed samples; 0 = only at the end")
    save_every: int = field(500, "steps between checkpoints; 0 = only at the end")
    keep: int = field(2, "newest checkpoints to keep, in addition to best and last; 0 = all")
    background: bool = field(True, "write checkpoints on a background thread")
    early_stop: int = field(0, "stop after this many validations without improvement; 0 = never")
    log_every: int = field(10, "steps between printed lines if there is no terminal")
    tensorboard: bool = field(False, "also write TensorBoard events (extra: tensorboard)")
    wandb: str = field("", "W&B project to log to (extra: wandb); empty = off")

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            object.__setattr__(self, "tasks", (self.tasks,) if self.tasks else ())
        one_of("train", self, "compute_dtype", "float32", "bfloat16")
        one_of("train", self, "compile", "auto", "on", "off")
        for name in ("steps", "batch_size"):
            check("train", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        counts = "micro_batch_size eval_every eval_batches task_limit sample_every save_every keep early_stop seed"
        limits = "memory_limit cache_limit clear_cache wired_limit"
        for name in (*counts.split(), *limits.split(), "z_loss"):
            check("train", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        chunk = self.loss_chunk
        whole = chunk == "auto" if isinstance(chunk, str) else chunk >= 0
        check("train", whole, "loss_chunk", chunk, "auto, 0 or a positive number")
        check("train", self.log_every > 0, "log_every", self.log_every, "a positive number")
        for name in ("dropout", "label_smoothing"):
            check("train", 0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")

    def head_chunk(self, tokens: int, vocabulary: int, gpu: bool) -> int:
        """Vocabulary entries of a chunk of head and loss for so many tokens at once; 0: whole logits.

        By itself a GPU takes chunks of LOGITS logits, which keep it busy, and a quarter of them whole.
        """
        chunk = self.loss_chunk
        if isinstance(chunk, str):
            chunk = 1024
            if gpu and vocabulary > chunk:
                chunk = max(chunk, LOGITS // tokens // 512 * 512)
                return 0 if 4 * tokens * vocabulary <= LOGITS else min(chunk, vocabulary)
        return chunk if chunk < vocabulary else 0


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How the next token is drawn; common/inference/sampling.py is the specification."""

    prompt: str = field("\n", "prompt of the samples")
    max_tokens: int = field(100, "maximum number of new tokens")
    temperature: float = field(0.8, "divides the logits; 0 (and below 1e-10) = greedy decoding")
    top_k: int = field(0, "keep the k most likely tokens; 0 = all")
    top_p: float = field(1.0, "keep the most likely tokens whose probabilities add up to this; 1 = all")
    min_p: float = field(0.0, "keep tokens with at least this share of the highest probability; 0 = all")
    repetition_penalty: float = field(1.0, "divides positive and multiplies negative logits of seen tokens; 1 = off")
    presence_penalty: float = field(0.0, "subtracted from logits of tokens drawn since the prompt; 0 = off")
    frequency_penalty: float = field(0.0, "the same, times how often the token was drawn; 0 = off")
    seed: int = field(0, "determines the noise")

    def __post_init__(self) -> None:
        for name in ("max_tokens", "temperature", "top_k", "seed"):
            check("sample", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        check("sample", 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        check("sample", 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        check("sample", self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a positive number")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            check("sample", abs(value) <= LARGEST, name, value, f"a number between {-LARGEST:g} and {LARGEST:g}")
        for name, least in (("temperature", 0), ("repetition_penalty", 1 / LARGEST)):
            value = getattr(self, name)
            check("sample", least <= value <= LARGEST, name, value, f"a number between {least:g} and {LARGEST:g}")
        if self.temperature < 1 / LARGEST:  # in float32 the noise is nothing beside such logits
            object.__setattr__(self, "temperature", 0.0)
        for name in ("max_tokens", "top_k", "seed"):
            check("sample", getattr(self, name) < float("inf"), name, getattr(self, name), "a finite number")


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Fine-tuning: the examples, how they become tokens, and the task."""

    model: str = field("", "base model: a run, a checkpoint, a model folder or a hub id")
    adapter: str = field("", "adapter of that model to continue training")
    source: str = field(
        "", "pydocs-qa, a folder with train.jsonl (valid.jsonl, test.jsonl), or a .jsonl .json .csv .tsv .parquet"
    )
    task: str = field(
        "lm", "lm (train on answers), classify (labels), prefer (the better of two answers) or reward (scores)"
    )
    format: str = field("auto", "format of an example: auto (by its keys), text, completion, chat, alpaca or sharegpt")
    text_key: str = field("text", "text, classify: key of the text")
    prompt_key: str = field("prompt", "completion: key of the prompt")
    completion_key: str = field("completion", "completion: key of the answer")
    messages_key: str = field("messages", "chat: key of the list of messages")
    label_key: str = field("label", "classify: key of the label")
    drop_nulls: str = field(
        "auto", "leave out keys that are null, at any depth: true, false, or auto (in .parquet and .arrow alone)"
    )
    template: str = field("auto", "chat template: auto (the tokenizer's, else ChatML), chatml, or a jinja file")
    chat_template_kwargs: dict = dataclasses.field(
        default_factory=dict, metadata={"help": "values that the template reads, such as {enable_thinking = false}"}
    )
    train_on_prompt: bool = field(False, "train on all tokens, not only on those of the assistant")
    train_on: str = field("both", "what of an answer is trained: both, answer (without its reasoning) or thinking")
    sanitize: bool = field(
        False, "control tokens that messages spell are text, as transformers' sanitize_control_tokens"
    )
    end_tokens: tuple = field(
        (), "tokens that end an answer besides the template's and the model's own, by their text or id"
    )
    unroll: bool = field(False, "one example per answer, with its history: for templates that rewrite history")
    date: str = field("", "date that templates may write, such as 2026-11-25; empty = the day the run began")
    block_size: int = field(0, "maximum tokens of an example; 0 = the model's context, at most 2048")
    overflow: str = field(
        "drop",
        "longer examples: drop, truncate (oldest turns, then the prompt's middle), start (cut the end) or refuse",
    )
    packing: bool = field(True, "pack several examples into a sequence, each attending only to itself; false = padding")
    val_fraction: float = field(
        0.1, "share of examples, chosen by hash, for validation if the source has no such split"
    )
    epochs: float = field(3.0, "passes over the examples, if train.steps is not given")
    neftune: float = field(0.0, "alpha of NEFTune's uniform noise on embeddings; 0 = off")
    class_weights: str = field("none", "classify: none, or balanced (inversely proportional to label frequency)")
    metrics: tuple = field((), "metrics of answers generated at validation: exact, bleu, chrf, rouge_l")
    metric_rows: int = field(50, "examples answered for these metrics; 0 = all")
    test: bool = field(True, "score the test split, if there is one, at the end")
    keep_best: str = field(
        "loss",
        "metric that selects the best checkpoint: loss, one of tune.metrics, accuracy, macro_f1, rewards/accuracies, "
        "rewards/margins",
    )

    def __post_init__(self) -> None:
        one_of("tune", self, "task", "lm", "classify", "prefer", "reward")
        one_of("tune", self, "format", "auto", "text", "completion", "chat", "alpaca", "sharegpt")
        one_of("tune", self, "train_on", "both", "answer", "thinking")
        one_of("tune", self, "overflow", "truncate", "drop", "start", "refuse")
        one_of("tune", self, "class_weights", "none", "balanced")
        one_of("tune", self, "drop_nulls", "auto", "true", "false")
        if not self.date:  # a run resumed tomorrow renders the same examples
            object.__setattr__(self, "date", datetime.date.today().isoformat())
        check("tune", _is_day(self.date), "date", self.date, "a day such as 2026-11-25")
        for name, idle in (("unroll", False), ("train_on", "both")):
            fits = getattr(self, name) == idle or not self.train_on_prompt
            check("tune", fits, name, getattr(self, name), f"{idle!r} where tune.train_on_prompt")
        for name in ("block_size", "neftune", "metric_rows"):
            check("tune", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        check("tune", 0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        check("tune", 0 < self.epochs < float("inf"), "epochs", self.epochs, "a positive number")
        unread = (
            ("metrics", (), "lm"),
            ("end_tokens", (), "lm prefer"),
            ("sanitize", False, "lm prefer reward"),
            ("train_on", "both", "lm"),
            ("train_on_prompt", False, "lm classify"),
            ("neftune", 0.0, "lm classify"),
            ("class_weights", "none", "classify"),
        )
        for name, idle, tasks in unread:
            used = self.task in tasks.split() or getattr(self, name) == idle
            check("tune", used, name, getattr(self, name), f"{idle!r} where tune.task = {self.task}")
        known = ("exact", "bleu", "chrf", "rouge_l")
        for name in self.metrics:
            check("tune", name in known, "metrics", name, "some of " + ", ".join(known))
        best = ("loss", *self.metrics)
        if self.task != "lm":
            pairs = ("loss", "rewards/accuracies", "rewards/margins")
            best = ("loss", "accuracy", "macro_f1") if self.task == "classify" else pairs
        hint = "" if len(best) > 1 else ", or a metric that tune.metrics names"
        check("tune", self.keep_best in best, "keep_best", self.keep_best, "one of " + ", ".join(best) + hint)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What trains in fine-tuning. Patterns name modules as the family's files do (q_proj) or as we do (attn.c_attn)."""

    method: str = field("lora", "lora, dora, or full (every weight)")
    rank: int = field(8, "rank of the update")
    alpha: float = field(16.0, "the update is scaled by alpha / rank")
    rslora: bool = field(False, "scale by alpha / sqrt(rank) instead")
    dropout: float = field(0.0, "dropout on the input of the update")
    targets: tuple = field(("all-linear",), "target modules: all-linear, suffixes of names, or regular expressions")
    layers: int = field(0, "only the last n blocks; 0 = all")
    ranks: tuple = field((), "ranks of single modules, as 'pattern=rank'; the last match applies")
    alphas: tuple = field((), "alphas of single modules, as 'pattern=alpha'")
    init: str = field("default", "default (B = 0) or pissa (train the largest singular values)")
    train: tuple = field((), "modules trained in full as well: embedding, head or norms")
    bias: str = field("none", "trainable biases: none, adapted (those of the targets) or all")
    b_lr: float = field(1.0, "LoRA+: learning rate of B divided by that of A")
    bits: int = field(0, "quantize the frozen matrices to 4 or 8 bits; 0 = leave them as they are")
    group_size: int = field(64, "weights that share a scale")
    dequantize: str = field("auto", "dequantize a quantized base: auto (once, on a CPU, if memory allows) or never")

    def __post_init__(self) -> None:
        one_of("adapter", self, "method", "lora", "dora", "full")
        one_of("adapter", self, "init", "default", "pissa")
        one_of("adapter", self, "bias", "none", "adapted", "all")
        one_of("adapter", self, "dequantize", "auto", "never")
        for name in ("rank", "alpha", "b_lr"):
            check("adapter", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        check("adapter", self.layers >= 0, "layers", self.layers, "0 or a positive number")
        check("adapter", 0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        check("adapter", self.bits in (0, 4, 8), "bits", self.bits, "0, 4 or 8")
        check("adapter", self.group_size in (32, 64, 128), "group_size", self.group_size, "32, 64 or 128")
        check("adapter", bool(self.targets) or bool(self.train), "targets", self.targets, "at least one")
        for each in dataclasses.fields(self) if self.method == "full" else ():
            value, default = getattr(self, each.name), each.default
            idle = value == default or each.name == "method"
            check("adapter", idle, each.name, value, f"{default!r} where adapter.method = full: every weight trains")
        used = self.bits or self.group_size == type(self).group_size
        check("adapter", bool(used), "group_size", self.group_size, "64 where adapter.bits = 0")
        for name, kind, words in (("ranks", int, "rank"), ("alphas", float, "alpha")):
            for item in getattr(self, name):
                pattern, equals, value = str(item).rpartition("=")
                try:
                    good = bool(pattern and equals) and kind(value) > 0
                except ValueError:
                    good = False
                check("adapter", good, name, item, f"pattern={words}, such as q_proj={16 if kind is int else 32.0}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. ``model`` is what the recipe says; families.resolve fills what the family implies.

    Pre-training reads ``data``; fine-tuning reads ``tune`` and ``adapter`` instead, and where tune.task is prefer or
    reward ``prefer``; reinforcement learning ``rl`` besides. They are None otherwise.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    tune: TuneConfig | None = None
    adapter: AdapterConfig | None = None
    prefer: PreferConfig | None = None
    rl: RLConfig | None = None

    @property
    def together(self) -> int:
        """Rows that the model is given for one of the data: two of a pair."""
        if not self.prefer or (self.tune and self.tune.task == "prefer" and self.prefer.loss == "kto"):
            return 1
        return 2
