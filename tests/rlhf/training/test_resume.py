"""Journal and resume: a run stopped anywhere and resumed ends with the same bytes as one never stopped."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import Interrupted
from rlhf.model.load import set_dropout
from rlhf.params import PpoParams
from rlhf.ppo.run import train_ppo
from rlhf.pretrain import corpus_batch, lm_loss
from rlhf.training.checkpoint import Checkpoints, StopSignal
from rlhf.training.journal import Journal, read_journal
from rlhf.training.loop import Part, Validation, evenly, train_loop
from rlhf.training.optim import adamw, muon_and_adamw

STEPS = 7
ROWS = torch.randint(5, 300, (12, 16), generator=torch.Generator().manual_seed(1)).tolist()


class Killed(Exception):
    """Stands for a process that is killed."""


Hook = Callable[[int], None]


def no_hook(step: int) -> None:
    pass


@pytest.fixture
def train(make_policy: Callable[..., Any], architecture: str) -> Callable[..., dict[str, bytes]]:
    """train(folder, hook): trains a fresh tiny model with dropout; hook(step) runs before a step's loss."""
    def run(folder: Path, hook: Hook = no_hook, validated: bool = True) -> dict[str, bytes]:
        model = make_policy(architecture).train()
        set_dropout(model, 0.1 if architecture in ("gpt_neox", "gpt2") else 0.0)
        torch.manual_seed(42)
        optimizers = muon_and_adamw(model, 1e-2, 0.02, 0.01) if architecture == "gpt_neox" else [adamw(model, 1e-2)]

        def loss_of_step(step: int) -> list[Part]:
            hook(step)
            return [(lm_loss(model, corpus_batch(ROWS, 4, step, 3), "fp32"), {"toy/step": step})]

        def measure() -> dict[str, float]:
            assert not model.training
            with torch.no_grad():
                return {"toy/valid_loss": float(lm_loss(model, torch.tensor(ROWS[:4]), "fp32"))}

        validation = Validation(frozenset({2, 5, STEPS}), ["toy/valid_loss"], measure) if validated else None
        train_loop("toy", folder, model, optimizers, steps=STEPS, loss_of_step=loss_of_step, columns=["toy/step"],
                   warmup=2, validation=validation)
        model.save_pretrained(folder / "model")
        return result(folder)
    return run


def result(folder: Path) -> dict[str, bytes]:
    return {"model": (folder / "model" / "model.safetensors").read_bytes(),
            "journal": (folder / "journal.csv").read_bytes()}


def once(place: int, action: Callable[[], object]) -> Hook:
    """Runs `action` the first time that `place` is reached."""
    done: list[int] = []

    def hook(step: int) -> None:
        if step == place and not done:
            done.append(step)
            action()
    return hook


def kill() -> None:
    raise Killed


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def until_finished(run: Callable[[], dict[str, bytes]], tries: int = 10) -> tuple[dict[str, bytes], int]:
    """(result, how often it was stopped) of a run that is started again whenever it was stopped."""
    for stops in range(tries):
        try:
            return run(), stops
        except (Killed, Interrupted):
            StopSignal.requested = False
    raise AssertionError("never finished")


@pytest.mark.usefixtures("save_every_step")
@pytest.mark.parametrize(("place", "stop"), [(0, kill), (1, kill), (4, kill), (0, ask_to_stop), (3, ask_to_stop),
                                             (STEPS - 1, ask_to_stop)])
def test_a_stopped_training_ends_with_the_same_bytes(train: Callable[..., dict[str, bytes]], tmp_path: Path,
                                                     place: int, stop: Callable[[], None]) -> None:
    whole = train(tmp_path / "whole")
    seen: list[int] = []
    interrupt = once(place, stop)

    def hook(step: int) -> None:
        seen.append(step)
        interrupt(step)

    resumed, stops = until_finished(lambda: train(tmp_path / "stopped", hook))
    assert stops == 1
    assert resumed == whole
    # no step runs twice, except the one that a kill interrupts
    assert seen == [*range(place + 1), *range(place + (stop is ask_to_stop), STEPS)]


def test_without_a_checkpoint_a_run_starts_over(train: Callable[..., dict[str, bytes]], tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")  # 30 seconds between checkpoints: there is none
    assert not (tmp_path / "whole" / "checkpoints").exists()
    hook = once(4, kill)
    resumed, stops = until_finished(lambda: train(tmp_path / "stopped", hook))
    assert (resumed, stops) == (whole, 1)


def test_sigterm_saves_even_if_no_checkpoint_is_due(train: Callable[..., dict[str, bytes]], tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="after step 3;"):
        train(tmp_path, once(2, ask_to_stop))
    checkpoint = Checkpoints(tmp_path / "checkpoints").latest()
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert [row["step"] for row in read_journal(tmp_path / "journal.csv")] == ["1", "2", "3"]


@pytest.mark.usefixtures("save_every_step")
@pytest.mark.parametrize("stop", [kill, ask_to_stop])
@pytest.mark.parametrize("place", [1, 3])
def test_a_stopped_ppo_ends_with_the_same_bytes(model_folders: dict[str, tuple[Path, Path]], tmp_path: Path,
                                                ppo_params: Callable[..., PpoParams], prompt_texts: list[str],
                                                corpus: Path, place: int, stop: Callable[[], None]) -> None:
    params = ppo_params(episodes=32, batch_size=8, inner_epochs=2, beta_interval=1, ptx_coef=0.5, ptx_batch_size=2,
                        warmup_iterations=3, kl_goal=0.01)
    prompts = [*prompt_texts, "red?", "blue?", "fish."]

    def run(folder: Path, hook: Hook) -> dict[str, bytes]:
        iterations = iter(range(place if stopped else 0, 4))

        def gold(texts: Any, responses: Any) -> list[float]:
            hook(next(iterations))
            return [float(len(response)) for response in responses]

        train_ppo(params, prompts, *model_folders["gpt_neox"], 5, folder, gold, corpus)
        return result(folder)

    stopped = False
    whole = run(tmp_path / "whole", no_hook)
    with pytest.raises((Killed, Interrupted)):
        run(tmp_path / "stopped", once(place, stop))
    StopSignal.requested = False
    stopped = True
    assert run(tmp_path / "stopped", no_hook) == whole
    rows = read_journal(tmp_path / "whole" / "journal.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert len({row["ppo/beta"] for row in rows}) > 1  # beta depends on the history, which must be restored
    assert rows[-1]["ppo/kl"] != rows[0]["ppo/kl"] == "0.0"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.usefixtures("save_every_step")
def test_a_run_resumed_from_the_older_checkpoint_ends_the_same(train: Callable[..., dict[str, bytes]],
                                                               tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "stopped", once(5, kill))
    truncate(tmp_path / "stopped" / "checkpoints" / "step-00000005" / "__0_0.distcp")
    assert len(read_journal(tmp_path / "stopped" / "journal.csv")) == 5  # one row more than the checkpoint has
    assert train(tmp_path / "stopped") == whole


def test_validation_fills_its_column_and_changes_no_weight(train: Callable[..., dict[str, bytes]], tmp_path: Path
                                                           ) -> None:
    with_it, without = train(tmp_path / "with"), train(tmp_path / "without", validated=False)
    assert with_it["model"] == without["model"]
    rows = read_journal(tmp_path / "with" / "journal.csv")
    assert [bool(row["toy/valid_loss"]) for row in rows] == [step in (2, 5, STEPS) for step in range(1, STEPS + 1)]
    found = [float(row["toy/valid_loss"]) for row in rows if row["toy/valid_loss"]]
    assert found[-1] < found[0]
    for row in rows:
        del row["toy/valid_loss"]
    assert rows == read_journal(tmp_path / "without" / "journal.csv")


def test_the_steps_of_a_validation_are_spread_and_end_with_the_last() -> None:
    assert evenly(10, 4) == {2, 5, 7, 10}
    assert evenly(3, 10) == {1, 2, 3}
    assert evenly(0, 4) == frozenset()


def test_the_journal_is_truncated_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "journal.csv"
    journal = Journal(path, ["a/x", "a/y"])
    values = [(0.1 + 0.2, 1e-30), (3.0, -0.0), (1 / 3, 1e22), (5.0, 7.0)]
    for step, (x, y) in enumerate(values, start=1):
        journal.append(step, {"a/y": y, "a/x": x})
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b"5,0.123")  # half a row: the process was killed while writing it
    assert [row["step"] for row in read_journal(path)] == ["1", "2", "3", "4"]
    resumed = Journal(path, ["a/x", "a/y"], resume_after=2)
    for step, (x, y) in list(enumerate(values, start=1))[2:]:
        resumed.append(step, {"a/x": x, "a/y": y})
    resumed.close()
    assert path.read_bytes() == whole
    assert [(float(row["a/x"]), float(row["a/y"])) for row in read_journal(path)] == values
    Journal(path, ["a/x"]).close()
    assert path.read_text() == "step,a/x\n"


def test_some_columns_of_a_journal_may_be_blank(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.csv", ["a/x"], None, ["a/valid"])
    journal.append(1, {"a/x": 1.0})
    journal.append(2, {"a/x": 2.0, "a/valid": 0.5})
    with pytest.raises(ValueError, match=r"journal columns differ: \['a/x'\]"):
        journal.append(3, {"a/valid": 0.5})
    journal.close()
    assert (tmp_path / "journal.csv").read_text() == "step,a/x,a/valid\n1,1.0,\n2,2.0,0.5\n"


@pytest.mark.parametrize("values", [{"a/x": 1.0}, {"a/x": 1.0, "a/y": 2.0, "a/z": 3.0}])
def test_the_journal_refuses_other_columns(tmp_path: Path, values: dict[str, float]) -> None:
    journal = Journal(tmp_path / "journal.csv", ["a/x", "a/y"])
    with pytest.raises(ValueError, match="journal columns differ"):
        journal.append(1, values)
    journal.close()
