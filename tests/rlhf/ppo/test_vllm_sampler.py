"""Rollouts from a vLLM server: what it is asked, in which order, and what comes of a bad answer. One that answers like
vLLM runs in a thread; where INSTRUCTFLOW_VLLM_URL names a real one (docs/operations.md), that is asked too."""


import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import rlhf.ppo.vllm_sampler
from mlops.tools.vllm_copy import vllm_copy
from rlhf.errors import UserError
from rlhf.model.chat_format import PromptCodec
from rlhf.model.load import load_policy, save_model
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.tokenizer import load_tokenizer
from rlhf.ppo.trainer import Trainer
from rlhf.ppo.vllm_sampler import Sampled, VllmServer, sample_on
from rlhf.training import distributed
from tests.rlhf.ppo.fake_vllm import Fake, serving

Make = Callable[..., Trainer]


@pytest.fixture
def fake(model_folders: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A server whose first model is one that no trainer here has."""
    monkeypatch.setattr(rlhf.ppo.vllm_sampler, "READY_SECONDS", 1.0)
    with serving(model_folders["qwen2"][0]) as server:
        yield server


@pytest.fixture
def prompts(prompt_texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in prompt_texts]


def noise(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stops_for(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Every twelfth token ends a response."""
    return tuple(range(1, len(tokenizer), 12))


def said(*tokens: int, log_probs: list[float] | None = None) -> dict[str, Any]:
    """What a server says that draws these tokens, by default as if nothing else had been likely."""
    log_probs = [0.0] * len(tokens) if log_probs is None else log_probs
    return {"choices": [{"token_ids": list(tokens), "logprobs": {"token_logprobs": log_probs}}]}


# --- the client ------------------------------------------------------------------------------------------------------

def test_the_responses_are_those_of_the_prompts_in_their_order(fake: Fake, prompts: list[list[int]],
                                                               tokenizer: PreTrainedTokenizerFast) -> None:
    stops = stops_for(tokenizer)
    greedy = Sampling(4, stops, tokenizer.pad_token_id, temperature=0.0)
    server = VllmServer(fake.url + "/", len(tokenizer))
    server.wait()
    found, log_probs = zip(*server.sample(prompts, greedy, noise()), strict=True)
    assert list(found) == sample_responses(fake.model, prompts, greedy, noise())
    assert list(log_probs) == [fake.log_probs(*pair, 0.0) for pair in zip(prompts, found, strict=True)]
    assert {response[-1] in stops for response in found} == {True, False}  # some are cut at max_new_tokens
    assert sorted(body["prompt"] for body in fake.completions()) == sorted(prompts)
    assert {(body["temperature"], body["max_tokens"]) for body in fake.completions()} == {(0.0, 4)}
    assert server.sample([], greedy, noise()) == []


def test_every_prompt_has_a_seed_of_its_own(fake: Fake, tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(16, (tokenizer.eos_token_id,), tokenizer.pad_token_id, batch_size=3)
    server = VllmServer(fake.url, len(tokenizer))
    found = server.sample([[5, 6, 7]] * 6, sampling, noise())
    assert len({body["seed"] for body in fake.completions()}) == 6
    assert len({tuple(response) for response, _ in found}) == 6
    assert server.sample([[5, 6, 7]] * 6, sampling, noise()) == found
    assert server.sample([[5, 6, 7]] * 6, sampling, noise(12)) != found


@pytest.mark.parametrize(("path", "code", "said", "parts"), [
    ("/collective_rpc", 404, {"detail": "Not Found"}, ["refused with 404", "VLLM_SERVER_DEV_MODE=1"]),
    ("/collective_rpc", 500, {"error": {"message": "shape\nmismatch"}}, ["/collective_rpc refused with 500", "shape"]),
    ("/reset_prefix_cache", 200, {"success": False}, ["somebody else"]),
    ("/v1/completions", 400, {"error": {"message": "longer than the maximum"}}, ["refused with 400", "maximum"]),
    ("/v1/completions", 200, {"choices": [{"text": "red"}]}, ["lack token_ids"]),
    ("/v1/completions", 200, {"choices": [{"token_ids": [5, 1], "logprobs": None}]}, ["lack token_ids"]),
    ("/v1/completions", 200, said(5, 320, 1), ["token 320", "another vocabulary"]),
    ("/v1/completions", 200, said(5, 6), ["a response of 2 tokens", "--max-model-len"]),
    ("/v1/completions", 200, said(1, 6, 1), ["a response of 3 tokens"]),
    ("/v1/completions", 200, said(5, 1, log_probs=[-1.0]), ["1 log-probs for 2 tokens"]),
    ("/v1/completions", 200, said(5, 1),
     ["nats a token from the policy's", "mlops.tools.vllm_copy", "processed_logprobs"]),
])
def test_a_bad_answer_is_one_line(make_trainer: Make, prompt_texts: list[str], fake: Fake, path: str, code: int,
                                  said: Any, parts: list[str]) -> None:
    trainer = make_trainer("llama", vllm_url=fake.url)
    assert trainer.models.policy.config.vocab_size == 320
    assert trainer.models.codec.eos_id == 1
    fake.broken[path] = (code, said)
    with pytest.raises(UserError) as error:
        trainer.respond(trainer.models.codec.prompts(prompt_texts), 0)
    assert "\n" not in str(error.value)
    for part in ("ppo.vllm_url", fake.url, *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(("url", "said"), [
    ("http://127.0.0.1:9", "no server is ready there after 1 s"), ("127.0.0.1:8000", "must be like http://"),
    ("http://127.0.0.1:port", "nonnumeric port"),
])
def test_a_server_that_is_not_there(make_trainer: Make, monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setattr(rlhf.ppo.vllm_sampler, "READY_SECONDS", 1.0)
    with pytest.raises(UserError, match=f"ppo.vllm_url = '{url}': .*{said}"):
        make_trainer("llama", vllm_url=url)


def test_a_server_that_goes_away(make_trainer: Make, prompt_texts: list[str], fake: Fake) -> None:
    trainer = make_trainer("llama", vllm_url=fake.url)
    fake.server_close()
    with pytest.raises(UserError, match="/collective_rpc got no answer"):
        trainer.respond(trainer.models.codec.prompts(prompt_texts), 0)


# --- PPO -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_it_has_the_policys_weights_before_it_samples(make_trainer: Make, architecture: str, prompt_texts: list[str],
                                                      fake: Fake, lora_rank: int) -> None:
    trainer = make_trainer(architecture, vllm_url=fake.url, lora_rank=lora_rank, lr=1e-2)
    prompts = trainer.models.codec.prompts(prompt_texts)
    ratios: list[float] = []
    for iteration in range(3):
        before = {name: value.clone() for name, value in trainer.models.policy.state_dict().items()}
        fake.asked.clear()
        rollouts = trainer.respond(prompts, iteration)
        assert fake.paths() == ["/collective_rpc", "/reset_prefix_cache", *["/v1/completions"] * len(prompts)]
        assert all(torch.equal(value, before[name]) for name, value in trainer.models.policy.state_dict().items())
        with torch.no_grad():
            width = rollouts.mask.shape[1]
            theirs = trainer.models.log_probs(fake.model, prompts, rollouts.responses, width)
        torch.testing.assert_close(theirs, rollouts.log_probs, rtol=0, atol=1e-4)
        assert not Path(fake.asked[0][1]["kwargs"]["weights_path"]).exists()  # it was for that only
        values = trainer.learn(rollouts, iteration)
        ratios.append(values["ppo/ratio_first"])
        assert 0 < values["ppo/sampler_gap"] < 1e-4
    assert ratios == pytest.approx([1, 1, 1], abs=1e-5)
    assert abs(rollouts.log_probs - rollouts.ref_log_probs).max() > 1e-3  # the weights were not the first ones


def test_the_trainer_asks_for_its_seed_and_iteration(make_trainer: Make, prompt_texts: list[str], fake: Fake) -> None:
    trainer = make_trainer("llama", vllm_url=fake.url, temperature=0.7, max_new_tokens=5)
    prompts = trainer.models.codec.prompts(prompt_texts)
    one, other, again = (trainer.respond(prompts, iteration).responses for iteration in (0, 1, 0))
    assert one == again != other
    assert {(body["temperature"], body["max_tokens"]) for body in fake.completions()} == {(0.7, 5)}
    assert {tuple(body["stop_token_ids"]) for body in fake.completions()} == {(trainer.models.codec.eos_id,)}


def test_of_several_processes_the_first_asks(make_trainer: Make, prompt_texts: list[str], fake: Fake,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("llama", vllm_url=fake.url)
    prompts = trainer.models.codec.prompts(prompt_texts)

    def ask() -> list[Sampled]:
        return sample_on(VllmServer(fake.url, 320), trainer.models.policy, trainer.models.tokenizer, prompts,
                         trainer.sampling, noise())

    expected = ask()
    asked = len(fake.asked)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "broadcast", lambda thing: expected)
    assert ask() == expected
    monkeypatch.setattr(distributed, "broadcast", lambda thing: "what the first was told")
    with pytest.raises(UserError, match="what the first was told"):
        ask()
    assert len(fake.asked) == asked


def test_a_server_that_keeps_older_weights_is_found_out(make_trainer: Make, prompt_texts: list[str], fake: Fake,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("gpt_neox", vllm_url=fake.url, lr=1e-2)
    prompts = trainer.models.codec.prompts(prompt_texts)
    trainer.step(prompts, 0)[1]
    monkeypatch.setattr(VllmServer, "load", lambda server, folder: None)
    with pytest.raises(UserError, match="nats a token from the policy's"):
        trainer.respond(prompts, 1)


def test_a_copy_that_a_server_can_be_started_on(model_folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Tied or not: the same logits, an output layer of its own, which a tied model's own folder has not."""
    for architecture in ("gpt_neox", "qwen2"):
        vllm_copy(model_folders[architecture][0], tmp_path / architecture)
        one, other = load_policy(model_folders[architecture][0]), load_policy(tmp_path / architecture)
        with torch.no_grad():
            ids = torch.tensor([[5, 6, 7]])
            assert torch.equal(one(ids).logits, other(ids).logits)
        assert not other.config.tie_word_embeddings
        assert other.get_output_embeddings().weight is not other.get_input_embeddings().weight
        assert load_tokenizer(tmp_path / architecture).eos_token_id == other.config.eos_token_id
    with pytest.raises(UserError, match="not empty"):
        vllm_copy(model_folders["gpt_neox"][0], tmp_path / "gpt_neox")
    with pytest.raises(UserError, match=r"no model folder \(no config\.json\)"):
        vllm_copy(tmp_path, tmp_path / "other")


# --- a real server ---------------------------------------------------------------------------------------------------

@pytest.mark.skipif("INSTRUCTFLOW_VLLM_URL" not in os.environ, reason="INSTRUCTFLOW_VLLM_URL names no vLLM server")
def test_a_real_server_says_what_our_sampler_says(tmp_path: Path) -> None:
    """A server of the model in INSTRUCTFLOW_VLLM_MODEL, in float32: greedy responses, before and after new weights.

    Equal but for ties, which rounding may turn.
    """
    folder = Path(os.environ["INSTRUCTFLOW_VLLM_MODEL"])
    policy, tokenizer = load_policy(folder), load_tokenizer(folder)
    eos, size = PromptCodec(tokenizer).eos_id, policy.config.vocab_size
    rows = torch.randint(3, size, (64, 24), generator=noise()).tolist()
    prompts = [row[:4 + number % 20] for number, row in enumerate(rows)]
    greedy, drawn = (Sampling(24, (eos, 5, 6, 7), 0, temperature=heat) for heat in (0.0, 1.0))
    server = VllmServer(os.environ["INSTRUCTFLOW_VLLM_URL"], size)
    server.wait()
    seen: list[list[list[int]]] = []
    for spread in (0.0, 0.3, 0.0):
        with torch.no_grad():
            for number, value in enumerate(policy.parameters()):
                shift = torch.randn(value.shape, generator=noise(number)) * value.std()
                value.copy_(load_weights(folder)[number] + spread * shift)
        save_model(policy, tokenizer, tmp_path / f"{len(seen)}", untie=True)
        server.load(tmp_path / f"{len(seen)}")
        found = [response for response, _ in server.sample(prompts, greedy, noise())]
        expected = sample_responses(policy, prompts, greedy, noise())
        equal = sum(one == other for one, other in zip(found, expected, strict=True))
        print(f"greedy: {equal} of {len(prompts)} responses equal; {len({len(item) for item in found})} lengths")
        assert equal >= 0.95 * len(prompts)
        seen.append(found)
    assert seen[0] == seen[2] != seen[1]
    many = server.sample(prompts[:1] * 64, drawn, noise())
    assert len({tuple(response) for response, _ in many}) > 8


def load_weights(folder: Path) -> list[torch.Tensor]:
    return [value.detach() for value in load_policy(folder).parameters()]
