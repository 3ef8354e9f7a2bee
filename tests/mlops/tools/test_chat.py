"""Chat with the models of a run: answers side by side, the same each time, and a clear error for a wrong name."""

import io
import subprocess
import sys

from rich.console import Console

from mlops.tools.chat import Speaker, titles_of
from tests.tasks.small_pipeline import SmallPipeline, Undisturbed


def test_chat_shows_models_side_by_side(small_pipeline: SmallPipeline, undisturbed: Undisturbed) -> None:
    def chat(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "mlops.tools.chat", *arguments], cwd=small_pipeline.root,
                              input="what color is the ba-do?\n", capture_output=True, text=True,
                              env={**small_pipeline.environment, "COLUMNS": "100"})

    assert undisturbed
    both = chat("sft", "ppo", "--max-new-tokens", "8")
    assert both.returncode == 0, both.stderr
    assert "sft" in both.stdout
    assert "ppo" in both.stdout
    assert both.stdout.count(" rm ") == 2
    assert chat("sft", "ppo", "--max-new-tokens", "8").stdout == both.stdout
    missing = chat("nobody")
    assert missing.returncode == 2
    assert missing.stderr.startswith("chat: nobody: no model; ")


def test_names_that_are_longer_than_their_boxes_are_told_before() -> None:
    """Two folders with one long beginning looked the same."""
    printed = io.StringIO()
    console = Console(file=printed, width=60)
    short = [Speaker("sft", None, None), Speaker("ppo", None, None)]
    assert titles_of(short, 24, console) == ["sft", "ppo"]
    assert printed.getvalue() == ""
    paths = [f"../models/{'long-' * 12}[a]/checkpoint-{step}" for step in (100, 200)]
    assert titles_of([Speaker(path, None, None) for path in paths], 24, console) == ["1", "2"]
    assert printed.getvalue().splitlines() == [f"1: {paths[0]}", f"2: {paths[1]}"]
