"""What a cache of keys and values holds: its bits and groups, its blocks, what a window keeps, and its bytes."""

from mlxgpt.common.errors import UserError
from mlxgpt.common.model_config import ModelConfig

BLOCK = 256  # tokens by which a cache grows
SLACK = 64  # tokens that a row may be cut back by, though its window has passed others
BITS = (8, 4)
GROUP_SIZES = (64, 32)  # values of a head that share a scale and a bias: the largest that divides head_dim


def group_size(head_dim: int, bits: int) -> int:
    """Values of a group, in a cache of so many bits; 0 where keys and values are held as they are.

    Raises:
        UserError: a number of bits that there is not, or a head_dim that no group divides.
    """
    if not bits:
        return 0
    if bits not in BITS:
        raise UserError(f"kv_bits = {bits}: expected 8 or 4, or 0 for a cache that is not quantized")
    found = next((size for size in GROUP_SIZES if head_dim % size == 0), 0)
    if not found:
        raise UserError(
            f"--kv-bits {bits}: no group of 32 or 64 divides the model's head_dim of {head_dim}: leave it out, "
            "and keys and values are held as they are"
        )
    return found


def kept(window: int) -> int:
    """Tokens that a layer with a window keeps when it lets go of others."""
    return window - 1 + SLACK


def size(config: ModelConfig, rows: int, tokens: int, itemsize: int, bits: int = 0) -> int:
    """Bytes of keys and values of ``rows`` texts of ``tokens`` tokens, drawn one by one; ``itemsize`` unquantized."""
    width = config.head_dim * itemsize
    if bits:
        width = config.head_dim * bits // 8 + 2 * itemsize * (config.head_dim // group_size(config.head_dim, bits))
    most = kept(config.window) + BLOCK if config.window else tokens
    held = [min(tokens, most) if layer in config.window_layers else tokens for layer in range(config.n_layer)]
    return 2 * config.n_kv_head * width * rows * sum(held)
