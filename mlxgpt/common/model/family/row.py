"""What one row of the table of families holds: ``Family``, and its parts.

A row is data alone. Settings, config.json, GGUF and what mlx-lm does otherwise are read from it, so it imports nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How a family spells rotary positions in config.json."""

    theta: float = 10000.0  # the base where nothing says it
    theta_key: str = "rope_theta"
    part: float | None = None  # share of a head that is rotated where nothing says it; None: always all of it
    part_key: str = "partial_rotary_factor"
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn", "dynamic")
    longrope: tuple[str, ...] = ()  # other names of the rope type longrope
    original: int = 0  # original_max_position_embeddings beside the table of rope where nothing says it; 0: no such key
    local: float = 0.0  # > 0: blocks with a window have a base of their own; this where nothing says it


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a family spells sliding windows in config.json."""

    absent: int | None  # sliding_window where nothing says it
    types: bool = True  # layer_types says which blocks have it; else all have
    switch: bool = False  # nothing counts unless use_sliding_window is true
    every: int = 0  # without layer_types every n-th block sees everything
    every_key: str = ""  # older key for that n
    key: str = "sliding_window"  # tokens of the window
    nested: bool = False  # attention_types says which blocks have it, global and local in turns where nothing does


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """The architecture of llama.cpp that a family runs with, whose graph is fixed; the keys only size it."""

    arch: str  # "": llama.cpp has none of it
    activation: str = "silu"  # what its graph computes
    assumed: str = ""  # the activation that a file is taken to mean, where that is another
    permuted: bool = False  # rows of q and k lie in pairs, as its rope rotates them
    modules: Mapping[str, str] = field(default_factory=dict)  # our module -> its tensor, where not as in the others
    windows: str = "none"  # none; all: every block; keys: sliding_window and its pattern
    window: int = 0  # the window where no key says it; the pattern is then always written
    needs_window: bool = False  # it wants the key of the window even for 0
    largest: int = 0  # blocks of the size whose scores it divides by sqrt(n_embd / n_head)
    capped: bool = False  # it caps scores and logits whatever the keys say
    factors: bool = False  # it reads the factors of llama3 scaling
    biases: tuple[str, ...] = ()  # our bias fields that it loads
    needs: tuple[str, ...] = ()  # those of them that it does not load without
    multipliers: Mapping[str, str] = field(default_factory=dict)  # its key -> our field
    head: str = ""  # tied or untied, if it loads no other
    whole_heads: bool = False  # it loads only head_dim = n_embd / n_head


@dataclass(frozen=True, kw_only=True)
class MlxLm:
    """What mlx-lm 0.32.2 does with a family whatever config.json says, and what it does not load."""

    activation: str = "silu"
    loads: bool = True  # False: it reads another layout under this name
    knows: bool = True  # False: it has no model of this name
    windows: bool = True  # False: it sees everything
    scaling: bool = True  # False: it ignores rope scaling
    caps_logits: bool = True  # False: it ignores final_softcap
    rounds_embed_scale: bool = False  # sqrt(n_embd) is rounded to bfloat16
    head: str = ""  # tied or untied, if it loads no other
    attention_bias: str = ""  # never or always, if it loads no other
    whole_heads: bool = False  # it loads only head_dim = n_embd / n_head
    hidden_is_4: bool = False  # it loads only n_hidden = 4 n_embd
    capped: bool = False  # it fails without soft caps
    regular: bool = False  # it runs only where every n-th block, and no other, is without a window
    full_block: bool = False  # it fails where every block has a window
    names: tuple[tuple[str, str], ...] = ()  # what a name in the files starts with -> what its modules have there


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that is known of one architecture. Absent keys of config.json mean what transformers takes them to mean."""

    architecture: str
    about: str  # what it has of its own, for docs/formats.md
    modules: Mapping[str, str]  # our module -> theirs; {n} is the block
    fields: Mapping[str, str]  # our field -> key of config.json
    absent: Mapping[str, Any]  # our field -> its value where the key is absent; a field not here must be there
    fixed: Mapping[str, Any]  # our field -> the one value the architecture has
    biases: Mapping[str, str | bool]  # our bias field -> the key that says so, or what the architecture always does
    gguf: Gguf
    mlx_lm: MlxLm
    defaults: Mapping[str, Any] = field(default_factory=dict)  # our field -> what a recipe gets, if not fixed
    rope: Rope | None = None
    windows: Windows | None = None
    no_rope_every: int = 0  # every n-th block does without rope where nothing says which
    must: Mapping[str, Any] = field(default_factory=dict)  # key -> the one value that this decoder can follow
    writes: Mapping[str, Any] = field(default_factory=dict)  # further keys that a folder of ours says
    repeats: Mapping[str, str] = field(default_factory=dict)  # second key that other readers want -> our field
    transposed: tuple[str, ...] = ()  # our modules whose matrix is stored [in, out]
    prefixes: tuple[str, ...] = ()  # what names begin with in transformers' memory, though not in its files
    aliases: Mapping[str, str] = field(default_factory=dict)  # their other name of a module -> the one in their files
    ignored: str = r"(?!)"  # buffers that old files carry
    tanh: str = "gelu_pytorch_tanh"  # what config.json calls gelu_tanh
    gelu_is_tanh: bool = False  # "gelu" in config.json means gelu_tanh
    one_head_size: bool = False  # head_dim = n_embd / n_head and n_kv_head = n_head, with no key to say otherwise
    derived_head: bool = False  # head_dim = n_embd / n_head, with no key to say otherwise
    whole_heads: bool = False  # transformers refuses an n_embd that n_head does not divide
    classifies: bool = True  # transformers has a classifier of this architecture
    scale_key: str = ""  # attention scores are divided by the root of this whole number
    score_key: str = ""  # attention scores are multiplied by this number
    divisor_key: str = ""  # logits are divided by this number
    parallel_key: str = ""  # true: placement parallel2; false: pre
    own: bool = False  # of this project: config.json has our fields by our names, see own_config.py

    @property
    def classifier(self) -> str:
        """The same architecture with a head of labels."""
        name = re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", self.architecture)
        return name.replace("Gemma3For", "Gemma3TextFor")

    @property
    def implied(self) -> dict[str, Any]:
        """What the family implies for a recipe's model, whatever its sizes."""
        biases = {name: self.absent.get(name, False) if isinstance(key, str) else key for name, key in
                  self.biases.items()}  # fmt: skip
        return {**self.fixed, **biases, **self.defaults}

    def implied_by(self, n_layer: int, n_head: int, size: int, window: int) -> dict[str, Any]:
        """What it implies beside that for these sizes; ``size`` is head_dim, ``window`` the tokens of the window."""
        made: dict[str, Any] = {}
        if self.windows and self.windows.nested and window:
            made["window_layers"] = tuple(range(1, n_layer, 2))
        if self.windows and self.windows.every and window:
            made["window_layers"] = tuple(n for n in range(n_layer) if (n + 1) % self.windows.every)
        if self.no_rope_every:
            made["no_rope"] = tuple(range(self.no_rope_every - 1, n_layer, self.no_rope_every))
        if self.rope and self.rope.part and self.rope.part < 1 and n_head > 0:
            made["rotary_dim"] = max(2, 2 * round(self.rope.part * size / 2))
        return made


BIASES = ("qkv_bias", "out_bias", "mlp_bias", "norm_bias")

# What most architectures do not have; a family takes out what it has.
PLAIN: dict[str, Any] = {
    "placement": "pre",
    "qk_norm": "none",
    "fused_qkv": False,
    "qkv_by_head": False,
    "fused_mlp": False,
    "head_bias": False,
    "embed_scale": False,
    "embed_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "norm_weight": True,
    "attn_scale": 0.0,
    "attn_softcap": 0.0,
    "final_softcap": 0.0,
    "logit_scale": 0.0,
    "rope_local_theta": 0.0,
    "no_rope": (),
    "sinusoid": "pairs",
    "position_multiplier": 1.0,
    "embed_norm": False,
    "final_norm": True,
    "no_bias": (),
}
NO_WINDOW = {"window": 0}
IDLE = {"attention_dropout": 0.0}  # transformers' own, which training here replaces
OLD_BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|attention\.(bias|masked_bias))"


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """``values`` but these."""
    return {name: value for name, value in values.items() if name not in names}
