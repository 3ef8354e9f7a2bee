"""The training loop of pretraining, SFT and the reward model: steps, journal, checkpoints, resume."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import TrainingFailed
from rlhf.training import distributed
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.journal import Journal
from rlhf.training.optim import cosine_factor, scale_lr
from rlhf.training.progress import StageProgress
from rlhf.training.seeding import restore_rng, rng_state

Part = tuple[Tensor, Mapping[str, float | Tensor]]  # a part of a step's loss and of its journal values


@dataclass(frozen=True)
class Validation:
    """After each of `steps` the model is measured on held-out rows; the journal gets the values of `columns`.

    `measure()` evaluates the model, which is in evaluation mode, and must not draw from the global random generators.
    `best(values)`: the weights where it is highest become the result; without it, the last ones do.
    """

    steps: frozenset[int]
    columns: Sequence[str]
    measure: Callable[[], Mapping[str, float]]
    best: Callable[[Mapping[str, float]], float] | None = None


def train_loop(name: str, folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], *,
               steps: int, loss_of_step: Callable[[int], Iterable[Part]], columns: list[str],
               warmup: int = 0, max_grad_norm: float = 1.0, validation: Validation | None = None) -> int:
    """Runs `steps` optimizer steps with a cosine learning rate; resumes from the newest checkpoint if there is one.

    Returns the step whose weights the model has at the end: the last one, or that of the best checkpoint. Raises
    TrainingFailed if a loss or a gradient is not finite; the weights are then those before that step.

    `loss_of_step(step)` gives the loss to minimise and further journal values (`columns`), in one part or in several
    (micro-batches) that add up to the batch: the backward pass of each runs before the next is computed. It must depend
    only on the step and the weights, so that a resumed run repeats an uninterrupted one. The parts of all processes
    (rlhf/training/distributed.py) add up.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoint = checkpoints.latest()
    start = 0
    best: dict[str, Any] = {}
    if checkpoint is not None:
        start, state = checkpoint
        best = state.get("best", {})
        distributed.load_weights(model, state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            distributed.load_optimizer(optimizer, saved)
        restore_rng(state["rng"])
    else:
        restore_rng(rng_state()[:1])  # the main process keeps its state, the others seed their own

    def state_now() -> dict[str, Any]:
        journal.sync()
        return {"model": distributed.trained_weights(model),
                "optimizers": [distributed.full_state(item.state_dict()) for item in optimizers],
                "rng": rng_state(), "best": best}

    journal = Journal(folder / "journal.csv", [f"{name}/loss", f"{name}/lr", f"{name}/grad_norm", *columns],
                      start if checkpoint else None, validation.columns if validation else ())
    with StageProgress(name, steps, done=start) as progress:
        for step in range(start, steps):
            factor = cosine_factor(step, steps, warmup)
            for optimizer in optimizers:
                scale_lr(optimizer, factor)
            values = distributed.all_reduce_gradients([model], _backward(model, loss_of_step(step)))
            loss = values.pop("")
            norm = distributed.clip_gradients(model, max_grad_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                checkpoints.save(step, state_now())
                raise TrainingFailed(f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; "
                                     f"the state after step {step} is saved; lower {name}.lr or check the data")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            found: Mapping[str, float] = {}
            if validation is not None and step + 1 in validation.steps:
                model.eval()
                found = validation.measure()
                model.train()
                if validation.best and (not best or validation.best(found) > best["value"]):
                    best = {"value": validation.best(found), "step": step + 1, "model": _copy(model)}
            journal.append(step + 1, {f"{name}/loss": loss, f"{name}/lr": factor * optimizers[-1].defaults["lr"],
                                      f"{name}/grad_norm": norm, **values, **found})
            progress.step({"loss": loss, **values, **found})
            checkpoints.after_step(step + 1, state_now)
    journal.close()
    if not best:
        return steps
    distributed.load_weights(model, best["model"])
    return int(best["step"])


def evenly(steps: int, times: int) -> frozenset[int]:
    """`times` of the steps 1 to `steps`, equally far apart, the last one among them; all of them where there are fewer.
    """
    return frozenset(max(1, steps * (number + 1) // times) for number in range(times)) if steps else frozenset()


def _backward(model: PreTrainedModel, parts: Iterable[Part]) -> dict[str, float]:
    """Backward passes of a step's parts; returns the sums of their losses (key "") and of their journal values."""
    sums: dict[str, Any] = {}
    for part, more in parts:
        distributed.backward(model, part)
        for key, value in {"": part.detach().double(), **more}.items():
            sums[key] = sums.get(key, 0.0) + value
    # read only now: a GPU still computes one part while the next is prepared
    return {key: float(value) for key, value in sums.items()}


def _copy(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in distributed.trained_weights(model).items()}
