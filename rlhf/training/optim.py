"""Optimizers and learning-rate schedules."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.training.hardware import has_bf16

_IN_BF16 = torch.optim._muon._zeropower_via_newtonschulz

def adamw(model: PreTrainedModel, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
          weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW; weight decay applies to matrices only."""
    matrices = [item for item in model.parameters() if item.requires_grad and item.dim() >= 2]
    vectors = [item for item in model.parameters() if item.requires_grad and item.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def muon_and_adamw(model: PreTrainedModel, lr: float, muon_lr: float,
                   weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' weight matrices, AdamW for embeddings, heads, norms and biases.

    Muon orthogonalises each update; a small model trained from scratch then needs less than half the steps
    (docs/notebook.md has the figures).
    """
    heads = [model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None)]
    embeddings = {id(head.weight) for head in heads if head is not None}
    embeddings |= {id(item) for name, item in model.named_parameters() if "wpe" in name}
    matrices = [item for item in model.parameters() if item.dim() == 2 and id(item) not in embeddings]
    with_muon = {id(item) for item in matrices}
    # torch's is in bfloat16 whatever the machine
    torch.optim._muon._zeropower_via_newtonschulz = _IN_BF16 if has_bf16() else orthogonalised
    rest = [item for item in model.parameters() if id(item) not in with_muon]
    return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def orthogonalised(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """The matrix with its singular values brought near 1 by Newton-Schulz steps, in its own precision.

    A step is x -> a x + (b G + c G^2) x with G = x x^T [Muon: Jordan et al., 2024].
    """
    a, b, c = ns_coefficients
    wide = grad if grad.shape[0] <= grad.shape[1] else grad.T
    x = wide / wide.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is grad else x.T


def cosine_factor(step: int, total: int, warmup: int = 0, floor: float = 0.1) -> float:
    """Share of the peak learning rate at step 0 .. total-1: linear warm-up, then cosine decay to `floor`.

    [InstructGPT App. C: cosine to 10 %, no warm-up].
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def scale_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `factor` times the optimizer's initial one."""
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * factor
