"""The loop that pretraining, SFT and the reward model share: steps, journal, checkpoints, resume."""

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

Part = tuple[Tensor, Mapping[str, float | Tensor]]  # of a step's loss, and of what the journal says of it


@dataclass(frozen=True)
class BestCheckpoint:
    """After which steps the weights are measured; those with the greatest value are kept at the end.

    `measure()` looks at the model in evaluation mode and must not draw from the global random numbers.
    """

    steps: frozenset[int]
    measure: Callable[[], float]


def train_loop(name: str, folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], *,
               steps: int, loss_of_step: Callable[[int], Iterable[Part]], columns: list[str],
               warmup: int = 0, max_grad_norm: float = 1.0, choice: BestCheckpoint | None = None) -> int:
    """Runs `steps` optimizer steps with a cosine learning rate, going on from a checkpoint where there is one.

    Returns the step whose weights the model has at the end: the last one, or that of the best `choice`. Raises
    TrainingFailed where a loss or a gradient is not finite; the weights are then those before that step.

    `loss_of_step(step)` gives the loss to minimise and further values for the journal (`columns`), in one part or in
    several that add up to the batch's: each is taken back through the model before the next is asked for. It must be a
    function of the step and the weights alone, so that a resumed run does what an uninterrupted one would. Where
    several processes train (rlhf/training/distributed.py), the parts of all of them add up.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.latest()
    start = 0
    best: dict[str, Any] = {}
    if found is not None:
        start, state = found
        best = state.get("best", {})
        distributed.load_weights(model, state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            distributed.load_optimizer(optimizer, saved)
        restore_rng(state["rng"])
    else:
        restore_rng(rng_state()[:1])  # the first process goes on as it is, the others get numbers of their own

    def state_now() -> dict[str, Any]:
        journal.sync()
        return {"model": distributed.full_state(model.state_dict()),
                "optimizers": [distributed.full_state(item.state_dict()) for item in optimizers],
                "rng": rng_state(), "best": best}

    journal = Journal(folder / "journal.csv", [f"{name}/loss", f"{name}/lr", f"{name}/grad_norm", *columns],
                      resume_after=start if found else None)
    with StageProgress(name, steps, done=start) as progress:
        for step in range(start, steps):
            factor = cosine_factor(step, steps, warmup)
            for optimizer in optimizers:
                scale_lr(optimizer, factor)
            sums: dict[str, Any] = {}
            for part, more in loss_of_step(step):
                distributed.backward(model, part)
                for key, value in {"": part.detach().double(), **more}.items():
                    sums[key] = sums.get(key, 0.0) + value
            # not read before: a GPU goes on with a part while the next one is put together
            values = distributed.all_reduce_gradients([model], {key: float(value) for key, value in sums.items()})
            loss = values.pop("")
            norm = distributed.clip_gradients(model, max_grad_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                checkpoints.save(step, state_now())
                raise TrainingFailed(f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; "
                                     f"saved as it was after step {step}; lower {name}.lr or look at the data")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            journal.append(step + 1, {f"{name}/loss": loss, f"{name}/lr": factor * optimizers[-1].defaults["lr"],
                                      f"{name}/grad_norm": norm, **values})
            progress.step({"loss": loss, **values})
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
    distributed.load_weights(model, best["model"])
    return int(best["step"])


def _copy(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: distributed.full_tensor(value).detach().clone() for name, value in model.state_dict().items()}
