"""The git commit of a checkout, or why there is none: `revision(root)` gives the tags of a run or a version."""

import subprocess
from pathlib import Path

COMMIT, UNKNOWN = "git_commit", "git_commit_unknown"


def revision(root: Path) -> dict[str, str]:
    """{git_commit: the whole name}, or {git_commit_unknown: why} without git, repository or commit.

    A folder of another account ("dubious ownership") is read all the same: whoever runs its code trusts it.
    """
    command = ["git", "-c", "safe.directory=*", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return {UNKNOWN: f"git: {error.strerror}"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[0].removeprefix("fatal: ")
        return {UNKNOWN: "no commit yet" if reason == "Needed a single revision" else reason[:200]}
    return {COMMIT: done.stdout.strip()}
