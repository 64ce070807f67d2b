"""What a model is: its sizes and choices, the section [model] of a recipe."""

from dataclasses import dataclass

from mlxgpt.common.fields import check, field, one_of

_QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
_ROPE = {
    "none": "",
    "linear": "rope_factor",
    "llama3": "rope_factor rope_low rope_high rope_original",
    "yarn": "rope_factor rope_original rope_beta_fast rope_beta_slow rope_truncate rope_attention",
    "dynamic": "rope_factor rope_original",
    "longrope": "rope_original rope_attention rope_short rope_long",
}
"""What each rope_scaling reads."""

SCORE = ("LABEL_0",)
"""The label of a reward model's one output, as transformers names it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer: sizes, and the choices in which published architectures differ.

    ``family`` names the Hugging Face architecture that the model is saved as; families.py fills the choices it implies.
    """

    family: str = field("gpt2", "architecture on disk: gpt2, llama, qwen3, gemma2 and others of common/model/family")
    n_layer: int = field(4, "transformer blocks")
    n_head: int = field(4, "query heads")
    n_kv_head: int = field(0, "key and value heads; 0 = n_head")
    n_embd: int = field(128, "embedding size")
    head_dim: int = field(0, "dimensions of a head; 0 = n_embd / n_head")
    n_hidden: int = field(
        0, "hidden size of the MLP; 0 = 4 n_embd, or 8/3 n_embd rounded up to a multiple of 64 if gated"
    )
    block_size: int = field(256, "longest context, tokens")
    vocab_size: int = field(0, "vocabulary entries; 0 = as many as the tokenizer has")
    norm: str = field("layer", "layer (LayerNorm), rms (RMSNorm) or rms1 (RMSNorm that scales by 1 + weight)")
    norm_eps: float = field(1e-5, "epsilon inside the norm's square root")
    placement: str = field(
        "pre",
        "norms: pre, post (of a branch's output), sandwich (both), post_add (of the sum, as in 2017), parallel (one "
        "for both branches) or parallel2 (two)",
    )
    activation: str = field("gelu_tanh", "gelu_tanh, gelu (erf), silu, relu or relu2 (relu squared)")
    gated: bool = field(False, "gated MLP: proj(act(gate(x)) * fc(x))")
    fused_mlp: bool = field(False, "gated: one matrix c_gate_fc in place of c_gate and c_fc")
    position: str = field("learned", "learned (wpe), rope, sinusoidal, alibi or none")
    sinusoid: str = field(
        "pairs",
        "sinusoidal: pairs (sin, cos alternate), halves (sin, then cos) or span (halves down to 1 / rope_theta)",
    )
    position_multiplier: float = field(1.0, "learned, sinusoidal: multiplier of what is added to the embeddings")
    rope_theta: float = field(10000.0, "base of the frequencies of rope and of sinusoids")
    rope_local_theta: float = field(0.0, "the same in layers with a window; 0 = rope_theta")
    rope_scaling: str = field(
        "none", "none, linear (all frequencies / rope_factor), llama3 (the low ones only), yarn, dynamic or longrope"
    )
    rope_factor: float = field(1.0, "linear, llama3, yarn, dynamic: how many times as long sequences may be")
    rope_original: int = field(8192, "llama3, yarn, dynamic, longrope: context before scaling")
    rope_low: float = field(1.0, "llama3: low_freq_factor")
    rope_high: float = field(4.0, "llama3: high_freq_factor")
    rope_beta_fast: float = field(32.0, "yarn: turns in rope_original above which a frequency stays")
    rope_beta_slow: float = field(1.0, "yarn: turns in rope_original below which a frequency is / rope_factor")
    rope_truncate: bool = field(True, "yarn: the two bounds are rounded to whole pairs of dimensions")
    rope_attention: float = field(0.0, "yarn, longrope: multiplier of cos and sin; 0 = by the factor")
    rope_short: tuple = field((), "longrope: divisors of the frequencies in sequences up to rope_original")
    rope_long: tuple = field((), "longrope: the same in longer sequences")
    rotary_dim: int = field(0, "leading dimensions of a head that rope rotates; 0 = head_dim")
    no_rope: tuple = field((), "blocks that do not use rope")
    window: int = field(0, "sliding window: tokens that a token attends to, itself included; 0 = all")
    window_layers: tuple = field((), "blocks with the sliding window; empty = all")
    qk_norm: str = field(
        "none", "norm of queries and keys before rope: none, head (over head_dim) or full (all heads at once)"
    )
    attn_scale: float = field(0.0, "multiplier of attention scores; 0 = 1 / sqrt(head_dim)")
    attn_softcap: float = field(0.0, "attention scores become cap * tanh(score / cap); 0 = off")
    final_softcap: float = field(0.0, "the same for logits")
    logit_scale: float = field(0.0, "multiplier of logits, before final_softcap; 0 = off")
    embed_scale: bool = field(False, "embeddings times sqrt(n_embd)")
    embed_multiplier: float = field(1.0, "multiplier of embeddings")
    residual_multiplier: float = field(1.0, "multiplier of both branches before they are added to the residual")
    fused_qkv: bool = field(True, "one matrix c_attn in place of q_proj, k_proj, v_proj")
    qkv_by_head: bool = field(False, "c_attn's rows are q, k, v of head 0, then of head 1 ...")
    qkv_bias: bool = field(True, "biases on the query, key and value projections")
    out_bias: bool = field(True, "bias on the attention's output projection")
    mlp_bias: bool = field(True, "biases in the MLP")
    norm_bias: bool = field(True, "biases in LayerNorm")
    no_bias: tuple = field((), "modules without the bias that the fields above give them, such as attn.k_proj or ln_f")
    norm_weight: bool = field(True, "weights in norms")
    embed_norm: bool = field(False, "a norm ln_e of the embeddings, before the first block")
    final_norm: bool = field(True, "the norm ln_f between the last block and the head")
    head_bias: bool = field(False, "bias on the head")
    tied: bool = field(True, "the head is the embedding, transposed")
    labels: tuple = field(
        (), "labels of a classifier, in the order of its outputs; one alone = a reward model; empty = a language model"
    )

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            check("model", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("n_kv_head", "head_dim", "n_hidden", "vocab_size", "rotary_dim", "window", "rope_local_theta",
                     "attn_scale", "attn_softcap", "final_softcap", "logit_scale", "rope_attention"):  # fmt: skip
            check("model", getattr(self, name) >= 0, name, getattr(self, name), "0 or a positive number")
        one_of("model", self, "norm", "layer", "rms", "rms1")
        one_of("model", self, "placement", "pre", "post", "sandwich", "post_add", "parallel", "parallel2")
        one_of("model", self, "rope_scaling", *_ROPE)
        one_of("model", self, "qk_norm", "none", "head", "full")
        for name in ("no_rope", "window_layers"):
            known = all(isinstance(n, int) and 0 <= n < self.n_layer for n in getattr(self, name))
            check("model", known, name, getattr(self, name), f"blocks 0 to {self.n_layer - 1}")
        for name in ("rope_theta", "rope_factor", "rope_low", "rope_high", "rope_original", "rope_beta_fast",
                     "rope_beta_slow", "embed_multiplier", "residual_multiplier", "position_multiplier"):  # fmt: skip
            check("model", getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        one_of("model", self, "activation", "gelu_tanh", "gelu", "silu", "relu", "relu2")
        one_of("model", self, "position", "learned", "rope", "sinusoidal", "alibi", "none")
        one_of("model", self, "sinusoid", "pairs", "halves", "span")
        check("model", self.norm_eps > 0, "norm_eps", self.norm_eps, "a positive number")
        if not self.head_dim:
            divides = self.n_embd % self.n_head == 0
            check("model", divides, "n_embd", self.n_embd, f"a multiple of model.n_head = {self.n_head}")
            object.__setattr__(self, "head_dim", self.n_embd // self.n_head)
        if not self.n_kv_head:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if not self.n_hidden:
            gated = -(-8 * self.n_embd // 3 // 64) * 64
            object.__setattr__(self, "n_hidden", gated if self.gated else 4 * self.n_embd)
        divides = self.n_head % self.n_kv_head == 0
        check("model", divides, "n_kv_head", self.n_kv_head, f"a divisor of model.n_head = {self.n_head}")
        if self.position == "rope" and not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        turned = self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim
        check("model", turned, "rotary_dim", self.rotary_dim, f"an even number up to model.head_dim = {self.head_dim}")
        fits = not self.qkv_by_head or self.n_kv_head == self.n_head
        check("model", fits, "qkv_by_head", self.qkv_by_head, "false where n_kv_head differs from n_head")
        bare = self.norm_weight or self.norm == "rms" or (self.norm == "layer" and not self.norm_bias)
        check("model", bare, "norm_weight", self.norm_weight, "true, but for norm = rms, or layer without norm_bias")
        names = self.labels
        known = all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
        check("model", known, "labels", names, "different names, one alone for a reward model, or none")
        if names:  # its head is `score`, whatever the language model had
            object.__setattr__(self, "tied", False)
            object.__setattr__(self, "final_softcap", 0.0)
            object.__setattr__(self, "logit_scale", 0.0)
        fused = self.gated or not self.fused_mlp
        check("model", fused, "fused_mlp", self.fused_mlp, "false where the MLP is not model.gated")
        self._check_rope()
        used = self.window > 0 or not self.window_layers
        check("model", used, "window", self.window, "a positive number, with model.window_layers")
        if self.window and not self.window_layers:
            object.__setattr__(self, "window_layers", tuple(range(self.n_layer)))
        self._check_positions()
        able = self.biased
        for name in self.no_bias:
            check(
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
            check("model", idle, name, value, f"{default!r} where model.position = {self.position}")
        even = self.position != "sinusoidal" or self.n_embd % 2 == 0
        check("model", even, "n_embd", self.n_embd, "an even number where model.position = sinusoidal")

    @property
    def scores(self) -> bool:
        """Whether it is a reward model: its one output is a text's score."""
        return len(self.labels) == 1

    @property
    def kind(self) -> str:
        """What the head makes it, in words."""
        if self.scores:
            return "a reward model"
        return f"a classifier of {len(self.labels)} labels" if self.labels else "a language model"

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
            check("model", fits, name, value, f"{default} where model.rope_scaling = {self.rope_scaling}")
        for name in ("rope_short", "rope_long"):
            each, pairs = getattr(self, name), self.rotary_dim // 2 if name in used else 0
            whole = len(each) == pairs and all(type(one) in (int, float) and 0 < one < float("inf") for one in each)
            check("model", whole, name, each, f"{pairs} positive numbers, one a pair of rotary_dim")
            object.__setattr__(self, name, tuple(map(float, each)))
        least = 2 if self.rope_scaling == "longrope" else 1
        check("model", self.rope_original >= least, "rope_original", self.rope_original, f"{least} or more")
        grows = self.rope_scaling != "dynamic" or self.rotary_dim > 2
        check("model", grows, "rotary_dim", self.rotary_dim, "4 or more where model.rope_scaling = dynamic")
