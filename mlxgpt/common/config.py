"""Every setting, once: frozen dataclasses, which recipes.py fills.

The classes check what can be checked without the data; they import nothing heavy, so a wrong recipe fails at once.
"""

import dataclasses
import datetime
from dataclasses import dataclass
from typing import Any

from mlxgpt.common.errors import UserError

LOGITS = 1 << 25
"""Logits of a chunk on a GPU: 128 MiB in float32."""
_QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def _check(section: str, ok: bool, what: str, found: object, expected: str) -> None:
    if not ok:
        raise UserError(f"{section}.{what} = {found!r}: expected {expected}")


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _one_of(section: str, config: Any, name: str, *allowed: str) -> None:
    _check(section, getattr(config, name) in allowed, name, getattr(config, name), "one of " + ", ".join(allowed))


_ROPE = {
    "none": "",
    "linear": "rope_factor",
    "llama3": "rope_factor rope_low rope_high rope_original",
    "yarn": "rope_factor rope_original rope_beta_fast rope_beta_slow rope_truncate rope_attention",
    "dynamic": "rope_factor rope_original",
    "longrope": "rope_original rope_attention rope_short rope_long",
}
"""What each rope_scaling reads."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer: sizes, and the choices in which published architectures differ.

    ``family`` names the Hugging Face architecture that the model is saved as; families.py fills the choices it implies.
    """

    family: str = _field("gpt2", "architecture on disk: gpt2, llama, qwen3, gemma2 and others of common/model/family")
    n_layer: int = _field(4, "transformer blocks")
    n_head: int = _field(4, "query heads")
    n_kv_head: int = _field(0, "key and value heads; 0 = n_head")
    n_embd: int = _field(128, "embedding size")
    head_dim: int = _field(0, "dimensions of a head; 0 = n_embd / n_head")
    n_hidden: int = _field(
        0, "hidden size of the MLP; 0 = 4 n_embd, or 8/3 n_embd rounded up to a multiple of 64 if gated"
    )
    block_size: int = _field(256, "longest context, tokens")
    vocab_size: int = _field(0, "vocabulary entries; 0 = as many as the tokenizer has")
    norm: str = _field("layer", "layer (LayerNorm), rms (RMSNorm) or rms1 (RMSNorm that scales by 1 + weight)")
    norm_eps: float = _field(1e-5, "epsilon inside the norm's square root")
    placement: str = _field(
        "pre",
        "norms: pre, post (of a branch's output), sandwich (both), post_add (of the sum, as in 2017), parallel (one "
        "for both branches) or parallel2 (two)",
    )
    activation: str = _field("gelu_tanh", "gelu_tanh, gelu (erf), silu, relu or relu2 (relu squared)")
    gated: bool = _field(False, "gated MLP: proj(act(gate(x)) * fc(x))")
    fused_mlp: bool = _field(False, "gated: one matrix c_gate_fc in place of c_gate and c_fc")
    position: str = _field("learned", "learned (wpe), rope, sinusoidal, alibi or none")
    sinusoid: str = _field(
        "pairs",
        "sinusoidal: pairs (sin, cos alternate), halves (sin, then cos) or span (halves down to 1 / rope_theta)",
    )
    position_multiplier: float = _field(1.0, "learned, sinusoidal: multiplier of what is added to the embeddings")
    rope_theta: float = _field(10000.0, "base of the frequencies of rope and of sinusoids")
    rope_local_theta: float = _field(0.0, "the same in layers with a window; 0 = rope_theta")
    rope_scaling: str = _field(
        "none", "none, linear (all frequencies / rope_factor), llama3 (the low ones only), yarn, dynamic or longrope"
    )
    rope_factor: float = _field(1.0, "linear, llama3, yarn, dynamic: how many times as long sequences may be")
    rope_original: int = _field(8192, "llama3, yarn, dynamic, longrope: context before scaling")
    rope_low: float = _field(1.0, "llama3: low_freq_factor")
    rope_high: float = _field(4.0, "llama3: high_freq_factor")
    rope_beta_fast: float = _field(32.0, "yarn: turns in rope_original above which a frequency stays")
    rope_beta_slow: float = _field(1.0, "yarn: turns in rope_original below which a frequency is / rope_factor")
    rope_truncate: bool = _field(True, "yarn: the two bounds are rounded to whole pairs of dimensions")
    rope_attention: float = _field(0.0, "yarn, longrope: multiplier of cos and sin; 0 = by the factor")
    rope_short: tuple = _field((), "longrope: divisors of the frequencies in sequences up to rope_original")
    rope_long: tuple = _field((), "longrope: the same in longer sequences")
    rotary_dim: int = _field(0, "leading dimensions of a head that rope rotates; 0 = head_dim")
    no_rope: tuple = _field((), "blocks that do not use rope")
    window: int = _field(0, "sliding window: tokens that a token attends to, itself included; 0 = all")
    window_layers: tuple = _field((), "blocks with the sliding window; empty = all")
    qk_norm: str = _field(
        "none", "norm of queries and keys before rope: none, head (over head_dim) or full (all heads at once)"
    )
    attn_scale: float = _field(0.0, "multiplier of attention scores; 0 = 1 / sqrt(head_dim)")
    attn_softcap: float = _field(0.0, "attention scores become cap * tanh(score / cap); 0 = off")
    final_softcap: float = _field(0.0, "the same for logits")
    logit_scale: float = _field(0.0, "multiplier of logits, before final_softcap; 0 = off")
    embed_scale: bool = _field(False, "embeddings times sqrt(n_embd)")
    embed_multiplier: float = _field(1.0, "multiplier of embeddings")
    residual_multiplier: float = _field(1.0, "multiplier of both branches before they are added to the residual")
    fused_qkv: bool = _field(True, "one matrix c_attn in place of q_proj, k_proj, v_proj")
    qkv_by_head: bool = _field(False, "c_attn's rows are q, k, v of head 0, then of head 1 ...")
    qkv_bias: bool = _field(True, "biases on the query, key and value projections")
    out_bias: bool = _field(True, "bias on the attention's output projection")
    mlp_bias: bool = _field(True, "biases in the MLP")
    norm_bias: bool = _field(True, "biases in LayerNorm")
    no_bias: tuple = _field((), "modules without the bias that the fields above give them, such as attn.k_proj or ln_f")
    norm_weight: bool = _field(True, "weights in norms")
    embed_norm: bool = _field(False, "a norm ln_e of the embeddings, before the first block")
    final_norm: bool = _field(True, "the norm ln_f between the last block and the head")
    head_bias: bool = _field(False, "bias on the head")
    tied: bool = _field(True, "the head is the embedding, transposed")
    labels: tuple = _field((), "labels of a classifier, in the order of its outputs; empty = a language model")

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            _check("model", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("n_kv_head", "head_dim", "n_hidden", "vocab_size", "rotary_dim", "window", "rope_local_theta",
                     "attn_scale", "attn_softcap", "final_softcap", "logit_scale", "rope_attention"):  # fmt: skip
            _check("model", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        _one_of("model", self, "norm", "layer", "rms", "rms1")
        _one_of("model", self, "placement", "pre", "post", "sandwich", "post_add", "parallel", "parallel2")
        _one_of("model", self, "rope_scaling", *_ROPE)
        _one_of("model", self, "qk_norm", "none", "head", "full")
        for name in ("no_rope", "window_layers"):
            known = all(isinstance(n, int) and 0 <= n < self.n_layer for n in getattr(self, name))
            _check("model", known, name, getattr(self, name), f"blocks 0 to {self.n_layer - 1}")
        for name in ("rope_theta", "rope_factor", "rope_low", "rope_high", "rope_original", "rope_beta_fast",
                     "rope_beta_slow", "embed_multiplier", "residual_multiplier", "position_multiplier"):  # fmt: skip
            _check("model", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _one_of("model", self, "activation", "gelu_tanh", "gelu", "silu", "relu", "relu2")
        _one_of("model", self, "position", "learned", "rope", "sinusoidal", "alibi", "none")
        _one_of("model", self, "sinusoid", "pairs", "halves", "span")
        _check("model", self.norm_eps > 0, "norm_eps", self.norm_eps, "a positive number")
        if not self.head_dim:
            divides = self.n_embd % self.n_head == 0
            _check("model", divides, "n_embd", self.n_embd, f"a multiple of model.n_head = {self.n_head}")
            object.__setattr__(self, "head_dim", self.n_embd // self.n_head)
        if not self.n_kv_head:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if not self.n_hidden:
            gated = -(-8 * self.n_embd // 3 // 64) * 64
            object.__setattr__(self, "n_hidden", gated if self.gated else 4 * self.n_embd)
        divides = self.n_head % self.n_kv_head == 0
        _check("model", divides, "n_kv_head", self.n_kv_head, f"a divisor of model.n_head = {self.n_head}")
        if self.position == "rope" and not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        turned = self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim
        _check("model", turned, "rotary_dim", self.rotary_dim, f"an even number up to model.head_dim = {self.head_dim}")
        fits = not self.qkv_by_head or self.n_kv_head == self.n_head
        _check("model", fits, "qkv_by_head", self.qkv_by_head, "false where n_kv_head differs from n_head")
        bare = self.norm_weight or self.norm == "rms" or (self.norm == "layer" and not self.norm_bias)
        _check("model", bare, "norm_weight", self.norm_weight, "true, but for norm = rms, or layer without norm_bias")
        names = self.labels
        known = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names) != 1
        _check("model", known, "labels", names, "two different names or more, or none")
        if names:  # its head is `score`, whatever the language model had
            object.__setattr__(self, "tied", False)
            object.__setattr__(self, "final_softcap", 0.0)
            object.__setattr__(self, "logit_scale", 0.0)
        fused = self.gated or not self.fused_mlp
        _check("model", fused, "fused_mlp", self.fused_mlp, "false where the MLP is not model.gated")
        self._check_rope()
        used = self.window > 0 or not self.window_layers
        _check("model", used, "window", self.window, "a positive number, with model.window_layers")
        if self.window and not self.window_layers:
            object.__setattr__(self, "window_layers", tuple(range(self.n_layer)))
        self._check_positions()
        able = self.biased
        for name in self.no_bias:
            _check(
                "model", name in able, "no_bias", name, "modules with a bias: " + (", ".join(able) or "there are none")
            )

    def _check_positions(self) -> None:
        """Fields that another kind of positions reads must be idle."""
        readers = {"sinusoid": ("sinusoidal",), "position_multiplier": ("sinusoidal", "learned")}
        if self.position in ("sinusoidal", "alibi", "none"):
            readers |= dict.fromkeys(("rope_scaling", "rope_local_theta", "rotary_dim", "no_rope"), ("rope",))
        for name, kinds in readers.items():
            value, default = getattr(self, name), type(self).__dict__[name]
            idle = self.position in kinds or value == default
            _check("model", idle, name, value, f"{default!r} where model.position = {self.position}")
        even = self.position != "sinusoidal" or self.n_embd % 2 == 0
        _check("model", even, "n_embd", self.n_embd, "an even number where model.position = sinusoidal")

    @property
    def biased(self) -> tuple[str, ...]:
        """The modules that have a bias but for ``no_bias``, as inside a block (attn.q_proj) or at the top (ln_f)."""
        normed, mlp = self.norm == "layer" and self.norm_bias, ("mlp.c_gate", "mlp.c_fc")[not self.gated :]
        given = {
            "ln_e": normed and self.embed_norm,
            "ln_1": normed,
            **dict.fromkeys(("attn.c_attn",) if self.fused_qkv else _QKV, self.qkv_bias),
            **dict.fromkeys(("attn.q_norm", "attn.k_norm"), normed and self.qk_norm != "none"),
            "attn.c_proj": self.out_bias,
            "ln_1_post": normed and self.placement == "sandwich",
            "ln_2": normed and self.placement != "parallel",
            **dict.fromkeys(("mlp.c_gate_fc",) if self.fused_mlp else mlp, self.mlp_bias),
            "mlp.c_proj": self.mlp_bias,
            "ln_2_post": normed and self.placement == "sandwich",
            "ln_f": normed and self.final_norm,
            "lm_head": self.head_bias and not self.labels,
        }
        return tuple(name for name, has in given.items() if has)

    def has_bias(self, module: str) -> bool:
        """Whether a module of ``biased`` has its bias."""
        return module in self.biased and module not in self.no_bias

    def _check_rope(self) -> None:
        """The settings of rope_scaling: those of another are at their defaults."""
        used = _ROPE[self.rope_scaling].split()
        for name in " ".join(_ROPE.values()).split():
            value, default = getattr(self, name), type(self).__dict__[name]
            fits = name in used or value == default
            _check("model", fits, name, value, f"{default} where model.rope_scaling = {self.rope_scaling}")
        for name in ("rope_short", "rope_long"):
            each, pairs = getattr(self, name), self.rotary_dim // 2 if name in used else 0
            whole = len(each) == pairs and all(type(one) in (int, float) and 0 < one < float("inf") for one in each)
            _check("model", whole, name, each, f"{pairs} positive numbers, one a pair of rotary_dim")
            object.__setattr__(self, name, tuple(map(float, each)))
        least = 2 if self.rope_scaling == "longrope" else 1
        _check("model", self.rope_original >= least, "rope_original", self.rope_original, f"{least} or more")
        grows = self.rope_scaling != "dynamic" or self.rotary_dim > 2
        _check("model", grows, "rotary_dim", self.rotary_dim, "4 or more where model.rope_scaling = dynamic")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how they are cut into batches."""

    source: str | tuple = _field(
        "pydocs", "pydocs, or a path: .txt .md .jsonl .parquet, a folder, shards, a flat .bin; or a list of text files"
    )
    text_key: str = _field("text", "key or column with the document in .jsonl and .parquet")
    tokenizer: str = _field("bpe", "char, bpe (byte-level), sp-bpe, sp-unigram, bytes, a name of tiktoken's, or a path")
    vocab_size: int = _field(2048, "vocabulary size of a tokenizer trained here; char ignores it")
    val_fraction: float = _field(
        0.1, "share of documents, chosen by hash, used for validation; a single document is split"
    )
    sampling: str = _field("random", "random (windows with replacement) or epoch (a new permutation each epoch)")
    workers: int = _field(0, "processes that tokenize the corpus; 0 = one per core")

    def __post_init__(self) -> None:
        if isinstance(self.source, tuple) and len(self.source) == 1:
            object.__setattr__(self, "source", self.source[0])
        _one_of("data", self, "sampling", "random", "epoch")
        _check("data", 0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        _check("data", self.vocab_size > 0, "vocab_size", self.vocab_size, "a positive number")
        _check("data", self.workers >= 0, "workers", self.workers, "0 or a positive number")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The update rule and its schedule. Decay acts on matrices only; eps lies outside the square root."""

    name: str = _field("adamw", "adamw, or muon for the matrices of the blocks and adamw for the rest")
    lr: float = _field(1e-3, "peak learning rate")
    min_lr: float = _field(1e-4, "learning rate at the last step; unused by a constant schedule")
    beta1: float = _field(0.9, "decay of the first moment")
    beta2: float = _field(0.99, "decay of the second moment")
    eps: float = _field(1e-8, "added to the root of the second moment")
    weight_decay: float = _field(0.1, "decoupled weight decay, times the learning rate; matrices only")
    clip: float = _field(1.0, "maximum global gradient norm; 0 = no clipping")
    schedule: str = _field("cosine", "cosine, linear, constant or wsd (warmup-stable-decay)")
    warmup: int = _field(100, "steps of linear warmup")
    decay_fraction: float = _field(0.2, "wsd: share of the steps, at the end, in which the learning rate decays")
    muon_lr: float = _field(0.02, "muon: peak learning rate of the matrices; the same schedule")
    muon_momentum: float = _field(0.95, "muon: Nesterov momentum")

    def __post_init__(self) -> None:
        _one_of("optim", self, "name", "adamw", "muon")
        _one_of("optim", self, "schedule", "cosine", "linear", "constant", "wsd")
        for name in ("lr", "eps", "muon_lr"):
            _check("optim", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("min_lr", "weight_decay", "clip", "warmup"):
            _check("optim", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        for name in ("beta1", "beta2", "muon_momentum"):
            _check("optim", 0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        _check("optim", 0 < self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "above 0 and at most 1")
        _check("optim", self.min_lr <= self.lr, "min_lr", self.min_lr, f"at most optim.lr = {self.lr}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: length, batch, precision, regularization, validation and checkpoints."""

    steps: int = _field(1000, "optimizer updates; also the length of the schedule")
    batch_size: int = _field(16, "sequences in a batch, that is, in one update")
    micro_batch_size: int = _field(0, "sequences that pass through the model at once; 0 = batch_size")
    seed: int = _field(1337, "determines initial weights, batches and dropout")
    dropout: float = _field(0.0, "dropout on embeddings, attention weights and both residual branches")
    label_smoothing: float = _field(0.0, "probability taken from the target and spread over the vocabulary")
    z_loss: float = _field(0.0, "weight of logsumexp(logits)^2, which keeps logits from growing")
    compute_dtype: str = _field("float32", "float32 or bfloat16; weights, moments, logits and loss stay float32")
    checkpoint_activations: bool = _field(False, "activation checkpointing: recompute blocks in the backward pass")
    loss_chunk: int | str = _field(
        "auto", "vocabulary entries per chunk of head and loss; 0 = whole logits; auto: 1024, on a GPU more"
    )
    compile: str = _field("auto", "on, off or auto: mx.compile always, torch.compile (slow to start) on CUDA only")
    deterministic: bool = _field(False, "bit-equal results on a GPU too, at a cost in speed")
    tf32: bool = _field(
        False, "round the operands of float32 products to TF32 (M5, CUDA): faster, and not the same curve"
    )
    memory_limit: int = _field(0, "MiB of arrays above which the framework waits for memory; 0 = its default")
    cache_limit: int = _field(0, "MLX: maximum MiB of freed memory kept for reuse; 0 = its default")
    clear_cache: int = _field(0, "MiB of kept memory above which it is released after a step; 0 = never")
    wired_limit: int = _field(0, "Metal: MiB that may be wired; 0 = untouched (raising it can crash a Mac)")
    eval_every: int = _field(250, "steps between validations; 0 = never")
    eval_batches: int = _field(0, "validation batches, evenly spaced; 0 = the whole split, every token once")
    sample_every: int = _field(0, "steps between printed samples; 0 = only at the end")
    save_every: int = _field(500, "steps between checkpoints; 0 = only at the end")
    keep: int = _field(2, "newest checkpoints to keep, in addition to best and last; 0 = all")
    background: bool = _field(True, "write checkpoints on a background thread")
    early_stop: int = _field(0, "stop after this many validations without improvement; 0 = never")
    log_every: int = _field(10, "steps between printed lines if there is no terminal")
    tensorboard: bool = _field(False, "also write TensorBoard events (extra: tensorboard)")
    wandb: str = _field("", "W&B project to log to (extra: wandb); empty = off")

    def __post_init__(self) -> None:
        _one_of("train", self, "compute_dtype", "float32", "bfloat16")
        _one_of("train", self, "compile", "auto", "on", "off")
        for name in ("steps", "batch_size"):
            _check("train", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        counts = "micro_batch_size eval_every eval_batches sample_every save_every keep early_stop seed"
        limits = "memory_limit cache_limit clear_cache wired_limit"
        for name in (*counts.split(), *limits.split(), "z_loss"):
            _check("train", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        chunk = self.loss_chunk
        whole = chunk == "auto" if isinstance(chunk, str) else chunk >= 0
        _check("train", whole, "loss_chunk", chunk, "auto, 0 or a positive number")
        _check("train", self.log_every > 0, "log_every", self.log_every, "a positive number")
        for name in ("dropout", "label_smoothing"):
            _check("train", 0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")

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

    prompt: str = _field("\n", "prompt of the samples")
    max_tokens: int = _field(100, "maximum number of new tokens")
    temperature: float = _field(0.8, "divides the logits; 0 = greedy decoding")
    top_k: int = _field(0, "keep the k most likely tokens; 0 = all")
    top_p: float = _field(1.0, "keep the most likely tokens whose probabilities add up to this; 1 = all")
    min_p: float = _field(0.0, "keep tokens with at least this share of the highest probability; 0 = all")
    repetition_penalty: float = _field(1.0, "divides positive and multiplies negative logits of seen tokens; 1 = off")
    seed: int = _field(0, "determines the noise")

    def __post_init__(self) -> None:
        for name in ("max_tokens", "temperature", "top_k", "seed"):
            _check("sample", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        _check("sample", 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check("sample", 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _check(
            "sample", self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a positive number"
        )


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Fine-tuning: the examples, how they become tokens, and the task."""

    model: str = _field("", "base model: a run, a checkpoint, a model folder or a hub id")
    adapter: str = _field("", "adapter of that model to continue training")
    source: str = _field(
        "", "pydocs-qa, a folder with train.jsonl (valid.jsonl, test.jsonl), or a .jsonl .json .csv .tsv .parquet"
    )
    task: str = _field("lm", "lm (train on answers) or classify (train on labels)")
    format: str = _field("auto", "format of an example: auto (by its keys), text, completion, chat, alpaca or sharegpt")
    text_key: str = _field("text", "text, classify: key of the text")
    prompt_key: str = _field("prompt", "completion: key of the prompt")
    completion_key: str = _field("completion", "completion: key of the answer")
    messages_key: str = _field("messages", "chat: key of the list of messages")
    label_key: str = _field("label", "classify: key of the label")
    drop_nulls: str = _field(
        "auto", "leave out keys that are null, at any depth: true, false, or auto (in .parquet and .arrow alone)"
    )
    template: str = _field("auto", "chat template: auto (the tokenizer's, else ChatML), chatml, or a jinja file")
    chat_template_kwargs: dict = dataclasses.field(
        default_factory=dict, metadata={"help": "values that the template reads, such as {enable_thinking = false}"}
    )
    train_on_prompt: bool = _field(False, "train on all tokens, not only on those of the assistant")
    train_on: str = _field("both", "what of an answer is trained: both, answer (without its reasoning) or thinking")
    sanitize: bool = _field(
        False, "control tokens that messages spell are text, as transformers' sanitize_control_tokens"
    )
    end_tokens: tuple = _field(
        (), "tokens that end an answer besides the template's and the model's own, by their text or id"
    )
    unroll: bool = _field(False, "one example per answer, with its history: for templates that rewrite history")
    date: str = _field("", "date that templates may write, such as 2026-11-25; empty = the day the run began")
    block_size: int = _field(0, "maximum tokens of an example; 0 = the model's context, at most 2048")
    overflow: str = _field("drop", "longer examples: drop, truncate (oldest turns, then the prompt's middle) or refuse")
    packing: bool = _field(
        True, "pack several examples into a sequence, each attending only to itself; false = padding"
    )
    val_fraction: float = _field(
        0.1, "share of examples, chosen by hash, for validation if the source has no such split"
    )
    epochs: float = _field(3.0, "passes over the examples, if train.steps is not given")
    neftune: float = _field(0.0, "alpha of NEFTune's uniform noise on embeddings; 0 = off")
    class_weights: str = _field("none", "classify: none, or balanced (inversely proportional to label frequency)")
    metrics: tuple = _field((), "metrics of answers generated at validation: exact, bleu, chrf, rouge_l")
    metric_rows: int = _field(50, "examples answered for these metrics; 0 = all")
    test: bool = _field(True, "score the test split, if there is one, at the end")
    keep_best: str = _field(
        "loss", "metric that selects the best checkpoint: loss, one of tune.metrics, accuracy, macro_f1"
    )

    def __post_init__(self) -> None:
        _one_of("tune", self, "task", "lm", "classify")
        _one_of("tune", self, "format", "auto", "text", "completion", "chat", "alpaca", "sharegpt")
        _one_of("tune", self, "train_on", "both", "answer", "thinking")
        _one_of("tune", self, "overflow", "truncate", "drop", "refuse")
        _one_of("tune", self, "class_weights", "none", "balanced")
        _one_of("tune", self, "drop_nulls", "auto", "true", "false")
        if not self.date:  # a run resumed tomorrow renders the same examples
            object.__setattr__(self, "date", datetime.date.today().isoformat())
        _check("tune", _is_day(self.date), "date", self.date, "a day such as 2026-11-25")
        for name, idle in (("unroll", False), ("train_on", "both")):
            fits = getattr(self, name) == idle or not self.train_on_prompt
            _check("tune", fits, name, getattr(self, name), f"{idle!r} where tune.train_on_prompt")
        for name in ("block_size", "neftune", "metric_rows"):
            _check("tune", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        _check("tune", 0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        _check("tune", 0 < self.epochs < float("inf"), "epochs", self.epochs, "a positive number")
        unread = (
            ("metrics", (), "lm"),
            ("end_tokens", (), "lm"),
            ("sanitize", False, "lm"),
            ("train_on", "both", "lm"),
        )
        unread = (*unread, ("class_weights", "none", "classify"))
        for name, idle, task in unread:
            used = self.task == task or getattr(self, name) == idle
            _check("tune", used, name, getattr(self, name), f"{idle!r} where tune.task = {self.task}")
        known = ("exact", "bleu", "chrf", "rouge_l")
        for name in self.metrics:
            _check("tune", name in known, "metrics", name, "some of " + ", ".join(known))
        best = ("loss", "accuracy", "macro_f1") if self.task == "classify" else ("loss", *self.metrics)
        hint = "" if len(best) > 1 else ", or a metric that tune.metrics names"
        _check("tune", self.keep_best in best, "keep_best", self.keep_best, "one of " + ", ".join(best) + hint)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What trains in fine-tuning. Patterns name modules as the family's files do (q_proj) or as we do (attn.c_attn)."""

    method: str = _field("lora", "lora, dora, or full (every weight)")
    rank: int = _field(8, "rank of the update")
    alpha: float = _field(16.0, "the update is scaled by alpha / rank")
    rslora: bool = _field(False, "scale by alpha / sqrt(rank) instead")
    dropout: float = _field(0.0, "dropout on the input of the update")
    targets: tuple = _field(("all-linear",), "target modules: all-linear, suffixes of names, or regular expressions")
    layers: int = _field(0, "only the last n blocks; 0 = all")
    ranks: tuple = _field((), "ranks of single modules, as 'pattern=rank'; the last match applies")
    alphas: tuple = _field((), "alphas of single modules, as 'pattern=alpha'")
    init: str = _field("default", "default (B = 0) or pissa (train the largest singular values)")
    train: tuple = _field((), "modules trained in full as well: embedding, head or norms")
    bias: str = _field("none", "trainable biases: none, adapted (those of the targets) or all")
    b_lr: float = _field(1.0, "LoRA+: learning rate of B divided by that of A")
    bits: int = _field(0, "quantize the frozen matrices to 4 or 8 bits; 0 = leave them as they are")
    group_size: int = _field(64, "weights that share a scale")
    dequantize: str = _field("auto", "dequantize a quantized base: auto (once, on a CPU, if memory allows) or never")

    def __post_init__(self) -> None:
        _one_of("adapter", self, "method", "lora", "dora", "full")
        _one_of("adapter", self, "init", "default", "pissa")
        _one_of("adapter", self, "bias", "none", "adapted", "all")
        _one_of("adapter", self, "dequantize", "auto", "never")
        for name in ("rank", "alpha", "b_lr"):
            _check("adapter", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        _check("adapter", self.layers >= 0, "layers", self.layers, "0 or a positive number")
        _check("adapter", 0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        _check("adapter", self.bits in (0, 4, 8), "bits", self.bits, "0, 4 or 8")
        _check("adapter", self.group_size in (32, 64, 128), "group_size", self.group_size, "32, 64 or 128")
        _check("adapter", bool(self.targets) or bool(self.train), "targets", self.targets, "at least one")
        for field in dataclasses.fields(self) if self.method == "full" else ():
            value, default = getattr(self, field.name), field.default
            idle = value == default or field.name == "method"
            _check("adapter", idle, field.name, value, f"{default!r} where adapter.method = full: every weight trains")
        used = self.bits or self.group_size == type(self).group_size
        _check("adapter", bool(used), "group_size", self.group_size, "64 where adapter.bits = 0")
        for field, kind, words in (("ranks", int, "rank"), ("alphas", float, "alpha")):
            for item in getattr(self, field):
                pattern, equals, value = str(item).rpartition("=")
                try:
                    good = bool(pattern and equals) and kind(value) > 0
                except ValueError:
                    good = False
                _check("adapter", good, field, item, f"pattern={words}, such as q_proj={16 if kind is int else 32.0}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. ``model`` is what the recipe says; families.resolve fills what the family implies.

    Pre-training reads ``data``; fine-tuning reads ``tune`` and ``adapter`` instead, which are None otherwise.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    tune: TuneConfig | None = None
    adapter: AdapterConfig | None = None
