"""Fixtures of the library's tests: a small tokenizer, tiny random models of two architectures, one CPU thread."""

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.model.load import new_scorer, save_model
from rlhf.model.tokenizer import train_tokenizer
from rlhf.params import PpoParams
from rlhf.ppo.trainer import Trainer
from rlhf.training.checkpoint import StopSignal
from rlhf.training.settings import fast_enabled

needs_fast = pytest.mark.skipif(not fast_enabled(), reason="tests what INSTRUCTFLOW_FAST=off switches off")

WITH_DROPOUT = ("gpt_neox", "gpt2")  # residual dropout, a bias in the final norm
ARCHITECTURES = (*WITH_DROPOUT, "llama", "qwen2")


@pytest.fixture(scope="session", autouse=True)
def one_cpu_thread() -> Iterator[None]:
    """These tests are about numbers: they run on one CPU thread, whatever the machine has."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def unchanged_signals() -> Iterator[None]:
    """Trainers listen to SIGTERM; the test process goes on as before."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    StopSignal.requested = False


@pytest.fixture
def save_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers write a checkpoint after every step instead of every 30 seconds."""
    monkeypatch.setenv("INSTRUCTFLOW_CHECKPOINT_SECONDS", "0")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Short made-up lines to train a tokenizer on."""
    rng = random.Random(7)
    words = ("what", "where", "color", "home", "is", "the", "does", "live", "eat", "red", "blue", "forest", "desert",
             "ba-do", "mi-ka", "rice", "fish", "you", "mean", "or")
    return [" ".join(rng.choices(words, k=rng.randrange(3, 9))) + "." for _ in range(300)]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    """Pretraining text as data/corpus.jsonl holds it."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 3))
    return path


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, 320)


@pytest.fixture(scope="session")
def make_policy(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """make_policy(architecture, seed): a random model with 2 blocks of width 32 and uneven predictions.

    EOS is made likely enough (by the final norm's bias, or its row of the output) that responses end at different
    lengths.
    """
    def make(architecture: str, seed: int = 0, dropout: float = 0.0) -> Any:
        torch.manual_seed(seed)
        shape = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.eos_token_id,
                 "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
                 "initializer_range": 0.2, "attn_implementation": "eager"}
        if architecture == "gpt2":
            model: Any = GPT2LMHeadModel(GPT2Config(
                n_positions=128, n_embd=32, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=0.0, attn_pdrop=0.0,
                **shape))
            norm, strength = model.transformer.ln_f, 4.0
        elif architecture in ("llama", "qwen2"):
            config, kind = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[
                architecture]
            model = kind(config(max_position_embeddings=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, **shape))
            with torch.no_grad():  # no bias: one direction speaks for EOS
                model.lm_head.weight[tokenizer.eos_token_id] = torch.eye(32)[0] * 5
            return model.eval()
        else:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(
                max_position_embeddings=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, rotary_pct=0.5, tie_word_embeddings=True, hidden_dropout=dropout, **shape))
            norm, strength = model.gpt_neox.final_layer_norm, 2.5
        direction = model.get_output_embeddings().weight[tokenizer.eos_token_id].detach()
        norm.bias.data += strength * direction / direction.square().sum()
        return model.eval()
    return make


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast,
                  make_policy: Callable[..., Any]) -> dict[str, tuple[Path, Path]]:
    """architecture -> (policy folder, reward model folder), both as the stages write them."""
    folders = {}
    for architecture in ARCHITECTURES:
        policy, scorer = (tmp_path_factory.mktemp(f"{architecture}-{kind}") for kind in ("policy", "rm"))
        save_model(make_policy(architecture), tokenizer, policy)
        head = torch.Generator().manual_seed(3)
        save_model(new_scorer(policy, tokenizer.pad_token_id, head), tokenizer, scorer)
        folders[architecture] = (policy, scorer)
    return folders


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy_folder(model_folders: dict[str, tuple[Path, Path]], architecture: str) -> Path:
    return model_folders[architecture][0]


@pytest.fixture
def ppo_params() -> Callable[..., PpoParams]:
    """ppo_params(**changes): exact arithmetic and a size that runs in milliseconds."""
    def make(**changes: Any) -> PpoParams:
        sizes: dict[str, Any] = {
            "episodes": 24, "batch_size": 8, "minibatch_size": 4, "micro_batch_size": 2, "inner_epochs": 1,
            "max_new_tokens": 8, "precision": "fp32", "lr": 1e-3, "value_lr": 1e-3, "warmup_iterations": 0}
        return PpoParams(**(sizes | changes))
    return make


@pytest.fixture
def longer_llama(model_folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """The tiny Llama, which may read 512 tokens: its positions are no parameters."""
    folder = shutil.copytree(model_folders["llama"][0], tmp_path / "longer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.fixture
def make_trainer(model_folders: dict[str, tuple[Path, Path]],
                 ppo_params: Callable[..., PpoParams]) -> Callable[..., Trainer]:
    """make_trainer(architecture="gpt_neox", **params): a trainer on the tiny models, everything from seed 5."""
    def make(architecture: str = "gpt_neox", **changes: Any) -> Trainer:
        policy, scorer = model_folders[architecture]
        return Trainer(ppo_params(**changes), policy, scorer, seed=5)
    return make


@pytest.fixture
def prompt_texts() -> list[str]:
    """Prompts of different lengths."""
    return ["what color is the ba-do?", "where does it live?", "is the mi-ka red or blue?", "red.", "rice or fish?",
            "the ba-do and the mi-ka live in the forest.", "you mean what?", "does the home of the mi-ka eat rice?"]


@pytest.fixture
def copy_folder(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy that a test may change."""
    def copy(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / source.name))
    return copy


@pytest.fixture
def tokens_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """tokens_of(module): the numbers of tokens that the module is given from now on."""
    def watch(module: Any) -> list[int]:
        seen: list[int] = []
        kind = type(module)
        own = kind.forward

        def counting(some: torch.nn.Module, state: torch.Tensor) -> torch.Tensor:
            if some is module:
                seen.append(state.numel() // state.shape[-1])
            return own(some, state)

        monkeypatch.setattr(kind, "forward", counting)
        return seen
    return watch
