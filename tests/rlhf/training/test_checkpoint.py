"""Checkpoints in parts: what is on the disk at each moment, kills, damage, resharding, how often, how much memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.training import checkpoint, parts
from rlhf.training.checkpoint import SHARE, Checkpoints, interval
from rlhf.training.state import State, weights

ROOT = Path(__file__).resolve().parents[3]
TENSORS = {"weights": torch.arange(5.0), "steps": torch.tensor(3.0)}


def state(step: int) -> State:
    found = State({"step": step, "nested": {"list": [1, 2.5, "three"]}})
    found.add("model", TENSORS)
    return found


def newest(checkpoints: Checkpoints) -> int:
    """The step of the newest checkpoint, whose values and tensors must be its own."""
    saved = checkpoints.latest()
    if saved is None:
        return 0
    found = saved.read("model", {name: torch.zeros_like(value) for name, value in TENSORS.items()})
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    assert saved.values["nested"] == {"list": [1, 2.5, "three"]}
    return int(saved.values["step"])


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Checkpoints of the steps 1, 2 and 3, of which the newest two are kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_checkpoints_remain_intact(saved: Checkpoints) -> None:
    assert names(saved.folder) == ["step-00000002", "step-00000002.json", "step-00000003", "step-00000003.json"]
    record = json.loads((saved.folder / "step-00000003.json").read_text())
    files = [".metadata", "__0_0.distcp", "values.pt"]
    assert sorted(record["sha256"]) == names(saved.folder / "step-00000003") == files
    assert newest(saved) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff{not json")


@pytest.mark.parametrize(("name", "damage"), [
    *((f"/{file}", damage) for file in (".metadata", "__0_0.distcp", "values.pt")
      for damage in (truncate, flip_a_bit, empty, Path.unlink)),
    ("", shutil.rmtree), (".json", Path.unlink), (".json", truncate), (".json", empty), (".json", garbage)])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(saved: Checkpoints, name: str,
                                                           damage: Callable[[Path], None]) -> None:
    damage(Path(f"{saved.folder}/step-00000003{name}"))
    assert newest(saved) == 2
    again = state(3)
    again.values["step"] = 33
    saved.save(3, again)  # the resumed run reaches the step again
    assert newest(saved) == 33


def test_after_two_damaged_checkpoints_the_next_one_is_kept(saved: Checkpoints) -> None:
    for step in (2, 3):
        truncate(saved.folder / f"step-{step:08d}" / "values.pt")
    assert newest(saved) == 0  # the run starts from the beginning
    saved.save(1, state(1))
    assert newest(saved) == 1


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nothing").latest() is None


def test_leftovers_of_killed_saves_and_files_of_earlier_versions_are_removed(saved: Checkpoints) -> None:
    before = names(saved.folder)
    for name in ("step-00000004.partial", "step-00000004"):  # killed while writing; before the JSON
        shutil.copytree(saved.folder / "step-00000003", saved.folder / name)
    for name in ("step-00000005.json.partial", "step-00000001.json", "step-00000006.pt", "step-00000006.json"):
        (saved.folder / name).write_text("{}")
    assert saved.steps() == [2, 3]
    assert newest(saved) == 3
    assert names(saved.folder) == before


@pytest.mark.parametrize(("keep", "most"), [(1, 2), (2, 2), (3, 3)])
def test_no_more_copies_are_on_the_disk_than_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int,
                                                      most: int) -> None:
    """Looked at when a save has begun, when its files are there, and when it has its name, before older ones go."""
    checkpoints, copies = Checkpoints(tmp_path / "checkpoints", keep=keep), []

    def look(function: Callable[..., Any]) -> Callable[..., Any]:
        def looking(*arguments: Any) -> Any:
            copies.append(sum(path.is_dir() for path in checkpoints.folder.iterdir()))
            result = function(*arguments)
            copies.append(sum(path.is_dir() for path in checkpoints.folder.iterdir()))
            return result
        return looking

    monkeypatch.setattr(checkpoint.parts, "write", look(checkpoint.parts.write))
    monkeypatch.setattr(checkpoint, "write_json", look(checkpoint.write_json))
    for step in range(1, 6):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    assert max(copies) == most
    assert checkpoints.steps() == [1, 2, 3, 4, 5][-keep:]


def test_the_training_goes_on_while_a_checkpoint_is_written(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    """The save returns before anything is written, and what is written is the state at its time."""
    begun, gate = threading.Event(), threading.Event()
    original = checkpoint.parts.write

    def write(*arguments: Any) -> Any:
        begun.set()
        assert gate.wait(60)
        return original(*arguments)

    monkeypatch.setattr(checkpoint.parts, "write", write)
    changing, numbers = torch.arange(5.0), [1]
    later = State({"numbers": numbers})
    later.add("model", {"weights": changing})
    saved.save(4, later)
    assert begun.wait(60)
    assert saved.steps() == [3]  # the older one made room
    changing.zero_()
    numbers.append(2)
    gate.set()
    found = saved.latest()
    assert found is not None
    assert (found.step, found.values) == (4, {"numbers": [1]})
    assert torch.equal(found.read("model", {"weights": torch.zeros(5)})["weights"], torch.arange(5.0))


def test_a_save_that_fails_is_raised_at_the_next_step_and_leaves_nothing(saved: Checkpoints,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.parts, "sha256", full)
    saved.save(4, state(4))
    with pytest.raises(OSError, match="No space left"):
        saved.wait()
    assert names(saved.folder) == ["step-00000003", "step-00000003.json"]
    saved.save(4, state(4))
    saved._writing._thread.join()  # type: ignore[union-attr]
    with pytest.raises(OSError, match="No space left"):
        saved.after_step(5, lambda: state(5))


def test_a_full_disk_is_raised_whatever_torch_makes_of_it() -> None:
    def fill() -> None:
        try:
            with Path("/dev/full").open("wb", buffering=0) as full:
                full.write(b"0")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch's writer of archives does

    with pytest.raises(OSError, match="No space left"):
        parts.together(fill, None)


def test_an_interval_keeps_the_cost_at_its_share_of_the_time() -> None:
    assert interval(30, 0.0) == 30
    assert interval(30, 0.6) == pytest.approx(30)
    assert interval(30, 12.0) == pytest.approx(600)
    assert 12.0 / interval(30, 12.0) == pytest.approx(SHARE)
    assert interval(1000, 12.0) == 1000
    assert interval(0, 12.0) == 0  # at every step, whatever it costs


def test_a_save_is_due_after_what_the_last_one_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint.time, "thread_time", lambda: 0.5)
    checkpoints, saves = Checkpoints(tmp_path, seconds=30), []

    def slow(step: int) -> State:
        saves.append(now[0])
        now[0] += 1.5
        return state(step)

    for step in range(1, 400):
        now[0] += 1
        checkpoints.after_step(step, lambda step=step: slow(step))  # type: ignore[misc]
        checkpoints.wait()
    assert saves[0] == 130
    gaps = [later - earlier for earlier, later in pairwise(saves)]
    assert gaps
    assert set(gaps) == {1.5 + (1.5 + 0.5) / SHARE}


def in_processes(processes: int, runs: list[dict[str, Any]], returncode: int = 0) -> list[dict[str, Any]]:
    """Runs save_in_processes.py; returns what each run found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    task = json.dumps({"processes": processes, "runs": runs})
    done = subprocess.run([sys.executable, "-m", "tests.rlhf.training.save_in_processes", task], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == returncode, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1])) if returncode == 0 else []


@pytest.mark.parametrize(("who", "moment"), [
    ("other", "between files"),  # the main process alone renames and writes the JSON
    *(("main", moment) for moment in ("between files", "before the rename", "before the JSON", "in the JSON"))])
def test_a_kill_during_a_save_keeps_the_checkpoint_before(tmp_path: Path, who: str, moment: str) -> None:
    """Of two processes one is killed while step 2 is saved; the other one ends too, and step 1 is what is found."""
    run = {"folder": str(tmp_path / "checkpoints"), "shard": True}
    in_processes(2, [{**run, "steps": 2, "kill": who, "moment": moment}], -signal.SIGKILL if who == "main" else 1)
    left = names(tmp_path / "checkpoints")
    assert {"step-00000001", "step-00000001.json"} <= set(left)  # a main process that lives on tidies up
    assert "step-00000002.json" not in left
    [found] = in_processes(1, [{**run, "shard": False, "steps": 0}])
    assert found["resumed"] == 1
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000001.json"]


def test_a_checkpoint_is_read_by_any_number_of_processes_sharded_or_not(tmp_path: Path) -> None:
    """Weights and Adam's state are the same tensors, bit for bit; GPT-NeoX's and Qwen2's embeddings are tied."""
    runs: list[tuple[int, dict[str, Any]]] = [
        (count, {"folder": str(tmp_path / f"{count}-{shard}-{architecture}"), "shard": shard, "steps": 1,
                 "architecture": architecture})
        for count, shard in ((1, False), (2, True), (2, False), (4, True))
        for architecture in ("gpt_neox", "llama", "qwen2")]
    digests: dict[str, set[str]] = {"gpt_neox": set(), "llama": set(), "qwen2": set()}
    for count in (1, 2, 4):
        mine = [run for number, run in runs if number == count]
        for run, written in zip(mine, in_processes(count, mine), strict=True):
            assert written["files"] == count
            digests[run["architecture"]].add(written["digest"])
    assert [len(item) for item in digests.values()] == [1, 1, 1]  # the same start and gradients for all
    for count in (1, 2, 4):
        mine = [{**run, "shard": shard, "steps": 0} for _, run in runs for shard in ((False, True) if count > 1 else
                                                                                     (False,))]
        for run, found in zip(mine, in_processes(count, mine), strict=True):
            assert (found["resumed"], {found["digest"]}) == (1, digests[run["architecture"]]), (count, run)


def test_a_process_holds_no_more_than_its_part_while_it_saves(tmp_path: Path) -> None:
    """Of a sharded model of 30M parameters in two processes: half of the state and one tensor, and 32 MB for the code
    that is imported and the allocator. The whole state is 350 MB."""
    [found] = in_processes(2, [{"folder": str(tmp_path / "checkpoints"), "shard": True, "steps": 1, "width": 512,
                                "blocks": 8, "vocabulary": 8000}])
    if not found["peaks"][0]:
        pytest.skip("the system does not tell a process's peak of memory")
    for peak in found["peaks"]:
        assert peak < found["bytes"] / 2 + found["largest"] + 2**25


def test_weights_that_are_frozen_are_not_saved(make_policy: Callable[..., Any]) -> None:
    model = make_policy("llama")
    model.model.requires_grad_(False)
    assert list(weights(model)) == ["lm_head.weight"]
