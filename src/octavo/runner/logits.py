"""How many rows of logits are made at a time."""

LOGITS_SLICE_BYTES = 64 << 20  # logits are made this much at a time, whatever the number of rows


def rows_per_slice(vocab_size: int) -> int:
    """Rows of logits (float32) that are made at a time."""
    return max(LOGITS_SLICE_BYTES // (4 * vocab_size), 1)
