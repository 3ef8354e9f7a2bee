"""One server of vLLM over HTTP: its health, its requests for new weights, and responses to prompts.

It runs in an environment of its own (`make engines`, docs/rollout-engines.md), with VLLM_SERVER_DEV_MODE=1 and this
project's plugin. The requests are those of vLLM 0.32.
"""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor

from rlhf.engines.transfer import BACKEND, Sender, TransferRefused
from rlhf.errors import UserError
from rlhf.model.sampling import Sampling

HEALTH_SECONDS = 10.0
ANSWER_SECONDS = 1800.0  # for one answer: new weights, or a response among all the others
LEAST_BIAS = -100.0  # of vLLM's logit_bias
LARGEST_GAP = 0.1  # between a server's log-probs and ours; bfloat16 on either side makes a tenth of that
STALE_GAP = 0.5  # the same with an iteration's training between them

MISSING = {"/health": "this is no vLLM server; its address ends with the port, without /v1",
           "/v1/completions": "it serves no language model; is it started on a reward model?"}

Sampled = tuple[list[int], list[float]]  # a response's tokens and their log-probs


class Away(Exception):
    """A server that does not answer, or that has failed: another may do its work."""


class Server:
    """A server of `vllm serve` at `url`, e.g. http://127.0.0.1:8000. `vocabulary`: how many token ids the policy has.

    Methods raise Away where it does not answer, and UserError where it answers something that no waiting mends.
    """

    def __init__(self, url: str, vocabulary: int) -> None:
        self.url, self.vocabulary = url.rstrip("/"), vocabulary
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
            self.address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise self.refusal(error) from None
        if not valid:
            raise self.refusal("must be like http://127.0.0.1:8000")
        self.suppressed: tuple[int, ...] = ()  # rows of the policy that nobody trained
        self.sender: Sender | None = None
        self.version = ""  # of the weights that it has
        self.left_out = False  # and told so
        self._opener = build_opener(ProxyHandler({}))
        self._request: Future[Any] | None = None

    def refusal(self, message: object) -> UserError:
        return UserError(f"ppo.vllm_url: {self.url}: {' '.join(str(message).split())[:500]}")

    def away(self, message: object) -> Away:
        return Away(f"{self.url}: {' '.join(str(message).split())[:300]}")

    # --- requests ----------------------------------------------------------------------------------------------------

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = ANSWER_SECONDS) -> Any:
        """The answer to a GET, or with `body` to a POST of it: what its JSON says, None where it is none."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                text = answer.read()
        except HTTPError as error:
            said = error.read().decode(errors="replace") or error.reason
            if error.code >= 500:
                raise self.away(f"{path} failed with {error.code}: {said}") from None
            if error.code == 404:
                raise self.refusal(f"{path} is not there: {MISSING.get(path, 'start it with VLLM_SERVER_DEV_MODE=1')}"
                                   ) from None
            raise self.refusal(f"{path} refused with {error.code}: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            raise self.away(f"{path} got no answer: {error or type(error).__name__}") from None
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            return None

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            self.ask("/health", seconds=HEALTH_SECONDS)
        except Away:
            return False
        return True

    def weight_version(self) -> str:
        """The version of the weights that it has now; another one where it was restarted, or serves somebody else."""
        return str((self.ask("/weight_info") or {}).get("weight_version"))

    # --- weights -----------------------------------------------------------------------------------------------------

    def _begin(self, path: str, body: dict[str, Any]) -> None:
        """A request that is answered when the workers have done what the trainer must take part in."""
        request: Future[Any] = Future()

        def ask() -> None:
            try:
                request.set_result(self.ask(path, body))
            except Exception as error:
                request.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()  # an engine that hangs holds up neither the next nor the end
        self._request = request

    def _failed(self) -> Exception | None:
        request = self._request
        if request is None or not request.done():
            return None
        return request.exception()  # type: ignore[return-value]

    def _end(self) -> None:
        if self._request is not None:
            self._request.result()
            self._request = None

    def connect(self, transport: str = "gloo") -> None:
        """Joins its workers to a group with this process. Whatever they did for another trainer is given up."""
        self.disconnect()
        workers = int((self.ask("/get_world_size") or {}).get("world_size", 1))
        self.ask("/pause?mode=abort", {})  # the requests of a trainer that is gone
        try:
            with socket.create_connection(self.address, timeout=HEALTH_SECONDS) as connection:
                here = str(connection.getsockname()[0])
        except OSError as error:
            raise self.away(error) from None
        sender = Sender(here, workers, transport)
        self._begin("/init_weight_transfer_engine", {"init_info": sender.joining()})
        try:
            self._together(partial(sender.join, self._failed))
        except Away as error:
            if "failed with 500" in str(error) and self.healthy():  # it lives, and cannot
                option = f"""--weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
                raise self.refusal(f"cannot connect; start it with {option}, with this package beside vLLM: {error}"
                                   ) from None
            raise
        if sender.facts.get("tied"):  # vLLM 0.32 would take new embeddings and keep the old output layer
            raise self.refusal("its output layer is its embeddings: start it with "
                               "--hf-overrides '{\"tie_word_embeddings\": false}'")
        self.sender = sender

    def disconnect(self) -> None:
        if self.sender is not None:
            self.sender.close()
        self.sender, self.version = None, ""

    def begin_update(self, tensors: Mapping[str, Tensor]) -> None:
        """Announces the tensors that `sender.send` sends next."""
        assert self.sender is not None
        self.version = ""
        self.ask("/pause?mode=abort", {})
        try:
            self.ask("/start_weight_update", {})
        except Away as error:
            if "already" not in str(error):
                raise
            with suppress(Away):  # a trainer that is gone has begun one; no update at all makes vLLM give that up
                self.ask("/update_weights", {"update_info": {}})
            self.ask("/start_weight_update", {})
        self._begin("/update_weights", {"update_info": self.sender.next_update(tensors)})
        self._together(partial(self.sender.accepted, self._failed), end=False)

    def end_update(self, version: str) -> None:
        """After the last tensor: from here on it samples with them. Raises UserError where it could not load them."""
        assert self.sender is not None
        self._together(partial(self.sender.loaded, self._failed))
        self.ask("/finish_weight_update", {"weight_version": version})
        if not (self.ask("/reset_prefix_cache", {}) or {}).get("success"):
            raise self.refusal("keeps what it computed with older weights: it has requests of somebody else")
        self.ask("/resume", {})
        self.version = version

    def _together(self, wait: Callable[[], object], end: bool = True) -> None:
        """Waits for what the workers write, then for the answer to the request that told them."""
        try:
            wait()
            if end:
                self._end()
        except TransferRefused as error:
            raise self.refusal(f"refuses the weights: {error}") from None
        except RuntimeError:  # gloo, the store: what they say names their own source files
            raise self.away("its connection broke") from None
        except (TimeoutError, OSError) as error:
            raise self.away(error) from None

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        assert self.sender is not None
        return getattr(torch, str(self.sender.facts.get("dtype", "float32")))

    # --- responses ---------------------------------------------------------------------------------------------------

    def complete(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Sampled:
        """One prompt's response, up to and including the stop token, or max_new_tokens without one; and the log-prob
        that each token was drawn with.

        Whatever generation_config.json says is overridden: it is the plain softmax, in which the rows that nobody
        trained have no part.
        """
        answer = self.ask("/v1/completions", {
            "prompt": list(prompt), "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
            "seed": seed, "stop_token_ids": list(sampling.stop_ids), "ignore_eos": True, "top_p": 1.0, "top_k": 0,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "add_special_tokens": False, "skip_special_tokens": False, "include_stop_str_in_output": True,
            "return_token_ids": True, "logprobs": 0,
            "logit_bias": {str(index): LEAST_BIAS for index in self.suppressed}})
        try:
            choice = answer["choices"][0]
            if choice.get("finish_reason") == "abort":
                raise self.away("gave up a request: it was paused by somebody else")
            response = [int(token) for token in choice["token_ids"]]
            log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        except (LookupError, TypeError, ValueError, AttributeError):
            raise self.refusal("its answers lack token_ids or token_logprobs; vLLM 0.32 gives them") from None
        if max(response, default=0) >= self.vocabulary:
            raise self.refusal(f"it answers with token {max(response)}, and the policy has {self.vocabulary}: it "
                               "serves a model of another vocabulary")
        ended = bool(response) and response[-1] in sampling.stop_ids
        if set(response[:-1]) & set(sampling.stop_ids) or not (ended or len(response) == sampling.max_new_tokens):
            raise self.refusal(f"a response of {len(response)} tokens that neither ends with the stop token nor has "
                               f"{sampling.max_new_tokens}: is its --max-model-len too small?")
        if len(log_probs) != len(response):
            raise self.refusal(f"{len(log_probs)} log-probs for {len(response)} tokens")
        return response, log_probs
