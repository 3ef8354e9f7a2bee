"""The loop that pretraining, SFT and the reward model share: steps, journal, checkpoints, resume."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.checkpoint import Checkpoints
from rlhf.journal import Journal
from rlhf.models import cosine_factor, scale_lr
from rlhf.progress import StageProgress
from rlhf.seeding import restore_rng, rng_state


def train_loop(name: str, folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], *,
               steps: int, loss_of_step: Callable[[int], tuple[Tensor, Mapping[str, float]]], columns: list[str],
               warmup: int = 0, max_grad_norm: float = 1.0) -> None:
    """Runs `steps` optimizer steps with a cosine learning rate, going on from a checkpoint where there is one.

    `loss_of_step(step)` returns the loss to minimise and further values for the journal (`columns`). It must be
    a function of the step and the weights alone, so that a resumed run does what an uninterrupted one would.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.latest()
    start = 0
    if found is not None:
        start, state = found
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        restore_rng(state["rng"])

    def state_now() -> dict[str, Any]:
        journal.sync()
        return {"model": model.state_dict(), "optimizers": [item.state_dict() for item in optimizers],
                "rng": rng_state()}

    journal = Journal(folder / "journal.csv", [f"{name}/loss", f"{name}/lr", f"{name}/grad_norm", *columns],
                      resume_after=start if found else None)
    with StageProgress(name, steps, done=start) as progress:
        for step in range(start, steps):
            factor = cosine_factor(step, steps, warmup)
            for optimizer in optimizers:
                scale_lr(optimizer, factor)
            loss, values = loss_of_step(step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            journal.append(step + 1, {f"{name}/loss": loss.item(), f"{name}/lr": factor * optimizers[-1].defaults["lr"],
                                      f"{name}/grad_norm": norm.item(), **values})
            progress.step({"loss": loss.item(), **values})
            checkpoints.after_step(step + 1, state_now)
    journal.close()
