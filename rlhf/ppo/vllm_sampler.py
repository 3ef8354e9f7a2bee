"""Sampling responses on a vLLM server: it is given the policy's weights as a Hugging Face folder, and prompts as ids.

The server runs in an environment of its own, started with VLLM_SERVER_DEV_MODE=1 (docs/operations.md). Here is no vLLM,
only HTTP: POST /collective_rpc with reload_weights, /reset_prefix_cache and /v1/completions, as of vLLM 0.32.
"""

import http.client
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.model.load import save_model
from rlhf.model.sampling import Sampling
from rlhf.training import distributed

READY_SECONDS = 300.0  # for a server that is still starting
ANSWER_SECONDS = 1800.0  # for one answer: new weights, or a response among all the others
AT_ONCE = 256  # requests under way, at most
LEAST_BIAS = -100.0  # of vLLM's logit_bias
LARGEST_GAP = 0.1  # between a server's log-probs and ours; bfloat16 on either side makes a tenth of that

Sampled = tuple[list[int], list[float]]  # a response's tokens and their log-probs


class VllmServer:
    """A server of `vllm serve` at `url`, e.g. http://127.0.0.1:8000. `vocabulary`: how many token ids the policy has.

    Every method raises UserError where the server does not answer, or refuses.
    """

    def __init__(self, url: str, vocabulary: int) -> None:
        self.url, self.vocabulary = url.rstrip("/"), vocabulary
        if not self.url.startswith(("http://", "https://")):
            raise self._error("must be like http://127.0.0.1:8000")
        self.suppressed: tuple[int, ...] = ()  # rows of the policy that nobody trained
        self.opener = build_opener(ProxyHandler({}))

    def _error(self, message: object) -> UserError:
        return UserError(f"ppo.vllm_url = {self.url!r}: {' '.join(str(message).split())[:300]}")

    def _ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = ANSWER_SECONDS) -> Any:
        """The answer to a GET, or with `body` to a POST of it: what its JSON says, None where it is empty."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        with self.opener.open(request, timeout=seconds) as answer:
            body_text = answer.read()
        return json.loads(body_text) if body_text else None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a POST."""
        try:
            return self._ask(path, body)
        except HTTPError as error:
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
            reason = error.read().decode(errors="replace") or error.reason
            raise self._error(f"{path} refused with {error.code}{hint}: {reason}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._error(f"{path} got no answer: {error}") from None

    def wait(self, seconds: float | None = None) -> None:
        """Returns when the server is ready, for which it has READY_SECONDS where nothing is said."""
        seconds = READY_SECONDS if seconds is None else seconds
        limit = time.monotonic() + seconds
        while True:
            try:
                self._ask("/health", seconds=10)
                return
            except (ValueError, http.client.InvalidURL) as error:
                raise self._error(error) from None
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > limit:
                    raise self._error(f"no server is ready there after {seconds:.0f} s: {error}") from None
            time.sleep(min(1.0, seconds / 10))

    def load(self, folder: Path) -> None:
        """Has the server take its weights from a Hugging Face folder, which it must see under the same path."""
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}})
        if not self._post("/reset_prefix_cache", {})["success"]:
            raise self._error("keeps what it computed with older weights: it has requests of somebody else")

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, noise: torch.Generator
               ) -> list[Sampled]:
        """One response per prompt, as `sample_responses` of rlhf/model/sampling.py: ids up to and including the stop
        token, or max_new_tokens without one; and the log-prob that the server drew each of them with.

        A prompt's seed is drawn from `noise` for its place in the list: a response does not depend on which others are
        under way, up to the server's rounding.
        """
        seeds = torch.randint(2**31, (len(prompts),), generator=noise).tolist()
        with ThreadPoolExecutor(max(1, min(AT_ONCE, sampling.batch_size, len(prompts)))) as pool:
            waiting = [pool.submit(self._complete, prompt, sampling, seed)
                       for prompt, seed in zip(prompts, seeds, strict=True)]
            try:
                return [item.result() for item in waiting]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error the other requests are not even sent

    def _complete(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Sampled:
        """One prompt's response. Whatever generation_config.json says is overridden: it is the plain softmax, in which
        the rows that nobody trained have no part."""
        answer = self._post("/v1/completions", {
            "prompt": list(prompt), "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature,
            "seed": seed, "stop_token_ids": list(sampling.stop_ids), "ignore_eos": True, "top_p": 1.0, "top_k": 0,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "add_special_tokens": False, "skip_special_tokens": False, "include_stop_str_in_output": True,
            "return_token_ids": True, "logprobs": 0,
            "logit_bias": {str(index): LEAST_BIAS for index in self.suppressed}})
        try:
            choice = answer["choices"][0]
            response = [int(token) for token in choice["token_ids"]]
            log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        except (LookupError, TypeError, ValueError):
            raise self._error("its answers lack token_ids or token_logprobs; vLLM 0.32 gives them") from None
        if max(response, default=0) >= self.vocabulary:
            raise self._error(f"it answers with token {max(response)}, and the policy has {self.vocabulary}: it serves "
                              "a model of another vocabulary")
        ended = bool(response) and response[-1] in sampling.stop_ids
        if set(response[:-1]) & set(sampling.stop_ids) or not (ended or len(response) == sampling.max_new_tokens):
            raise self._error(f"a response of {len(response)} tokens that neither ends with the stop token nor has "
                              f"{sampling.max_new_tokens}: is its --max-model-len too small?")
        if len(log_probs) != len(response):
            raise self._error(f"{len(log_probs)} log-probs for {len(response)} tokens")
        return response, log_probs

    def check(self, gap: float) -> None:
        """`gap`: mean difference, either way, of its log-probs and the policy's own, nats a token. Raises UserError
        beyond LARGEST_GAP: then it is not the policy that it samples from.
        """
        if not gap <= LARGEST_GAP:
            raise self._error(f"its log-probs are {gap:.2g} nats a token from the policy's (at most {LARGEST_GAP:g}): "
                              "start it on a folder of mlops.tools.vllm_copy, with --logprobs-mode processed_logprobs")


def sample_on(server: VllmServer, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
              prompts: Sequence[Sequence[int]], sampling: Sampling, noise: torch.Generator) -> list[Sampled]:
    """All prompts' responses from a server that gets the policy's current weights first. The main process asks it.

    Raises UserError in every process where the server does not do it. With LoRA it gets merged weights. Tied embeddings
    are written apart: of a tied model vLLM 0.32 takes new embeddings and keeps the old output layer, without a word.
    """
    answer: list[Sampled] | str = []
    with tempfile.TemporaryDirectory(prefix="instructflow-") as folder:
        if distributed.is_main() or distributed.sharded(policy):  # all have to give their parts of the weights
            save_model(policy, tokenizer, Path(folder), untie=True)
        if distributed.is_main():
            try:
                server.suppressed = tuple(policy.generation_config.suppress_tokens or ())
                server.load(Path(folder))
                answer = server.sample(prompts, sampling, noise)
            except UserError as error:
                answer = str(error)
    answer = distributed.broadcast(answer)
    if isinstance(answer, str):
        raise UserError(answer)
    return answer
