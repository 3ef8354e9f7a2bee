"""Real engines of vLLM: `make engines`, then `pytest -m engines`. Minutes, on a CPU.

INSTRUCTFLOW_ENGINE_MODEL names another model's folder for the comparison of greedy responses, e.g. of SmolLM2-135M.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mlops.tools.engine import ENVIRONMENT
from rlhf.engines.pool import Pool
from rlhf.engines.server import Server
from rlhf.errors import UserError
from rlhf.model.chat_format import PromptCodec
from rlhf.model.load import load_policy, new_scorer, not_saved, save_model
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.tokenizer import load_tokenizer
from rlhf.params import PpoParams, PretrainParams
from rlhf.ppo.trainer import Trainer
from rlhf.pretrain import take_base_model

ROOT = Path(__file__).parents[3]
VLLM = Path(os.environ.get("INSTRUCTFLOW_VLLM", ROOT / ENVIRONMENT / "bin" / "vllm"))
START_SECONDS = 600.0

pytestmark = [pytest.mark.engines, pytest.mark.skipif(not VLLM.exists(), reason="needs `make engines`")]


class Engine:
    """An engine in a process of its own, as `mlops.tools.engine` starts it."""

    def __init__(self, model: Path, folder: Path, *more: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self.model, self.folder, self.more = f"http://127.0.0.1:{self.port}", model, folder, more
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with (self.folder / f"engine-{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlops.tools.engine", str(self.model), "--port", str(self.port), "--",
                 "--max-model-len", "96", *self.more], stdout=log, stderr=log, start_new_session=True, cwd=ROOT,
                env={**os.environ, "PATH": f"{VLLM.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"})

    def wait(self) -> "Engine":
        limit = time.monotonic() + START_SECONDS
        while not Server(self.url, 1).healthy():
            said = (self.folder / f"engine-{self.port}.log").read_text()
            assert not self.process or self.process.poll() is None, said[-3000:]
            assert time.monotonic() < limit
            time.sleep(0.5)
        return self

    def kill(self) -> None:
        """Everything of it at once, as its machine's end."""
        process, self.process = self.process, None
        if process and process.poll() is None:
            for part in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                with suppress(psutil.NoSuchProcess):
                    part.kill()  # its worker leaves the process group
            process.wait()


@contextmanager
def engines(model: Path, folder: Path, count: int, *more: str) -> Iterator[list[Engine]]:
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            started.append(Engine(model, folder, *more))
            stack.callback(started[-1].kill)
        yield [engine.wait() for engine in started]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
           ) -> dict[str, tuple[Path, Path]]:
    """Policy and reward model: heads of 32, which vLLM's CPU attention takes; those of the other tests have 16."""
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "hidden_size": 64,
                             "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                             "initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id,
                             "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.eos_token_id}
    made: dict[str, Any] = {
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(rotary_pct=0.5, tie_word_embeddings=True, **shape)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, tie_word_embeddings=True, **shape))}
    folders = {}
    for name, model in made.items():
        policy, scorer = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-rm")
        save_model(model.eval(), tokenizer, policy)
        save_model(new_scorer(policy, tokenizer.pad_token_id, torch.Generator().manual_seed(3)), tokenizer, scorer)
        folders[name] = policy, scorer
    return folders


def noise(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["gpt_neox", "qwen2", "INSTRUCTFLOW_ENGINE_MODEL"])
def test_after_each_update_greedy_responses_are_the_policys(models: dict[str, tuple[Path, Path]], name: str,
                                                            tmp_path: Path) -> None:
    """Tied embeddings; two engines. Without the update (the control) the responses are others."""
    if name not in models and name not in os.environ:
        pytest.skip(f"{name} names no model")
    folder = models[name][0] if name in models else tmp_path / "model"
    if name not in models:  # as stage pretrain takes it: with a PAD token, and rows that nobody trains
        take_base_model(PretrainParams(base_model=os.environ[name]), tmp_path)
    policy, tokenizer = load_policy(folder).float(), load_tokenizer(folder)
    codec, size = PromptCodec(tokenizer), len(tokenizer)
    rows = torch.randint(3, size - 5, (64, 24), generator=noise()).tolist()
    prompts = [row[:4 + number % 20] for number, row in enumerate(rows)]
    greedy = Sampling(24, codec.stop_ids, codec.pad_id, temperature=0.0)
    trained = [value for key, value in policy.named_parameters() if key not in not_saved(policy)]
    first = [value.detach().clone() for value in trained]
    before: list[list[int]] = []
    with engines(folder, tmp_path, 2) as pair:
        pool = Pool(",".join(engine.url for engine in pair), policy.config.vocab_size)
        for update in range(5):
            with torch.no_grad():
                for number, (value, start) in enumerate(zip(trained, first, strict=True)):
                    value.copy_(start + 0.05 * update * start.std() * torch.randn(value.shape, generator=noise(number)))
            found = [response for response, _ in pool.sample(policy, prompts, greedy, noise())]
            expected = sample_responses(policy, prompts, greedy, noise())
            equal = [sum(one == other for one, other in zip(some, expected, strict=True))
                     for some in (found, before or found)]
            print(f"{name}, update {update}: {equal[0]} of 64 greedy responses equal; of the one before {equal[1]}")
            assert equal[0] == 64
            assert not update or equal[1] < 64
            before = expected


@pytest.fixture
def trainer_on(models: dict[str, tuple[Path, Path]], ppo_params: Callable[..., PpoParams]) -> Callable[..., Trainer]:
    return lambda name, **changes: Trainer(ppo_params(**changes), *models[name], seed=5)


def test_killed_engines_cost_no_iteration(trainer_on: Callable[..., Trainer], models: dict[str, tuple[Path, Path]],
                                          prompt_texts: list[str], tmp_path: Path) -> None:
    """One of two in iteration 2, both in iteration 3, in the middle of their work; they are started again."""
    with engines(models["gpt_neox"][0], tmp_path, 2) as pair:
        trainer = trainer_on("gpt_neox", vllm_url=",".join(engine.url for engine in pair), max_new_tokens=24)
        prompts = trainer.models.codec.prompts(prompt_texts * 16)
        complete, asked, to_kill = Server.complete, 0, [0]

        def killing(server: Server, *arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == 20:
                for engine in pair[:to_kill[0]]:
                    engine.kill()
                    threading.Timer(3.0, engine.start).start()
            return complete(server, *arguments)

        gaps = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Server, "complete", killing)
            for iteration in range(5):
                asked, to_kill[0] = 0, {2: 1, 3: 2}.get(iteration, 0)
                rollouts, values = trainer.step(prompts, iteration)
                assert all(rollouts.responses)
                gaps.append(values["ppo/sampler_gap"])
                if iteration == 2:
                    pair[0].wait()
        assert max(gaps) < 1e-4


def test_an_engine_of_another_model_refuses_by_name(trainer_on: Callable[..., Trainer], prompt_texts: list[str],
                                                    models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """And takes the weights of its own model's trainer afterwards; half an update is given up."""
    with engines(models["qwen2"][0], tmp_path, 1) as [engine]:
        other = trainer_on("gpt_neox", vllm_url=engine.url)
        prompts = other.models.codec.prompts(prompt_texts)
        with pytest.raises(UserError, match=r"refuses the weights: \d+ tensors of the engine's are not in the policy"):
            other.respond(prompts, 0)
        server = Server(engine.url, 320)
        server.connect()
        server.ask("/start_weight_update", {})  # and no more: its trainer is gone
        right = trainer_on("qwen2", vllm_url=engine.url)
        for iteration in range(2):
            assert right.step(prompts, iteration)[1]["ppo/sampler_gap"] < 1e-4
