"""Foreign formats and proof."""
