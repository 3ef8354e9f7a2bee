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
from rlhf.training.parts import Saved
from rlhf.training.progress import StageProgress
from rlhf.training.seeding import restore_rng, rng_state
from rlhf.training.state import State, Tensors, weights

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


@dataclass(frozen=True)
class Best:
    """The best weights so far: their value, their step, this process's parts of them."""

    value: float
    step: int
    weights: Tensors


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
    with Checkpoints(folder / "checkpoints") as checkpoints:
        saved = checkpoints.latest()
        start = saved.step if saved else 0
        best = _resume(saved, model, optimizers)
        journal = Journal(folder / "journal.csv", [f"{name}/loss", f"{name}/lr", f"{name}/grad_norm", *columns],
                          start if saved else None, validation.columns if validation else ())

        def state_now() -> State:
            journal.sync()
            return _state(model, optimizers, best)

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
                    best = _better(best, validation.best(found), step + 1, model) if validation.best else None
                journal.append(step + 1, {f"{name}/loss": loss, f"{name}/lr": factor * optimizers[-1].defaults["lr"],
                                          f"{name}/grad_norm": norm, **values, **found})
                progress.step({"loss": loss, **values, **found})
                checkpoints.after_step(step + 1, state_now)
        journal.close()
    if best is None:
        return steps
    with torch.no_grad():
        for key, value in weights(model).items():
            value.copy_(best.weights[key])
    return best.step


def _better(best: Best | None, value: float, step: int, model: PreTrainedModel) -> Best:
    """The best weights after a step whose weights have this value."""
    return best if best and value <= best.value else Best(value, step, _copy(weights(model)))


def _state(model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], best: Best | None) -> State:
    state = State({"rng": rng_state(), "best": {"value": best.value, "step": best.step} if best else None})
    state.add("model", weights(model))
    for number, optimizer in enumerate(optimizers):
        state.add_optimizer(f"optimizer {number}", optimizer)
    state.add("best", best.weights if best else {})
    return state


def _resume(saved: Saved | None, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]) -> Best | None:
    """Restores what `_state` took, and returns the best weights so far; the generators alone where nothing is saved."""
    if saved is None:
        restore_rng(rng_state()[:1])  # the main process keeps its state, the others seed their own
        return None
    saved.read("model", weights(model))
    for number, optimizer in enumerate(optimizers):
        saved.read_optimizer(f"optimizer {number}", optimizer)
    best = saved.values["best"]
    found = Best(best["value"], best["step"], saved.read("best", _copy(weights(model)))) if best else None
    restore_rng(saved.values["rng"])
    return found


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


def _copy(tensors: Tensors) -> Tensors:
    return {name: value.clone() for name, value in tensors.items()}
