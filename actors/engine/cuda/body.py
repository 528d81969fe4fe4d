"""From tokens to logits: embedding, fused layers, the last norm, the output head, and nothing between them.

A model's own forward does more for each step: masks that our attention does not read, outputs that nobody collects, the
norm of rows that nobody samples from. Before the first layer is launched that takes a host a millisecond, in which the
GPU has nothing to do.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from actors.engine.cuda.angles import Angles, tabulate
from actors.engine.cuda.decoder import Unsummed
from actors.engine.cuda.trial import Trial, attempt

# Steps that are tried: how many rows they have, and which of these are kept.
_TRIED: tuple[tuple[int, list[int] | None], ...] = ((5, [1, 3]), (5, [0, 1, 2, 3, 4]), (5, None), (1, [0]))


class Output(NamedTuple):
    """What is read of what a model gives: logits ``[1, rows, vocabulary]``."""

    logits: torch.Tensor


class _Body:
    """The forward of a causal language model whose last layer gives an ``Unsummed``."""

    def __init__(self, module: Any, positions: int, trial: Trial) -> None:
        body = module.get_decoder()
        self.embed, self.layers, self.norm, self.head = body.embed_tokens, body.layers, body.norm, module.lm_head
        self.angles = tabulate(body.rotary_emb, positions, trial) or body.rotary_emb

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_to_keep: torch.Tensor | int = 0, **_: Any
    ) -> Output:
        """Of tokens ``[1, T]``, integers; ``logits_to_keep`` are rows in ascending order, or 0: all that are left."""
        hidden = self.embed(input_ids)
        arguments = {
            "attention_mask": None, "position_ids": position_ids, "past_key_values": None, "use_cache": False,
            "position_embeddings": self.angles(hidden, position_ids),
        }  # fmt: skip
        for layer in self.layers:
            hidden = layer(hidden, **arguments)
        x, delta = hidden.x, hidden.delta
        # As many rows as there are, are all of them.
        if isinstance(logits_to_keep, torch.Tensor) and x.shape[1] != len(logits_to_keep):
            x, delta = (part.index_select(1, logits_to_keep) for part in (x, delta))
        return Output(self.head(self.norm(Unsummed(x, delta))))


def fuse_body(trial: Trial, positions: int) -> tuple[bool, bool]:
    """Let the model's forward be a ``_Body``, if that gives the same logits. Layers are fused before.

    The forward is for a step then: it does not read any other arguments than ``_Body`` does, and positions are below
    ``positions``. Whether it is, and whether its angles come from a table.
    """
    module: Any = trial.model.module
    found = attempt(lambda: _Body(module, positions, trial))
    if found is None:
        return False, False
    vocabulary, device = trial.model.summary.vocab_size, trial.device
    with trial.recorded():
        for rows, kept in _TRIED:
            step = {
                "input_ids": trial.integers(vocabulary, rows),
                "position_ids": trial.integers(positions, rows),
                "use_cache": False,
                "logits_to_keep": 0 if kept is None else torch.tensor(kept, dtype=torch.int32, device=device),
            }
            own, output = (attempt(partial(forward, **step)) for forward in (module.forward, found))
            if own is None or output is None or not torch.equal(own.logits, output.logits):
                return False, False
    module.forward = found
    return True, isinstance(found.angles, Angles)
