"""What the fast passes share: a transformer's blocks, whether a pass may be replaced, rounded sizes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROUND_PARTS = 16



def replaceable(model: PreTrainedModel) -> bool:
    """Whether a pass does what its code says, once: no activations that are made anew backwards, nothing compiled."""
    name = "is_activation_checkpointing"  # older transformers have the other one, newer ones warn of it
    recomputes = model.training and getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing")
    return not recomputes and not compiled(model)


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """A transformer's blocks in their order; None where it has no such list."""
    return next((module for module in model.base_model.children() if isinstance(module, torch.nn.ModuleList)), None)


def compiled(model: PreTrainedModel) -> bool:
    """Whether the backbone goes through torch.compile, which would compile anew for every set of lengths."""
    return getattr(model.base_model, "_compiled_call_impl", None) is not None


def round_up(count: int) -> int:
    """A number of tokens rounded up to a multiple of a power of two, by at most a sixteenth."""
    return count + -count % (1 << max(1, count // ROUND_PARTS).bit_length() - 1)


@contextmanager
def last_mlp_at(model: PreTrainedModel, token_indices: Tensor) -> Iterator[None]:
    """Passes over ids [B, T] whose last hidden states are read at some places of the flattened ids only.

    Two thirds of a block's work are its MLP, and what the last one makes of other places nobody sees: there the hidden
    states lack it. Nothing changes for an architecture without `mlp` in its blocks.
    """
    blocks = blocks_of(model)
    mlp = getattr(blocks[-1], "mlp", None) if blocks and replaceable(model) else None
    if mlp is None:
        yield
        return
    whole = mlp.forward

    def at_places(state: Tensor) -> Tensor:
        flat = state.flatten(0, -2)
        found = whole(flat.index_select(0, token_indices))
        return torch.zeros_like(flat, dtype=found.dtype).index_copy(0, token_indices, found).view(state.shape)

    mlp.forward = at_places
    try:
        yield
    finally:
        del mlp.forward
