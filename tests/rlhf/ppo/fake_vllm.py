"""A server that answers like vLLM's, in a thread, for the tests of rlhf/ppo/vllm_sampler.py."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from rlhf.model.load import load_policy
from rlhf.model.sampling import Sampling, sample_responses


class Handler(BaseHTTPRequestHandler):
    server: "Fake"

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/health" else 404, None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
            code, said = self.server.broken.get(self.path) or (200, self.server.act(self.path, body))
        self.answer(code, said)

    def answer(self, code: int, said: Any) -> None:
        content = b"" if said is None else json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Fake(ThreadingHTTPServer):
    """A server with one model, which samples with rlhf/model/sampling.py, each request from a generator of its seed.

    Of a model with tied embeddings it would keep its old output layer, as vLLM 0.32 does.
    `asked`: paths and bodies of the POSTs, in order. `broken`: path -> status and JSON that it answers with instead.
    """

    request_queue_size = 300
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.lock = f"http://127.0.0.1:{self.server_address[1]}", threading.Lock()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.broken: dict[str, tuple[int, Any]] = {}
        self.model = load_policy(folder)

    def act(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            old, self.model = self.model, load_policy(body["kwargs"]["weights_path"])
            if self.model.config.tie_word_embeddings:
                self.model.set_output_embeddings(old.get_output_embeddings())
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        assert path == "/v1/completions"
        assert body["ignore_eos"]
        assert body["include_stop_str_in_output"]
        assert not body["skip_special_tokens"]
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1, 0, 0, 1)
        sampling = Sampling(body["max_tokens"], tuple(body["stop_token_ids"]), 0, body["temperature"])
        noise = torch.Generator().manual_seed(body["seed"])
        choice: dict[str, Any] = {"index": 0, "text": ""}
        if body["return_token_ids"]:
            response = sample_responses(self.model, [body["prompt"]], sampling, noise)[0]
            choice["token_ids"] = response
        if body["logprobs"] == 0:
            choice["logprobs"] = {"token_logprobs": self.log_probs(body["prompt"], response, body["temperature"])}
        return {"choices": [choice]}

    @torch.no_grad()
    def log_probs(self, prompt: list[int], response: list[int], temperature: float) -> list[float]:
        """As vLLM's with --logprobs-mode processed_logprobs."""
        logits = self.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1:-1]
        log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        return log_probs.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1).tolist()

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def completions(self) -> list[dict[str, Any]]:
        return [body for path, body in self.asked if path == "/v1/completions"]


@contextmanager
def serving(folder: Path) -> Iterator[Fake]:
    """A server that is started on the model in `folder`."""
    with Fake(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
