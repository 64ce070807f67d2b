"""A training loop of one's own, in MLX: characters of Python's help, with dropout. Its twin is train_torch.py.

python examples/train_mlx.py
"""

from pydoc_data.topics import topics

from mlxgpt.api import cross_entropy, generate, new  # before MLX: on Linux it loads a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np

text = topics["assignment"]
letters = sorted(set(text))
ids = np.array([letters.index(letter) for letter in text])
config = {"family": "llama", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": len(letters)}
model = new(config, seed=1, dropout=0.1)
optimizer = mlx.optimizers.AdamW(3e-3, betas=[0.9, 0.99], weight_decay=0.1, bias_correction=True)
loss_and_gradients = nn.value_and_grad(model, lambda model, x, y: cross_entropy(model(x), y).mean())

draw, losses = np.random.default_rng(0), []
for step in range(1, 31):
    starts = draw.integers(len(ids) - 33, size=8)
    rows = np.stack([ids[start : start + 33] for start in starts])  # (8, 33)
    loss, gradients = loss_and_gradients(model, rows[:, :-1], mx.array(rows[:, 1:]))
    optimizer.update(model, gradients)
    mx.eval(model.parameters(), optimizer.state)
    losses.append(loss.item())
    if step % 10 == 0:
        print(f"step {step}: loss {losses[-1]:.4f}")

answer = generate(model, None, [int(token) for token in ids[:8]], max_tokens=24, temperature=0.5)
print("".join(letters[token] for token in answer.tokens))
