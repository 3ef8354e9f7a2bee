"""Rollouts from a pool of engines: weights, seeds, engines that die, are restarted, refuse, or answer nonsense.

The engines here answer like vLLM's server and get their weights over the real connection; real ones are in
tests/rlhf/engines/test_vllm.py.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import rlhf.engines.pool
from rlhf.engines.pool import Pool
from rlhf.engines.server import Sampled, Server
from rlhf.engines.transfer import BACKEND
from rlhf.errors import Unavailable, UserError
from rlhf.model.load import load_policy
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.ppo.run import run_iterations
from rlhf.ppo.trainer import Trainer
from rlhf.training import distributed
from tests.rlhf.engines.fake_engine import FakeEngine, serving

Make = Callable[..., Trainer]
Start = Callable[..., FakeEngine]
Folders = dict[str, tuple[Path, Path]]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_ENGINE_SECONDS", "1")
    monkeypatch.setattr(rlhf.engines.pool, "POLL_SECONDS", 0.02)


@pytest.fixture
def start(model_folders: Folders) -> Iterator[Start]:
    """start(architecture, tied=False): an engine."""
    with ExitStack() as stack:
        yield lambda architecture="llama", tied=False: stack.enter_context(
            serving(model_folders[architecture][0], tied))


@pytest.fixture
def prompts(prompt_texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in prompt_texts]


def noise(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool_of(*engines: FakeEngine) -> Pool:
    return Pool(",".join(engine.url for engine in engines), 320)


def greedy(tokenizer: PreTrainedTokenizerFast) -> Sampling:
    """Every twelfth token ends a response."""
    return Sampling(4, tuple(range(1, len(tokenizer), 12)), tokenizer.pad_token_id, temperature=0.0)


def said(*tokens: int, log_probs: list[float] | None = None) -> dict[str, Any]:
    """What an engine says that draws these tokens, by default as if nothing else had been likely."""
    log_probs = [0.0] * len(tokens) if log_probs is None else log_probs
    return {"choices": [{"token_ids": list(tokens), "logprobs": {"token_logprobs": log_probs}}]}


# --- one engine ------------------------------------------------------------------------------------------------------

def test_the_responses_are_the_policys_in_the_prompts_order(start: Start, prompts: list[list[int]],
                                                            model_folders: Folders,
                                                            tokenizer: PreTrainedTokenizerFast) -> None:
    engine, policy, sampling = start(), load_policy(model_folders["llama"][0]), replace(greedy(tokenizer), batch_size=1)
    pool = pool_of(engine)
    found, log_probs = zip(*pool.sample(policy, prompts, sampling, noise()), strict=True)
    assert list(found) == sample_responses(policy, prompts, sampling, noise())
    assert list(log_probs) == [engine.log_probs(*pair, 0.0) for pair in zip(prompts, found, strict=True)]
    assert {response[-1] in sampling.stop_ids for response in found} == {True, False}  # some are cut
    assert sorted(body["prompt"] for body in engine.completions()) == sorted(prompts)
    lengths = [len(body["prompt"]) for body in engine.completions()]
    assert lengths == sorted(lengths, reverse=True)  # one at a time, the longest first
    assert {(body["temperature"], body["max_tokens"]) for body in engine.completions()} == {(0.0, 4)}
    assert pool.sample(policy, [], sampling, noise()) == []


def test_every_prompt_has_a_seed_of_its_own(start: Start, model_folders: Folders,
                                            tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(16, (tokenizer.eos_token_id,), tokenizer.pad_token_id, batch_size=3)
    engine, policy = start(), load_policy(model_folders["llama"][0])
    pool, same = pool_of(engine), [[5, 6, 7]] * 6
    found = pool.sample(policy, same, sampling, noise())
    assert len({body["seed"] for body in engine.completions()}) == 6
    assert len({tuple(response) for response, _ in found}) == 6
    assert pool.sample(policy, same, sampling, noise()) == found
    assert pool.sample(policy, same, sampling, noise(12)) != found


@pytest.mark.parametrize(("path", "code", "said", "parts"), [
    ("/init_weight_transfer_engine", 404, {"detail": "Not Found"}, ["is not there", "VLLM_SERVER_DEV_MODE=1"]),
    ("/init_weight_transfer_engine", 500, {"error": {"message": "Weight transfer not configured."}},
     ["cannot connect", """--weight-transfer-config '{"backend": "instructflow"}'""", "not configured"]),
    ("/health", 404, {"detail": "Not Found"}, ["this is no vLLM server", "without /v1"]),
    ("/v1/completions", 404, {"detail": "Not Found"}, ["it serves no language model"]),
    ("/reset_prefix_cache", 200, {"success": False}, ["somebody else"]),
    ("/v1/completions", 400, {"error": {"message": "longer than\nthe maximum"}}, ["refused with 400", "maximum"]),
    ("/v1/completions", 200, {"choices": [{"text": "red"}]}, ["lack token_ids"]),
    ("/v1/completions", 200, {"choices": [{"token_ids": [5, 1], "logprobs": None}]}, ["lack token_ids"]),
    ("/v1/completions", 200, said(5, 320, 1), ["token 320", "another vocabulary"]),
    ("/v1/completions", 200, said(5, 6), ["a response of 2 tokens", "--max-model-len"]),
    ("/v1/completions", 200, said(1, 6, 1), ["a response of 3 tokens"]),
    ("/v1/completions", 200, said(5, 1, log_probs=[-1.0]), ["1 log-probs for 2 tokens"]),
    ("/v1/completions", 200, said(5, 1), ["nats a token from the policy's", "processed_logprobs"]),
])
def test_a_bad_answer_is_one_line(make_trainer: Make, prompt_texts: list[str], start: Start, path: str, code: int,
                                  said: Any, parts: list[str]) -> None:
    engine = start()
    trainer = make_trainer("llama", vllm_url=engine.url)
    assert trainer.models.codec.eos_id == 1
    engine.broken[path] = (code, said)
    with pytest.raises(UserError) as error:
        trainer.respond(trainer.models.codec.prompts(prompt_texts), 0)
    assert "\n" not in str(error.value)
    for part in ("ppo.vllm_url", *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(("url", "said"), [
    ("127.0.0.1:8000", "must be like http://"), ("http://127.0.0.1:port", "Port could not be cast"),
    ("http://127.0.0.1:8000, http://127.0.0.1:8000/", "names a server twice"), ("ftp://host", "must be like http://"),
])
def test_an_address_that_is_none(make_trainer: Make, url: str, said: str) -> None:
    with pytest.raises(UserError, match=f"ppo.vllm_url: .*{said}"):
        make_trainer("llama", vllm_url=url)


# --- weights ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_it_has_the_policys_weights_before_it_samples(make_trainer: Make, architecture: str, prompt_texts: list[str],
                                                      start: Start, lora_rank: int) -> None:
    engine = start(architecture)
    trainer = make_trainer(architecture, vllm_url=engine.url, lora_rank=lora_rank, lr=1e-2)
    prompts = trainer.models.codec.prompts(prompt_texts)
    ratios: list[float] = []
    for iteration in range(3):
        before = {name: value.clone() for name, value in trainer.models.policy.state_dict().items()}
        engine.asked.clear()
        rollouts = trainer.respond(prompts, iteration)
        join = ["/pause", "/init_weight_transfer_engine"] if iteration == 0 else []
        assert engine.paths() == [*join, "/pause", "/start_weight_update", "/update_weights", "/finish_weight_update",
                                  "/reset_prefix_cache", "/resume", *["/v1/completions"] * len(prompts)]
        assert all(torch.equal(value, before[name]) for name, value in trainer.models.policy.state_dict().items())
        with torch.no_grad():
            width = rollouts.mask.shape[1]
            theirs = trainer.models.log_probs(engine.model, prompts, rollouts.responses, width)
        torch.testing.assert_close(theirs, rollouts.log_probs, rtol=0, atol=1e-4)
        values = trainer.learn(rollouts, iteration)
        ratios.append(values["ppo/ratio_first"])
        assert 0 < values["ppo/sampler_gap"] < 1e-4
    assert ratios == pytest.approx([1, 1, 1], abs=1e-5)
    assert abs(rollouts.log_probs - rollouts.ref_log_probs).max() > 1e-3  # the weights were not the first ones


@pytest.mark.parametrize(("other", "tied", "parts"), [
    ("qwen2", False, ["tensors of the engine's are not in the policy", "q_proj.bias"]),
    ("gpt2", False, ["tensors of the policy's are not in the engine"]),
])
def test_an_engine_of_another_model_refuses_the_weights(make_trainer: Make, prompt_texts: list[str], start: Start,
                                                        other: str, tied: bool, parts: list[str]) -> None:
    engine = start(other, tied)
    trainer = make_trainer("llama", vllm_url=engine.url)
    with pytest.raises(UserError) as error:
        trainer.respond(trainer.models.codec.prompts(prompt_texts), 0)
    for part in ("ppo.vllm_url", engine.url, "refuses the weights", *parts):
        assert part in str(error.value)
    assert not engine.completions()
    assert all(not value.any() for value in engine.parameters.values())  # not even a part of it was taken


def test_an_engine_with_tied_embeddings_is_refused_with_the_remedy(make_trainer: Make, prompt_texts: list[str],
                                                                   start: Start) -> None:
    """Of a tied model vLLM 0.32 takes new embeddings and keeps the old output layer, without a word."""
    engine = start("gpt_neox", tied=True)
    trainer = make_trainer("gpt_neox", vllm_url=engine.url)
    assert trainer.models.policy.config.tie_word_embeddings
    with pytest.raises(UserError, match="tie_word_embeddings"):
        trainer.respond(trainer.models.codec.prompts(prompt_texts), 0)


def test_an_update_that_another_trainer_began_is_given_up(make_trainer: Make, prompt_texts: list[str], start: Start
                                                          ) -> None:
    """The engine is paused in the middle of it, and its trainer is gone."""
    engine = start()
    engine.paused = engine.updating = True
    trainer = make_trainer("llama", vllm_url=engine.url)
    rollouts = trainer.respond(trainer.models.codec.prompts(prompt_texts), 0)
    assert rollouts.sampler_gap is not None
    assert rollouts.sampler_gap < 1e-4


def test_a_new_trainer_takes_the_engine_over(make_trainer: Make, prompt_texts: list[str], start: Start) -> None:
    """The old one finds out, and gives it its own weights again."""
    engine = start()
    one, other = (make_trainer("llama", vllm_url=engine.url, lr=lr) for lr in (1e-2, 1e-3))
    prompts = one.models.codec.prompts(prompt_texts)
    for trainer in (one, other, one):
        gap = trainer.step(prompts, 0)[1]["ppo/sampler_gap"]
        assert gap < 1e-4


def test_what_an_engine_cannot_load_ends_the_run_with_its_words(make_trainer: Make, prompt_texts: list[str],
                                                                start: Start) -> None:
    engine = start()

    def load(name: str, value: torch.Tensor) -> None:
        if "mlp" in name:
            raise AssertionError(f"no room for {name}")

    engine.load = load  # type: ignore[method-assign]
    trainer = make_trainer("llama", vllm_url=engine.url)
    with pytest.raises(UserError, match=r"refuses the weights: cannot be loaded: AssertionError: no room for .*mlp"):
        trainer.respond(trainer.models.codec.prompts(prompt_texts), 0)
    del engine.load
    assert trainer.respond(trainer.models.codec.prompts(prompt_texts), 0).sampler_gap  # and nothing stands in the way


# --- engines that die ------------------------------------------------------------------------------------------------

def responses(trainer: Trainer, prompt_texts: list[str], iteration: int = 0) -> list[list[int]]:
    return trainer.respond(trainer.models.codec.prompts(prompt_texts), iteration).responses


@pytest.mark.parametrize("deaths", ["at once", "in the middle", "before the weights", "in the weights"])
def test_the_prompts_of_a_dead_engine_are_asked_of_the_others(make_trainer: Make, prompt_texts: list[str],
                                                              start: Start, deaths: str,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    alone = start()
    expected = responses(make_trainer("llama", vllm_url=alone.url), prompt_texts * 4)
    one, other = start(), start()
    trainer = make_trainer("llama", vllm_url=f"{one.url},{other.url}")
    if deaths == "before the weights":
        one.broken["/start_weight_update"] = (500, {"error": {"message": "EngineDeadError"}})
    elif deaths == "in the weights":
        def load(name: str, value: torch.Tensor) -> None:
            one.receiver.leave()  # its end of the connection is closed
            raise SystemExit

        one.load = load  # type: ignore[method-assign]
    else:
        one.dies_after = 0 if deaths == "at once" else 5
    assert responses(trainer, prompt_texts * 4) == expected
    assert len(one.completions()) == (5 if deaths == "in the middle" else 0)
    assert len(other.completions()) == len(expected) - len(one.completions())
    assert f"engine {one.url} is left out: " in caplog.text
    assert "pair.cc" not in caplog.text  # gloo names its own source files


def test_an_engine_that_is_away_from_the_start_is_said_once_and_welcomed(make_trainer: Make, prompt_texts: list[str],
                                                                         start: Start,
                                                                         caplog: pytest.LogCaptureFixture) -> None:
    one, other = start(), start()
    other.dead = True
    trainer = make_trainer("llama", vllm_url=f"{one.url},{other.url}", precision="bf16", lr=1e-4)
    prompts = trainer.models.codec.prompts(prompt_texts)
    for iteration in range(3):
        trainer.step(prompts, iteration)
    told = [record.message for record in caplog.records]
    assert told == [f"ppo: engine {one.url} computes in float32 and the policy in bfloat16: start it with --dtype "
                    "bfloat16", f"ppo: engine {other.url} is left out: does not answer"]
    other.restart()
    trainer.step(prompts, 3)
    assert caplog.records[-1].message == f"ppo: engine {other.url} is back"


def test_two_engines_share_the_prompts(make_trainer: Make, prompt_texts: list[str], start: Start) -> None:
    one, other = start(), start()
    responses(make_trainer("llama", vllm_url=f"{one.url},{other.url}"), prompt_texts * 4)
    assert min(len(one.completions()), len(other.completions())) >= 8


def test_an_engine_that_is_back_gets_the_weights_and_its_share(make_trainer: Make, prompt_texts: list[str],
                                                               start: Start) -> None:
    one, other = start(), start()
    trainer = make_trainer("llama", vllm_url=f"{one.url},{other.url}", lr=1e-2)
    prompts = trainer.models.codec.prompts(prompt_texts * 4)
    one.dies_after = 3
    trainer.step(prompts, 0)
    one.restart()
    one.asked.clear()
    assert trainer.step(prompts, 1)[1]["ppo/sampler_gap"] < 1e-4
    assert len(one.completions()) >= 8


def test_an_engine_that_was_restarted_meanwhile_is_found_out(make_trainer: Make, prompt_texts: list[str], start: Start
                                                             ) -> None:
    """It answers as if nothing had been, from other weights: these responses are dropped, and asked for again."""
    engine = start()
    trainer = make_trainer("llama", vllm_url=engine.url)
    expected = responses(trainer, prompt_texts)
    complete, count = Server.complete, 0

    def restarted(server: Server, prompt: Any, sampling: Sampling, seed: int) -> Sampled:
        nonlocal count
        count += 1
        if count == 3:
            with engine.lock:
                engine.restart()
        return complete(server, prompt, sampling, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "complete", restarted)
        assert responses(trainer, prompt_texts) == expected
    assert count > len(prompt_texts)


def test_a_pool_that_is_away_is_waited_for(make_trainer: Make, prompt_texts: list[str], start: Start,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_ENGINE_SECONDS", "60")
    engines = [start(), start()]
    trainer = make_trainer("llama", vllm_url=",".join(engine.url for engine in engines))
    expected = responses(trainer, prompt_texts)
    for engine in engines:
        engine.asked.clear()
        engine.dies_after = 2
    healthy, asked = Server.healthy, 0

    def answers(server: Server) -> bool:
        nonlocal asked
        asked += 1
        if asked == 5:
            engines[1].restart()
        return healthy(server)

    monkeypatch.setattr(Server, "healthy", answers)
    assert responses(trainer, prompt_texts) == expected
    assert asked >= 5


def test_a_pool_that_stays_away_ends_the_run_for_another_try(make_trainer: Make, prompt_texts: list[str], start: Start,
                                                             tmp_path: Path) -> None:
    """No iteration is lost: the next try goes on where this one ended, with the bytes of a run without a break."""
    engine = start()

    def run(folder: Path, dies_in: int | None = None) -> None:
        trainer = make_trainer("llama", vllm_url=engine.url, lr=1e-3)
        encoded = [(text, ids) for text, ids in zip(
            prompt_texts, trainer.models.codec.prompts(prompt_texts), strict=True)]
        respond = trainer.respond

        def responding(prompts: list[list[int]], iteration: int, drawn: Any) -> Any:
            engine.dead = engine.dead or iteration == dies_in
            return respond(prompts, iteration, drawn)

        trainer.respond = responding  # type: ignore[assignment, method-assign]
        run_iterations(trainer, encoded, 4, folder, None)

    run(tmp_path / "whole")
    with pytest.raises(Unavailable, match=r"no engine is ready after 1 s \(.*\); start it and run the same command"):
        run(tmp_path / "broken", dies_in=2)
    engine.restart()
    run(tmp_path / "broken")
    assert (tmp_path / "broken" / "journal.csv").read_bytes() == (tmp_path / "whole" / "journal.csv").read_bytes()


# --- several processes -----------------------------------------------------------------------------------------------

def test_of_several_processes_the_first_asks(model_folders: Folders, prompts: list[list[int]], start: Start,
                                             tokenizer: PreTrainedTokenizerFast,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    engine, policy = start(), load_policy(model_folders["llama"][0])
    expected = pool_of(engine).sample(policy, prompts, greedy(tokenizer), noise())
    asked = len(engine.asked)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    answers: list[Any] = [("", ""), False, ("", ""), True, expected]
    monkeypatch.setattr(distributed, "broadcast", lambda thing: answers.pop(0))
    assert pool_of(engine).sample(policy, prompts, greedy(tokenizer), noise()) == expected
    answers.extend([("Unavailable", "what the first was told")])
    with pytest.raises(Unavailable, match="what the first was told"):
        pool_of(engine).sample(policy, prompts, greedy(tokenizer), noise())
    assert len(engine.asked) == asked


def test_the_backend_s_name_is_that_of_the_docs() -> None:
    assert BACKEND in Path("docs/rollout-engines.md").read_text(encoding="utf-8")
