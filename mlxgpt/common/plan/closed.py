"""Memory of a training step by a formula, for devices that are not here; docs/planning.md derives it.

A step holds weights, moments and, at one of three moments, the most besides them: what all blocks and the head keep
(the end of the forward pass), the last of it with all gradients (the end of the backward pass), or gradients and what
the update makes. Counted are arrays that a gradient reads, as the models' code makes them, in each framework.
Sizes: N tokens of a micro-batch, T of a row, C n_embd, H and K heads, D head_dim, F n_hidden, V vocab_size.
"""

from typing import NamedTuple

from mlxgpt.common.config import Recipe
from mlxgpt.common.model import adapters, params, rotary
from mlxgpt.common.model.params import Param
from mlxgpt.common.plan.memory import Footprint, Piece

SCORES = 1 << 25  # attention scores that exist at once in training on a GPU, in MLX: mlxgpt/fast.py
# of what a block keeps, made on the way of its gradient or not yet freed, by activation: MLX computes ahead
LATE = {"silu": 2.2, "gelu": 1.3, "gelu_tanh": 1.3, "relu": 1.3, "relu2": 1.3}
LATER = 1.1  # more of it where blocks are computed again
SCORES_LATE = 0.6  # the same of attention scores that exist as a whole
TRAILING = 1.2  # of what a block keeps: not yet freed when the head's gradient is made
UPDATE = 1.8  # of the gradients: scaled ones, and what the update has not yet freed
MANY = 1 << 14  # elements from which MLX on a CPU computes attention in tiles, the same


class Sizes(NamedTuple):
    """What the counts are made of."""

    recipe: Recipe
    rows: int
    length: int
    mlx: bool
    gpu: bool
    trains: dict[str, Param]
    adapted: frozenset[str]

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return 2 if self.recipe.train.compute_dtype == "bfloat16" else 4


def footprint(
    recipe: Recipe, rows: int, length: int, micro_batches: int = 1, backend: str = "mlx", gpu: bool = False
) -> Footprint:
    """Of a step on ``micro_batches`` of ``rows`` rows, or pairs, of ``length`` tokens: mlx or torch, CPU or GPU."""
    trains = adapters.trainable(recipe)
    adapted = adapters.targets(recipe.model, recipe.adapter) if recipe.adapter else {}
    s = Sizes(recipe, rows * recipe.together, length, backend == "mlx", gpu, trains, frozenset(adapted))
    weights, gradients = held(s), 4 * elements(trains)
    moments = 2 * gradients - sum(4 * elements({name: param}) for name, param in trains.items() if muon(s, name, param))
    again, blocks = recipe.train.checkpoint_activations, recipe.model.n_layer - first(s)
    block, works = kept(s), working(s)
    entry = s.tokens * recipe.model.n_embd * s.item
    layers = entry * blocks if again else block * blocks
    logits, head, head_gradient = heads(s)
    earlier = gradients if micro_batches > 1 else 0
    last = (block if again else 0) + works
    trailing = int(TRAILING * (block - attention(s))) if s.mlx else 0
    phases = (
        {"activations": layers + head + trailing + outside(s), "logits": logits, "gradients": earlier + head_gradient},
        {"activations": layers + last + outside(s), "gradients": earlier + head_gradient},
        {"activations": block + works + outside(s), "gradients": gradients + (largest(s) if earlier else 0)},
        {"gradients": gradients + update(s) + (earlier if s.mlx else 0)},
    )
    most = max(phases, key=lambda phase: sum(phase.values()))
    found = {"weights": weights, "moments": moments, **most}
    return Footprint(sum(found.values()), [Piece(label, (), size) for label, size in found.items() if size])


def elements(table: dict[str, Param]) -> int:
    """Numbers in all tensors of a table."""
    return sum(size(param.shape) for param in table.values())


def size(shape: tuple[int, ...]) -> int:
    """Numbers in a tensor."""
    made = 1
    for n in shape:
        made *= n
    return made


def muon(s: Sizes, name: str, param: Param) -> bool:
    """Whether Muon, with one moment, updates the tensor."""
    return s.recipe.optim.name == "muon" and name.startswith("h.") and len(param.shape) == 2


def held(s: Sizes) -> int:
    """Weights: in float32, or words, scales and biases of a base that stays quantized; and tables of positions."""
    model, adapter, made = s.recipe.model, s.recipe.adapter, 0
    stays = adapter and adapter.bits and (s.gpu or adapter.dequantize == "never")
    for name, param in params.table(model).items():
        number = size(param.shape)
        whole = len(param.shape) == 2 and not param.shape[1] % adapter.group_size if adapter else False
        if adapter and stays and whole and param.adaptable and name not in s.trains:
            made += number * adapter.bits // 8 + 2 * 4 * (number // adapter.group_size)
        else:
            made += 4 * number
    made += 4 * sum(size(param.shape) for name, param in s.trains.items() if name not in params.table(model))
    sinusoids = 4 * model.block_size * model.n_embd if model.position == "sinusoidal" else 0
    return made + rotary.table_bytes(model) + sinusoids


def first(s: Sizes) -> int:
    """The first block that keeps anything: below the lowest that trains no gradient goes."""
    if not s.recipe.adapter or any(not name.startswith("h.") and name.startswith("w") for name in s.trains):
        return 0
    return min((int(name.split(".")[1]) for name in s.trains if name.startswith("h.")), default=s.recipe.model.n_layer)


def reads(s: Sizes, *kinds: str) -> bool:
    """Whether a gradient needs the input of one of these matrices of a block."""
    end = f"h.{s.recipe.model.n_layer - 1}."
    paths = [end + kind for kind in kinds]
    return any(path in s.adapted or f"{path}.weight" in s.trains for path in paths)


def kept(s: Sizes) -> int:
    """Bytes that a block keeps for its gradient."""
    model, wide, drop = s.recipe.model, 4, s.recipe.train.dropout > 0
    c, f = model.n_embd, model.n_hidden
    q, kv = model.n_head * model.head_dim, model.n_kv_head * model.head_dim
    low, norms = s.item < 4, {"parallel": 1, "sandwich": 4}.get(model.placement, 2)
    trained = any(name.startswith("h.") and ".ln_" in name for name in s.trains)
    qkv, up = ("attn.c_attn", "attn.q_proj", "attn.k_proj", "attn.v_proj"), ("mlp.c_fc", "mlp.c_gate", "mlp.c_gate_fc")
    # a norm's input, in torch for RMSNorm also its output before the weight, where that trains
    inputs = c * (wide if low and not s.mlx and model.norm != "layer" else s.item)
    made = norms * inputs
    if model.norm == "rms" and not s.mlx and trained:
        made += norms * c * s.item
    if model.placement != "post":
        made += c * s.item * (reads(s, *qkv) + (reads(s, *up) and model.placement != "parallel"))
    made += q * s.item * reads(s, "attn.c_proj") + f * s.item * reads(s, "mlp.c_proj")
    heads, rope = (q + 2 * kv) * s.item, model.position == "rope"
    made += heads + (q + kv) * s.item * (model.fused_qkv and rope and not s.mlx)
    if model.qk_norm != "none":
        made += (q + kv) * s.item * (1 if s.mlx or model.norm != "rms" or not trained else 2)
    made += f * s.item * hidden(s)
    if s.mlx and not s.gpu:  # norms spelled out: the input centered, and normalized; attention's output once more
        made += norms * c * s.item * (2 if model.norm == "layer" else 1) + q * s.item
    if drop:
        made += 2 * c
    if low and reads(s, *qkv, *up):  # bfloat16 copies of the matrices
        per = sum(size(param.shape) for name, param in params.table(model).items() if name.startswith("h.0."))
        return s.tokens * made + attention(s) + 2 * per
    return s.tokens * made + attention(s)


def hidden(s: Sizes) -> int:
    """Arrays of the MLP's width that a block keeps besides the input of c_proj."""
    model, fused = s.recipe.model, s.mlx and not s.gpu and s.item == 4
    if not s.mlx and model.activation in ("relu", "relu2"):  # kept is what it gives: of ReLU alone c_proj's input
        return (model.activation == "relu2") + (2 if model.gated else 0)
    if not s.mlx:  # one kernel, which keeps its input
        return 3 if model.gated else 1
    if model.activation == "silu":
        return 2 if fused else 4
    return {"gelu_tanh": 5, "gelu": 3, "relu": 1, "relu2": 2}[model.activation] + (2 if model.gated else 0)


def attention(s: Sizes) -> int:
    """Bytes of scores that a block keeps: none with fused or tiled attention, which keeps a number a query and head."""
    model, drop = s.recipe.model, s.recipe.train.dropout > 0
    scores = s.tokens * model.n_head * s.length
    plain = drop or model.attn_softcap > 0
    if s.mlx and s.gpu:
        whole = scores <= SCORES
    elif s.mlx:
        q = s.tokens * model.n_head * model.head_dim
        whole = plain or s.item < 4 or s.length * s.length < MANY or q < MANY
    else:
        whole = bool(plain)
    if not whole:
        return 4 * s.tokens * model.n_head
    soft = s.item if s.mlx else 4  # PyTorch's softmax is kept in float32
    return scores * (soft + s.item * (bool(model.attn_softcap) + drop) + drop)


def working(s: Sizes) -> int:
    """Bytes that the gradient of a block makes on its way; in MLX those too that wait to be freed."""
    model = s.recipe.model
    if s.mlx:
        late = LATE[model.activation] + (
            LATER * (1 - 1 / model.n_layer) if s.recipe.train.checkpoint_activations else 0
        )
        tiles = 3 * 4 * SCORES // 2 if s.gpu and s.tokens * model.n_head * s.length > SCORES else 0
        return tiles + int(late * (kept(s) - attention(s)) + SCORES_LATE * attention(s))
    wide = max(model.n_hidden * (2 if model.gated else 1), model.n_embd, model.n_head * model.head_dim)
    scores = attention(s) if attention(s) > 8 * s.tokens * model.n_head else 0
    if scores and s.item == 2 and s.recipe.train.dropout:
        scores = 2 * scores  # random bits and what they are compared to are no narrower
    return 2 * s.tokens * wide * s.item + scores


def outside(s: Sizes) -> int:
    """Bytes kept outside of the blocks: the embedding, the last norm's input and output, a mask with ALiBi."""
    model = s.recipe.model
    made = 3 * s.tokens * model.n_embd * s.item
    if model.embed_norm:
        made += s.tokens * model.n_embd * s.item
    flex = s.gpu and not s.recipe.train.checkpoint_activations
    if model.position == "alibi" and not s.mlx and not flex:  # in pieces in MLX
        made += 2 * model.n_head * s.length * s.length * s.item
    return made


def heads(s: Sizes) -> tuple[int, int, int]:
    """Bytes of logits, of the head's other arrays, and of its weight's gradient at the head."""
    model, train = s.recipe.model, s.recipe.train
    name = "wte.weight" if model.tied else "lm_head.weight"
    trains = name in s.trains
    gradient = 4 * model.vocab_size * model.n_embd if trains else 0
    if model.labels:
        return 4 * s.tokens * len(model.labels), 0, 0
    chunk = train.head_chunk(s.tokens, model.vocab_size, s.gpu)
    if not chunk:
        return 3 * 4 * s.tokens * model.vocab_size, 0, gradient
    keeps = trains and not train.checkpoint_activations
    now = (2 if s.mlx else 1) + (2 if model.final_softcap else 0)
    logits = 4 * s.tokens * (now * chunk + (model.vocab_size if keeps else 0))
    return logits, 4 * 2 * s.tokens * model.n_embd, gradient


def largest(s: Sizes) -> int:
    """Bytes of the largest tensor that trains."""
    return 4 * max((size(param.shape) for param in s.trains.values()), default=0)


def update(s: Sizes) -> int:
    """Bytes that the update makes besides the gradients: in MLX scaled gradients, and new tensors beside the old."""
    return largest(s) + (int(UPDATE * 4 * elements(s.trains)) if s.mlx else 0)
