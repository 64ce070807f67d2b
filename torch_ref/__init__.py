"""The PyTorch half of mlxgpt: the same files, classes and lines as the MLX half, and nothing else."""
