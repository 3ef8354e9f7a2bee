"""Chat with the models of a run: answers side by side, the same each time, and a clear error for a wrong name."""

import subprocess
import sys

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
