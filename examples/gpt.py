"""A GPT on one page, in MLX; ``diff examples/gpt.py examples/gpt_torch.py`` shows how PyTorch says the same.

    python examples/gpt.py runs/first "Return a"     continues a text with a GPT-2 that `mlxgpt train` made
    python examples/gpt.py book.txt                  trains a small one on a text's characters, and lets it write

B rows of a batch, T tokens of a row, C numbers that stand for a token, H heads of D = C / H numbers each, V tokens in
the vocabulary. Architecture and names are GPT-2's (Radford et al. 2019); without dropout.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten


@dataclass
class Config:
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # C
    n_positions: int = 128  # the longest text that the model can look at, in tokens
    vocab_size: int = 256  # V


class Attention(nn.Module):
    """Each token gathers from itself and those before it: from each as much as its query fits that one's key."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def __call__(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).reshape(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # (B, H, T, D) each
        scores = q @ k.swapaxes(2, 3) / math.sqrt(C // self.n_head)  # (B, H, T, T)
        later = mx.arange(T)[:, None] < mx.arange(T)
        weights = mx.softmax(mx.where(later, -math.inf, scores), axis=-1)  # each row adds up to 1
        y = (weights @ v).swapaxes(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """What each token does with what it gathered, alone."""

    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def __call__(self, x):
        return self.c_proj(nn.gelu_approx(self.c_fc(x)))


class Block(nn.Module):
    """Both, each on a normed copy, each adding to the residual stream x."""

    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def __call__(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """tokens (B, T) -> logits (B, T, V): for every token, how likely each token is to come next."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(mx.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T  # the embedding is the head, too


def loss_of(model, tokens, targets):
    """-log p(target), the mean over all targets (B, T); what training makes small."""
    logits = model(tokens)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (mx.logsumexp(logits, axis=-1) - chosen).mean()


def train_step(model, state, tokens, targets, lr, beta1=0.9, beta2=0.99, eps=1e-8, decay=0.1):
    """One update by AdamW (Loshchilov and Hutter 2019); ``state``: name -> (m, v), and how many updates there were."""
    loss, grads = nn.value_and_grad(model, loss_of)(model, tokens, targets)
    weights, t = dict(tree_flatten(model.parameters())), state.get("t", 0) + 1
    for name, g in tree_flatten(grads):
        m, v = state.get(name, (0, 0))
        m = beta1 * m + (1 - beta1) * g  # where the gradient points on average
        v = beta2 * v + (1 - beta2) * g * g  # how large it is
        w = weights[name] * (1 - lr * decay) if g.ndim > 1 else weights[name]
        weights[name] = w - lr * (m / (1 - beta1**t)) / (mx.sqrt(v / (1 - beta2**t)) + eps)
        state[name] = m, v
    state["t"] = t
    model.update(tree_unflatten(list(weights.items())))
    mx.eval(model.parameters(), state)
    return loss.item()


def sample(model, tokens, count, temperature=0.8):
    """``tokens`` and ``count`` more, each drawn from what the model expects; temperature 0 takes the likeliest."""
    for _ in range(count):
        logits = model(mx.array([tokens[-model.config.n_positions :]]))[0, -1]
        drawn = mx.random.categorical(logits / temperature) if temperature else logits.argmax()
        tokens = [*tokens, drawn.item()]
    return tokens


def new(config):
    """A model before training: matrices drawn from N(0, 0.02^2), so that it expects every token alike."""
    model = GPT(config)
    model.update(tree_map(lambda w: mx.random.normal(w.shape) * 0.02 if w.ndim > 1 else w, model.parameters()))
    return model


def load(folder):
    """The model of a run or a model folder; GPT-2's files hold the matrices of linear layers as (in, out)."""
    folder = next(place for place in map(Path(folder).joinpath, ("best", "last", "")) if place.exists())
    said = json.loads((folder / "config.json").read_text())
    page = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    assert not (other := {name: said.get(name) for name in page if said.get(name) != page[name]}), (
        f"not this page: {other}"
    )
    model = GPT(Config(**{name: said[name] for name in Config.__dataclass_fields__}))
    weights = mx.load(str(folder / "model.safetensors"))
    model.load_weights([(name, w.T if name.startswith("h.") and w.ndim > 1 else w) for name, w in weights.items()])
    return model, folder


def main(path, prompt="\n", *, steps=500):
    if Path(path).is_dir():
        from tokenizers import Tokenizer

        model, folder = load(path)
        words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        print(words.decode(sample(model, words.encode(prompt).ids, 100)))
        return
    text = Path(path).read_text(encoding="utf-8")
    assert len(text) > 128, f"{path}: {len(text)} characters: expected more than 128, a row and what follows it"
    letters = sorted(set(text))
    data = mx.array([letters.index(c) for c in text])
    model, state = new(Config(vocab_size=len(letters))), {}
    for step in range(1, steps + 1):
        rows = data[mx.random.randint(0, len(data) - 128, (16, 1)) + mx.arange(129)]  # 16 places in the text
        loss = train_step(model, state, rows[:, :-1], rows[:, 1:], lr=1e-3 * min(1, step / 50))
        if step % 50 == 0:
            print(f"step {step}  loss {loss:.4f}")
    print("".join(letters[i] for i in sample(model, [letters.index(text[0])], 300)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
