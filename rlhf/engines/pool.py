"""Sampling by a pool of engines: each gets the policy's weights, the prompts are spread over them.

An engine that does not answer is left out, and its prompts are asked of the others; as soon as it answers again (at the
same address, in the same process or a new one) it gets the weights and its share. A prompt's seed is its own, so its
response does not depend on which engine gives it, up to rounding. Where no engine answers for READY_SECONDS, the run
ends with an exit code that asks for another try.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.engines.server import LARGEST_GAP, STALE_GAP, Away, Sampled, Server
from rlhf.errors import Unavailable, UserError
from rlhf.model.device import device
from rlhf.model.load import weights_to_send
from rlhf.model.sampling import Sampling
from rlhf.training import distributed
from rlhf.training.settings import number

log = logging.getLogger(__name__)

READY_SECONDS = 300.0  # for the first engine to answer, where none does
AT_ONCE = 256  # requests under way at one engine, at most
POLL_SECONDS = 0.5
TRIES = 5  # of one list of prompts, where engines answer and then lose the weights


class Pool:
    """The engines at some addresses. Only the main process speaks to them; all call the same methods."""

    def __init__(self, urls: str, vocabulary: int, transport: str = "gloo", dtype: torch.dtype = torch.float32) -> None:
        self.servers = [Server(url.strip(), vocabulary) for url in urls.split(",") if url.strip()]
        if len({server.url for server in self.servers}) < len(self.servers):
            raise UserError(f"ppo.vllm_url: {urls}: names a server twice")
        self.transport, self.dtype = transport, dtype  # in which the policy computes
        self.name = secrets.token_hex(4)  # of this trainer; part of its weights' versions
        self.sent = 0

    def sample(self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling,
               noise: torch.Generator) -> list[Sampled]:
        """One response per prompt with the policy's weights of now, as `Server.complete` gives them, in every process.

        `noise` draws each prompt's seed. Raises Unavailable where no engine answers, UserError where one refuses.
        """
        return self.finish(policy, self.begin(policy, prompts, sampling, noise))

    def begin(self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling,
              noise: torch.Generator) -> "Job":
        """As `sample`, which does not wait for the responses: `finish` gives them. One job at a time."""
        seeds = torch.randint(2**31, (len(prompts),), generator=noise).tolist()
        job = Job(prompts, sampling, seeds)
        for server in self.servers:
            server.suppressed = tuple(policy.generation_config.suppress_tokens or ())
        self._go_on(policy, job)
        return job

    def finish(self, policy: PreTrainedModel, job: "Job") -> list[Sampled]:
        """The responses of a job. Where engines have failed, the rest is drawn from the policy as it is now."""
        for _ in range(TRIES):
            self._in_main(job.wait, None)
            if distributed.broadcast(len(job.found) == len(job.prompts)):
                return distributed.broadcast([job.found[index] for index in sorted(job.found)])
            self._go_on(policy, job)
        raise UserError(f"ppo.vllm_url: {TRIES} times an engine lost the weights while it sampled: is another run "
                        "using it, or does something restart it?")

    def check(self, gap: float, stale: bool = False) -> None:
        """`gap`: mean difference, either way, of the engines' log-probs and the policy's own, nats a token; where they
        are `stale` an iteration's training lies between. Raises UserError where that is more than rounding: then it is
        not the policy that they sample from."""
        largest = STALE_GAP if stale else LARGEST_GAP
        if not gap <= largest:
            raise UserError(f"ppo.vllm_url: the engines' log-probs are {gap:.2g} nats a token from the policy's (at "
                            f"most {largest:g}): start them with --logprobs-mode processed_logprobs, and in the "
                            "type of ppo.precision")

    def _go_on(self, policy: PreTrainedModel, job: "Job") -> None:
        """Gives the weights to the engines that lack them, and has them draw what the job lacks."""
        self.sent += 1
        version = f"{self.name}-{self.sent}"
        lacking = self._in_main(lambda: self._ready(version), [])
        if distributed.broadcast(bool(lacking)):
            self._send(policy, lacking, version)
        if distributed.is_main():
            job.start(lambda: self._fill(job.found, job.prompts, job.sampling, job.seeds, version))

    def _in_main(self, function: Callable[[], Any], otherwise: Any) -> Any:
        """What the function gives in the main process; what it raises there is raised in all."""
        result, said = otherwise, ("", "")
        if distributed.is_main():
            try:
                result = function()
            except (UserError, Unavailable) as error:
                said = type(error).__name__, str(error)
        kind, message = distributed.broadcast(said)
        if kind:
            raise UserError(message) if kind == "UserError" else Unavailable(message)
        return result

    # --- weights -----------------------------------------------------------------------------------------------------

    def _ready(self, version: str) -> list[Server]:
        """The engines that answer and lack these weights, connected. Waits until one has them or may get them."""
        seconds = number("INSTRUCTFLOW_ENGINE_SECONDS", READY_SECONDS, 0)
        limit, told = time.monotonic() + seconds, False
        while True:
            lacking: list[Server] = []
            problems: dict[Server, Away] = {}
            for server in self.servers:
                if server.version == version:
                    continue
                try:
                    if server.sender is None:
                        if not server.healthy():
                            raise server.away("does not answer")
                        server.connect(self.transport)
                        self._greet(server)
                    lacking.append(server)
                except Away as error:
                    problems[server] = error
            if lacking or any(server.version == version for server in self.servers):
                for server, problem in problems.items():
                    self._lost(server, problem)
                return lacking
            said = "; ".join(map(str, problems.values()))
            if time.monotonic() > limit:
                raise Unavailable(f"ppo.vllm_url: no engine is ready after {seconds:.0f} s ({said}); start it and "
                                  "run the same command to resume")
            if not told:
                log.warning("ppo: no engine answers (%s); waiting for one, %.0f s at most", said, seconds)
                told = True
            time.sleep(min(POLL_SECONDS, seconds / 10))

    def _send(self, policy: PreTrainedModel, servers: Sequence[Server], version: str) -> None:
        """Gives the weights to the engines; one that fails is left out. All processes give their parts."""
        dtypes = {server.dtype for server in servers}
        dtype = distributed.broadcast(dtypes.pop() if len(dtypes) == 1 else torch.float32)
        weights, whole = weights_to_send(policy, dtype)
        live = list(servers)

        def tried(do: Callable[[Server], Any]) -> list[tuple[Server, Any]]:
            """What it gives for each engine that is still there."""
            given = []
            for server in list(live):
                try:
                    given.append((server, do(server)))
                except Away as error:
                    self._lost(server, error)
                    live.remove(server)
                except RuntimeError:  # gloo, which names its own source files
                    self._lost(server, server.away("its connection broke while it got the weights"))
                    live.remove(server)
            return given

        self._in_main(lambda: tried(lambda server: server.begin_update(weights)), None)
        for name in weights:
            value = whole(name)
            if distributed.is_main():
                value = value.to(device() if self.transport == "nccl" else "cpu").contiguous()
                moving = dict(tried(lambda server, value=value: server.sender.send(value)))  # type: ignore[misc]
                tried(lambda server, moving=moving: moving[server].wait())  # type: ignore[misc]
        self._in_main(lambda: tried(lambda server: server.end_update(version)), None)

    def _greet(self, server: Server) -> None:
        """Says of an engine that has just connected what should be known."""
        if server.left_out:
            log.warning("ppo: engine %s is back", server.url)
        elif server.dtype != self.dtype:
            ours, theirs = (str(item).removeprefix("torch.") for item in (self.dtype, server.dtype))
            log.warning("ppo: engine %s computes in %s and the policy in %s: start it with --dtype %s", server.url,
                        theirs, ours, ours)
        server.left_out = False

    def _lost(self, server: Server, error: Exception) -> None:
        """Leaves an engine out, and says so once."""
        if not server.left_out:
            log.warning("ppo: engine %s is left out: %s", server.url, str(error).removeprefix(f"{server.url}: "))
        server.left_out = True
        server.disconnect()

    # --- responses ---------------------------------------------------------------------------------------------------

    def _fill(self, found: dict[int, Sampled], prompts: Sequence[Sequence[int]], sampling: Sampling,
              seeds: Sequence[int], version: str) -> None:
        """Adds responses to `found` until there is one for each prompt, or no engine is left.

        The longest prompts go first. Responses of an engine that turns out to have other weights are dropped.
        """
        live = [server for server in self.servers if server.version == version]
        waiting = deque(sorted((index for index in range(len(prompts)) if index not in found),
                               key=lambda index: (-len(prompts[index]), index)))
        share = -(-len(waiting) // max(1, len(live)))
        work = _Work(waiting, found)
        with ExitStack() as stack:
            threads = [threading.Thread(target=work.by, args=(server, prompts, sampling, seeds), daemon=True)
                       for _ in range(max(1, min(AT_ONCE, sampling.batch_size, share))) for server in live]
            stack.callback(work.stop)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for server, error in work.failed.items():
            self._lost(server, error)
        if work.refused:
            raise work.refused
        for server in live:
            indices = [index for index, by in work.givers.items() if by is server]
            try:
                if indices and server.version and server.weight_version() != version:
                    raise server.away("has other weights than it was given: restarted, or used by another run")
            except Away as error:
                if server.version:
                    self._lost(server, error)
                for index in indices:
                    del found[index]


class Job:
    """Prompts whose responses are being drawn, beside the process's other work."""

    def __init__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> None:
        self.prompts, self.sampling, self.seeds = prompts, sampling, seeds
        self.found: dict[int, Sampled] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Raises what the work has raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


class _Work:
    """Prompts that wait for a response, taken by threads of several engines."""

    def __init__(self, waiting: deque[int], found: dict[int, Sampled]) -> None:
        self.waiting, self.found = waiting, found
        self.givers: dict[int, Server] = {}
        self.failed: dict[Server, Away] = {}
        self.refused: UserError | None = None
        self.under_way = 0
        self.changed = threading.Condition()

    def stop(self) -> None:
        """No prompt is taken any more."""
        with self.changed:
            self.waiting.clear()
            self.changed.notify_all()

    def by(self, server: Server, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> None:
        """Takes one prompt after the other for this engine, until none is left or it fails."""
        while (index := self._next(server)) is not None:
            response: Sampled | None = None
            try:
                response = server.complete(prompts[index], sampling, seeds[index])
            except Away as error:
                with self.changed:
                    self.failed.setdefault(server, error)
            except UserError as error:
                self.refused = self.refused or error
                self.stop()
            finally:
                with self.changed:
                    self.under_way -= 1
                    if response is not None:
                        self.found[index], self.givers[index] = response, server
                    elif self.refused is None:
                        self.waiting.appendleft(index)
                    self.changed.notify_all()

    def _next(self, server: Server) -> int | None:
        """The next prompt; None where there is none left for this engine. Waits while another engine may give one
        back."""
        with self.changed:
            while server not in self.failed and self.refused is None:
                if self.waiting:
                    self.under_way += 1
                    return self.waiting.popleft()
                if not self.under_way:
                    break
                self.changed.wait()
            return None
