"""An engine that answers like vLLM's server with this project's plugin, in a thread: its weights come over the real
connection (rlhf/engines/transfer.py) into a model of ours."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from rlhf.engines.transfer import Receiver
from rlhf.model.load import load_policy, not_saved
from rlhf.model.sampling import Sampling, sample_responses


class Handler(BaseHTTPRequestHandler):
    server: "FakeEngine"

    def do_GET(self) -> None:
        found = {"/health": None, "/get_world_size": {"world_size": 1},
                 "/weight_info": {"weight_version": self.server.version}}
        if self.server.dead:
            self.close_connection = True
            return
        code, said = self.server.broken.get(self.path) or (
            (200, found[self.path]) if self.path in found else (404, {"detail": "Not Found"}))
        self.answer(code, said)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.path.partition("?")[0]
        server = self.server
        with server.lock:
            if server.dead or (path == "/v1/completions" and server.dies_after == len(server.completions())):
                server.dead = self.close_connection = True
                return
            server.asked.append((path, body))
            try:
                code, said = server.broken.get(path) or (200, server.act(path, body))
            except Exception as error:
                code, said = 500, {"error": {"message": str(error)}}
        self.answer(code, said)

    def answer(self, code: int, said: Any) -> None:
        content = b"" if said is None else json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class FakeEngine(ThreadingHTTPServer):
    """An engine with one worker, which samples with rlhf/model/sampling.py, each request from a generator of its seed.

    It has an output layer of its own, as vLLM with tie_word_embeddings off, unless it is `tied`.
    `asked`: paths and bodies of the POSTs, in order. `broken`: path -> status and JSON that it answers with instead.
    `dies_after`: so many responses; then it answers nothing.
    """

    request_queue_size = 300
    daemon_threads = True

    def __init__(self, folder: Path, tied: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.lock = f"http://127.0.0.1:{self.server_address[1]}", threading.Lock()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.broken: dict[str, tuple[int, Any]] = {}
        self.dies_after, self.dead = -1, False
        self.model = load_policy(folder)
        output = self.model.get_output_embeddings()
        self.tied = tied
        if not tied:
            output.weight = torch.nn.Parameter(output.weight.detach().clone())
        self.restart()

    def restart(self) -> None:
        """A new process at the same address: it has no trainer, and weights of its own."""
        self.version, self.updating, self.paused, self.dead, self.dies_after = "default", False, False, False, -1
        self.parameters = {name: value for name, value in self.model.named_parameters()
                           if name not in not_saved(self.model)}
        self.receiver = Receiver({name: list(value.shape) for name, value in self.parameters.items()},
                                 {"dtype": "float32", "tied": self.tied}, torch.device("cpu"))
        with torch.no_grad():
            for value in self.parameters.values():
                value.zero_()

    @torch.no_grad()
    def load(self, name: str, value: torch.Tensor) -> None:
        self.parameters[name].copy_(value)

    def act(self, path: str, body: dict[str, Any]) -> Any:
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
            return {}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path == "/init_weight_transfer_engine":
            return self.receiver.join(body["init_info"], 0)
        if path == "/start_weight_update":
            if self.updating:
                raise RuntimeError("start_weight_update called while a weight update is already active.")
            assert self.paused
            self.updating = True
            return {}
        if path == "/update_weights":
            if not self.updating:
                raise RuntimeError("start_weight_update must be called before update_weights.")
            try:
                self.receiver.receive(body["update_info"], self.load)
            except BaseException:
                self.updating = False
                raise
            return {}
        if path == "/finish_weight_update":
            assert self.updating
            self.updating, self.version = False, body["weight_version"]
            return {}
        assert path == "/v1/completions"
        assert not self.paused
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
def serving(folder: Path, tied: bool = False) -> Iterator[FakeEngine]:
    """An engine that is started on the model in `folder`, all of whose weights are 0."""
    with FakeEngine(folder, tied) as engine:
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield engine
        finally:
            engine.shutdown()
            thread.join()
