"""The loop that pretraining, SFT and the reward model share: steps, journal, checkpoints, resume."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.checkpoint import Checkpoints
from rlhf.errors import TrainingFailed
from rlhf.journal import Journal
from rlhf.models import cosine_factor, scale_lr
from rlhf.progress import StageProgress
from rlhf.seeding import restore_rng, rng_state


@dataclass(frozen=True)
class Choice:
    """After which steps the weights are measured; those with the greatest value are kept at the end.

    `measure()` looks at the model in evaluation mode and must not draw from the global random numbers.
    """

    steps: frozenset[int]
    measure: Callable[[], float]


def train_loop(name: str, folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], *,
               steps: int, loss_of_step: Callable[[int], tuple[Tensor, Mapping[str, float]]], columns: list[str],
               warmup: int = 0, max_grad_norm: float = 1.0, choice: Choice | None = None) -> int:
    """Runs `steps` optimizer steps with a cosine learning rate, going on from a checkpoint where there is one.

    Returns the step whose weights the model has at the end: the last one, or that of the best `choice`. Raises
    TrainingFailed where a loss or a gradient is not finite; the weights are then those before that step.

    `loss_of_step(step)` returns the loss to minimise and further values for the journal (`columns`). It must be
    a function of the step and the weights alone, so that a resumed run does what an uninterrupted one would.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.latest()
    start = 0
    best: dict[str, Any] = {}
    if found is not None:
        start, state = found
        best = state.get("best", {})
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        restore_rng(state["rng"])

    def state_now() -> dict[str, Any]:
        journal.sync()
        return {"model": model.state_dict(), "optimizers": [item.state_dict() for item in optimizers],
                "rng": rng_state(), "best": best}

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
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                checkpoints.save(step, state_now())
                raise TrainingFailed(f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}: not finite; "
                                     f"saved as it was after step {step}; lower {name}.lr or look at the data")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            journal.append(step + 1, {f"{name}/loss": loss.item(), f"{name}/lr": factor * optimizers[-1].defaults["lr"],
                                      f"{name}/grad_norm": norm.item(), **values})
            progress.step({"loss": loss.item(), **values})
            if choice is not None and step + 1 in choice.steps:
                model.eval()
                value = choice.measure()
                model.train()
                if not best or value > best["value"]:
                    best = {"value": value, "step": step + 1, "model": _copy(model)}
            checkpoints.after_step(step + 1, state_now)
    journal.close()
    if not best:
        return steps
    model.load_state_dict(best["model"])
    return int(best["step"])


def _copy(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
