"""A head that guesses on from a model's last hidden state, token by token.

One cell is applied again and again: from the state that gave a token and that token's embedding it makes the state that
is to give the next one (a recurrent drafter; Zhang et al., 2024, "Recurrent Drafter for Fast Speculative Decoding"):

    s' = s + down(silu(gate) * up)    with (gate, up) = from_state(norm(s)) + from_token(norm(embedding))

The first state is the model's own, after its final norm; the last words are the model's too: logits are rows of its
output matrix times the state. So a head is small, holds nothing of a sequence, and learns one thing: the next state.
"""

from __future__ import annotations

from typing import NamedTuple

from octavo.ops import Activation, Ops
from octavo.ops.protocol import Array, Weight

EPSILON = 1e-6  # of both norms


class DraftHead(NamedTuple):
    """Handles only. H: the model's hidden size, I: the cell's own, V: tokens that it can guess."""

    state_norm: Weight  # [H]
    token_norm: Weight  # [H]
    from_state: Weight  # [2 I, H]
    from_token: Weight  # [2 I, H]
    down: Weight  # [H, I]
    output: Weight  # [V, H]

    def next_state(self, ops: Ops, state: Array, embedding: Array) -> Array:
        """[R, H], [R, H] -> [R, H]"""
        of_state = ops.linear(ops.rms_norm(state, self.state_norm, EPSILON), self.from_state)
        x = ops.linear(ops.rms_norm(embedding, self.token_norm, EPSILON), self.from_token, of_state)
        return ops.linear(ops.gated(x, Activation.SILU), self.down, state)

    def logits(self, ops: Ops, state: Array) -> Array:
        """[R, H] -> [R, V]"""
        return ops.linear(state, self.output)
