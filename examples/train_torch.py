"""A training loop of one's own, in PyTorch: characters of Python's help, with dropout. Its twin is train_mlx.py.

python examples/train_torch.py
"""

from pydoc_data.topics import topics

import numpy as np
import torch

from torch_ref.api import cross_entropy, generate, new

text = topics["assignment"]
letters = sorted(set(text))
ids = np.array([letters.index(letter) for letter in text])
config = {"family": "llama", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": len(letters)}
model = new(config, seed=1, dropout=0.1)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=0.1)

draw, losses = np.random.default_rng(0), []
for step in range(1, 31):
    starts = draw.integers(len(ids) - 33, size=8)
    rows = np.stack([ids[start : start + 33] for start in starts])  # (8, 33)
    loss = cross_entropy(model(rows[:, :-1]), torch.from_numpy(rows[:, 1:]).to(model.device)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 10 == 0:
        print(f"step {step}: loss {losses[-1]:.4f}")

answer = generate(model, None, [int(token) for token in ids[:8]], max_tokens=24, temperature=0.5)
print("".join(letters[token] for token in answer.tokens))
