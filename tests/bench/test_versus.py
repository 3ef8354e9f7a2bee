"""The comparison with TRL: its arithmetic, a process that dies, and resuming after an interruption."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

import pytest

HERE = Path(__file__).parents[2] / "bench" / "versus"
SPEEDS = {"ours.py": {1: 3.0, 2: 6.0}, "theirs.py": {1: 2.0, 2: 1.0}}  # rows a second by number of processes


@pytest.fixture
def versus(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bench/versus with fake sides."""
    monkeypatch.syspath_prepend(str(HERE))
    spec = importlib.util.spec_from_file_location("versus", HERE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "Side", FakeSide)
    monkeypatch.setattr(module, "matmul_rate", lambda dtype: 100.0)
    FakeSide.jobs, FakeSide.ends_in, FakeSide.ended = [], "", module.Ended
    FakeSide.alive, FakeSide.most_alive = set(), 0
    yield module
    assert not FakeSide.alive
    sys.modules.pop("work")


class FakeSide:
    jobs: ClassVar[list[tuple[str, int, str, dict[str, Any]]]] = []
    ends_in: ClassVar[str] = ""
    ended: ClassVar[type[Exception]]
    alive: ClassVar[set["FakeSide"]] = set()
    most_alive: ClassVar[int] = 0

    def __init__(self, python: Path, script: str, processes: int) -> None:
        self.python, self.script, self.processes = python, script, processes

    def end(self) -> None:
        self.alive.discard(self)

    def do(self, job: str, **more: Any) -> dict[str, Any]:
        self.jobs.append((self.script, self.processes, job, more))
        self.alive.add(self)
        FakeSide.most_alive = max(FakeSide.most_alive, len(self.alive))
        if job == self.ends_in and self.script == "theirs.py":
            raise self.ended("ended")
        speed = SPEEDS[self.script][self.processes] * (0.5 if more.get("attention") == "sdpa" else 1.0)
        return {"parameters": 7_000_000, "seconds": 10 / speed, "prompts": 10, "memory": 1.5, "loss/first": 2.0,
                "loss/mean": 2.0, "loss/policy": 1.0, "loss/value": 1.0, "score": 1.0, "weight": 1.0, "order": [],
                "responses": []} | ({"tokens": 10} if job != "rm" else {})


def versus_main(versus: ModuleType, out: Path, *arguments: str) -> None:
    with patch.object(sys, "argv", ["versus", "--out", str(out), "--processes", "1", "2", *arguments]):
        versus.main()


def run(versus: ModuleType, out: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        versus_main(versus, out, *arguments)
    return int(stop.value.code or 0)


def test_the_fastest_settings_of_each_side_are_compared(versus: ModuleType, tmp_path: Path) -> None:
    assert run(versus, tmp_path / "r.json", "--sizes", "10M", "--bars", "sft", "rm", "--turns", "3") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rm_vs_trl"] == found["sft_vs_trl"] == pytest.approx(6 / 2)
    assert found["sizes"]["10M"]["rm"]["processes"] == [2, 1]
    assert found["sizes"]["10M"]["rm"]["their_settings"]["attention"] == "eager"
    assert found["sft_mfu"] == pytest.approx(6 * 7_000_000 * 6 / 1e9 / 100, abs=1e-3)
    assert set(found["sizes"]["10M"]) == {"parameters", "sft", "sft_unpacked", "sft_mfu", "rm"}
    assert FakeSide.most_alive == 2  # of four: those that are compared


def test_a_process_that_dies_fails_only_its_own_benchmark(versus: ModuleType, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(FakeSide, "do", side_effect=versus.Ended("ended")), pytest.raises(SystemExit, match="1M: ended"):
        versus_main(versus, tmp_path / "none.json")
    FakeSide.ends_in = "rm"
    out = tmp_path / "r.json"
    assert run(versus, out, "--sizes", "1M", "--bars", "sft", "rm", "ppo", "--turns", "1") == 1
    assert "1M rm: ended" in capsys.readouterr().err
    assert set(json.loads(out.read_text())["sizes"]["1M"]) == {"parameters", "sft", "sft_unpacked", "sft_mfu", "ppo"}
    FakeSide.ends_in, FakeSide.jobs = "", []
    assert run(versus, out, "--sizes", "1M", "--bars", "sft", "rm", "ppo", "--turns", "1", "--keep") == 0
    assert {job for _, _, job, _ in FakeSide.jobs} == {"make", "rm"}
    assert {"rm_vs_trl", "sft_vs_trl", "ppo_vs_trl"} <= set(json.loads(out.read_text()))
    FakeSide.jobs = []
    assert run(versus, out, "--sizes", "1M", "--bars", "sft", "rm", "ppo", "--turns", "1", "--keep") == 0
    assert FakeSide.jobs == []


def test_a_large_size_skips_continuous_batching(versus: ModuleType, tmp_path: Path) -> None:
    run(versus, tmp_path / "r.json", "--sizes", "135M", "--bars", "rollout", "rollout_continuous", "--turns", "1")
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(found["sizes"]["135M"]) == {"parameters", "rollout"}
    assert found["rollout_vs_generate"] == pytest.approx(3.0)
