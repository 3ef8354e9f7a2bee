"""Processes that end when they should: a command's whole tree, the flow itself at Ctrl-C.

`await run_lines(["dvc", "repro"], cwd=root, env=env, on_line=print)` returns the exit code.
"""

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import anyio

from mlops.processes import die_with_parent
from rlhf.errors import displayed, without_secrets

GRACE_SECONDS = 10.0  # from TERM to KILL: time for a trainer to save its state
KILL_SECONDS = 5.0
DRAIN_SECONDS = 2.0  # after the exit, for lines still in the pipe
AGAIN_SECONDS = 20  # until a signal that had no effect is sent again; longer than GRACE_SECONDS and KILL_SECONDS
IF_PARENT_LIVES = '[ "$PPID" = "$0" ] && exec "$@"'  # it may have ended before setpriv has asked for its death signal
LONGEST_LINE = 2**20


def continue_in_own_group() -> None:
    """Forks: the child goes on in a process group of its own, the parent passes signals on and exits as the child does.

    Ctrl-C goes to the terminal's whole foreground group. Prefect's temporary server would end by it before the flow
    could record its own end, and the flow would then ask for that server for minutes. Call it before any thread.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        die_with_parent(parent)
        signal.signal(signal.SIGINT, _stop_before_work)
        threading.Thread(target=insist_without, args=(parent,), daemon=True).start()
        return

    passed: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and passed:
            return  # an impatient second Ctrl-C would break off what the first has begun: saving and telling the server
        passed.append(number)
        os.kill(pid, number if number == signal.SIGINT else signal.SIGTERM)
        signal.alarm(AGAIN_SECONDS)

    signal.signal(signal.SIGALRM, lambda number, frame: pass_on(signal.SIGTERM, frame))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    raise SystemExit(code if code >= 0 else 128 - code)


def _stop_before_work(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C while the command still imports: one line, and no traceback of whatever module it was in."""
    os.write(2, b"stopped before anything ran\n")
    os._exit(130)


def work_begins() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, which the command handles."""
    if signal.getsignal(signal.SIGINT) is _stop_before_work:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def insist_without(parent: int) -> None:
    """Sends this process SIGTERM again and again once its parent is gone.

    The kernel has sent it one. Prefect raises an exception then, wherever the main thread is; where that is a callback
    or another task, asyncio takes it for that one's error and the flow goes on.
    """
    while os.getppid() == parent:
        time.sleep(1)
    while True:
        time.sleep(AGAIN_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)


async def run_lines(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], on_line: Callable[[str], None]
) -> int:
    """Runs `command` in its own session and returns its exit code (negative: the signal that ended it).

    `on_line` gets each line of stdout and stderr, without its end, without logins and without what a terminal obeys.
    If this coroutine is cancelled, or anything else goes wrong, every process of the session gets TERM and,
    `GRACE_SECONDS` later, KILL. The kernel sends TERM too if this process itself is killed.
    """
    # A pipe of our own: process.wait() would wait for the end of one of asyncio's, which never comes while a detached
    # grandchild keeps it open.
    ours, theirs = os.pipe()
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(ours, "rb"))
    reader = asyncio.create_task(_read_lines(stream, on_line))
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                "setpriv", "--pdeathsig", "TERM", "--", "sh", "-c", IF_PARENT_LIVES, str(os.getpid()), *command,
                cwd=cwd, env=env, start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL, stdout=theirs, stderr=theirs,
            )
        finally:
            os.close(theirs)
        try:
            code = await process.wait()
            await asyncio.wait([reader], timeout=DRAIN_SECONDS)
        except BaseException:
            # Prefect's timeouts cancel by anyio scopes, which cancel every later await too unless shielded.
            with anyio.CancelScope(shield=True):
                await stop_session(process.pid)
            raise
    finally:
        reader.cancel()
        transport.close()
    if code < 0:
        await stop_session(process.pid)  # dvc was killed: what it had started must not train on beside a retry
    return code


async def _read_lines(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    """Splits at newlines and at the carriage returns of progress bars; skips empty lines."""
    rest = b""
    while chunk := await stream.read(2**16):
        *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
        if len(rest) > LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            if line.strip():
                on_line(without_secrets(displayed(line.decode(errors="replace"))))
    if rest.strip():
        on_line(without_secrets(displayed(rest.decode(errors="replace"))))


async def stop_session(session: int) -> None:
    """TERM to every process of the session, KILL to those that are left after `GRACE_SECONDS`."""
    try:
        _send(session, signal.SIGTERM)
        if not await _gone_within(session, GRACE_SECONDS):
            _send(session, signal.SIGKILL)
            await _gone_within(session, KILL_SECONDS)
    finally:
        _send(session, signal.SIGKILL)  # also when a second Ctrl-C ends the waiting


async def _gone_within(session: int, seconds: float) -> bool:
    deadline = asyncio.get_running_loop().time() + seconds
    while _members(session):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True


def _send(session: int, number: signal.Signals) -> None:
    for pid in _members(session):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _members(session: int) -> list[int]:
    """The living processes of a session. Zombies don't count: a container's first process may never reap them."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue  # ended meanwhile
        if int(owner) == session and state not in "ZX":
            pids.append(int(stat.parent.name))
    return pids
