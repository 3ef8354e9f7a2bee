"""The comparison with TRL: its sums, what a process that ends costs, going on after a break."""

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
    """bench/versus with sides that only pretend to work."""
    monkeypatch.syspath_prepend(str(HERE))
    spec = importlib.util.spec_from_file_location("versus", HERE / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "Side", Pretender)
    monkeypatch.setattr(module, "matmul_rate", lambda dtype: 100.0)
    Pretender.asked, Pretender.ends_in, Pretender.ended = [], "", module.Ended
    Pretender.alive, Pretender.most_alive = set(), 0
    yield module
    assert not Pretender.alive
    sys.modules.pop("work")


class Pretender:
    asked: ClassVar[list[tuple[str, int, str, dict[str, Any]]]] = []
    ends_in: ClassVar[str] = ""
    ended: ClassVar[type[Exception]]
    alive: ClassVar[set["Pretender"]] = set()
    most_alive: ClassVar[int] = 0

    def __init__(self, python: Path, script: str, processes: int) -> None:
        self.python, self.script, self.processes = python, script, processes

    def end(self) -> None:
        self.alive.discard(self)

    def do(self, job: str, **more: Any) -> dict[str, Any]:
        self.asked.append((self.script, self.processes, job, more))
        self.alive.add(self)
        Pretender.most_alive = max(Pretender.most_alive, len(self.alive))
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


def test_the_fastest_of_each_are_compared(versus: ModuleType, tmp_path: Path) -> None:
    assert run(versus, tmp_path / "r.json", "--sizes", "10M", "--bars", "sft", "rm", "--turns", "3") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rm_vs_trl"] == found["sft_vs_trl"] == pytest.approx(6 / 2)
    assert found["sizes"]["10M"]["rm"]["processes"] == [2, 1]
    assert found["sizes"]["10M"]["rm"]["their_settings"]["attention"] == "eager"
    assert found["sft_mfu"] == pytest.approx(6 * 7_000_000 * 6 / 1e9 / 100, abs=1e-3)
    assert set(found["sizes"]["10M"]) == {"parameters", "sft", "sft_unpacked", "sft_mfu", "rm"}
    assert Pretender.most_alive == 2  # of four: those that are compared


def test_a_process_that_ends_costs_its_bar_and_no_other(versus: ModuleType, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(Pretender, "do", side_effect=versus.Ended("ended")), pytest.raises(SystemExit, match="1M: ended"):
        versus_main(versus, tmp_path / "none.json")
    Pretender.ends_in = "rm"
    out = tmp_path / "r.json"
    assert run(versus, out, "--sizes", "1M", "--bars", "sft", "rm", "ppo", "--turns", "1") == 1
    assert "1M rm: ended" in capsys.readouterr().err
    assert set(json.loads(out.read_text())["sizes"]["1M"]) == {"parameters", "sft", "sft_unpacked", "sft_mfu", "ppo"}
    Pretender.ends_in, Pretender.asked = "", []
    assert run(versus, out, "--sizes", "1M", "--bars", "sft", "rm", "ppo", "--turns", "1", "--keep") == 0
    assert {job for _, _, job, _ in Pretender.asked} == {"make", "rm"}
    assert {"rm_vs_trl", "sft_vs_trl", "ppo_vs_trl"} <= set(json.loads(out.read_text()))
    Pretender.asked = []
    assert run(versus, out, "--sizes", "1M", "--bars", "sft", "rm", "ppo", "--turns", "1", "--keep") == 0
    assert Pretender.asked == []


def test_a_size_without_continuous_batching(versus: ModuleType, tmp_path: Path) -> None:
    run(versus, tmp_path / "r.json", "--sizes", "135M", "--bars", "rollout", "rollout_continuous", "--turns", "1")
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(found["sizes"]["135M"]) == {"parameters", "rollout"}
    assert found["rollout_vs_generate"] == pytest.approx(3.0)
