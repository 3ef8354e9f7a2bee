"""What the fast passes share: a transformer's blocks, whether a pass may be replaced, rounded sizes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROUND_PARTS = 16



def is_plain(model: PreTrainedModel) -> bool:
    """Whether a forward pass runs its modules once, as they are: no gradient checkpointing, no torch.compile."""
    name = "is_activation_checkpointing"  # older transformers have the other one, newer ones warn of it
    recomputes = model.training and getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing")
    return not recomputes and not is_compiled(model)


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """A transformer's blocks in their order; None where it has no such list."""
    return next((module for module in model.base_model.children() if isinstance(module, torch.nn.ModuleList)), None)


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether the backbone goes through torch.compile, which would compile for every new set of lengths."""
    return getattr(model.base_model, "_compiled_call_impl", None) is not None


def round_up(count: int) -> int:
    """A number of tokens rounded up to a multiple of a power of two, by at most a sixteenth."""
    return count + -count % (1 << max(1, count // ROUND_PARTS).bit_length() - 1)


@contextmanager
def last_mlp_at(model: PreTrainedModel, token_indices: Tensor) -> Iterator[None]:
    """Forward passes over ids [B, T] whose last block computes its MLP only at some indices of the flattened ids.

    An MLP is two thirds of a block's work, and nothing reads what the last one computes for other tokens: their hidden
    states lack it. Architectures without `mlp` in their blocks compute all.
    """
    blocks = blocks_of(model)
    mlp = getattr(blocks[-1], "mlp", None) if blocks and is_plain(model) else None
    if mlp is None:
        yield
        return
    full_forward = mlp.forward

    def forward(state: Tensor) -> Tensor:
        flat = state.flatten(0, -2)
        computed = full_forward(flat.index_select(0, token_indices))
        return torch.zeros_like(flat, dtype=computed.dtype).index_copy(0, token_indices, computed).view(state.shape)

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward
