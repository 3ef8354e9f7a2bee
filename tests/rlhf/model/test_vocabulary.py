"""Rows of the output layer that nobody trained: probability 0 in every pass, and under plain transformers too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf.fast.decoder import decoder_for
from rlhf.model.chat_format import load_codec
from rlhf.model.forward import log_probs_at, next_token_logits, pack
from rlhf.model.load import load_policy, save_model
from rlhf.model.log_probs import entropy
from rlhf.model.responses import categorical_kl, response_logits
from rlhf.model.sampling import Sampling, sample_responses
from rlhf.model.vocabulary import NEVER, describe, untrained_ids
from rlhf.params import PretrainParams
from rlhf.pretrain import take_base_model
from rlhf.training.seeding import generator
from tests.rlhf.model.families import FAMILIES, build
from tests.tiny_model import write_model

PADDED = 7  # rows beyond the tokenizer's


def gpt2(tokenizer: Any, rows: int, shift: float, seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2 whose logits of all rows are near `shift`: its final norm's bias has a part along every row."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=rows, n_positions=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, attn_implementation="eager"))
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 1.0
        model.transformer.ln_f.weight[0] = 0.0
        model.transformer.ln_f.bias[0] = shift
    return model.eval()


@pytest.fixture(params=[-60.0, 20.0])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Any]:
    """(the model as given, without PAD; its folder as the first stage makes it; the stage's metrics)."""
    tokenizer = build("gpt2", tmp_path / "given")
    gpt2(tokenizer, len(tokenizer) + PADDED, request.param).save_pretrained(tmp_path / "given")
    metrics = take_base_model(PretrainParams(base_model=str(tmp_path / "given")), tmp_path / "made")
    return tmp_path / "given", tmp_path / "made" / "model", metrics


def test_rows_that_nobody_trained_have_probability_0_in_every_pass(base: tuple[Path, Path, Any]) -> None:
    given, folder, _ = base
    codec, policy = load_codec(folder), load_policy(folder)
    rows = policy.get_output_embeddings().weight.shape[0]
    dead = untrained_ids(codec.tokenizer, rows)
    assert len(dead) == PADDED  # PAD took one of the rows that were no token
    assert codec.pad_id in dead
    prompts = codec.prompts(["what color is the sky?", "red", "a longer one, with more of everything in it"] * 40)
    for temperature in (1.0, 3.0):
        sampling = Sampling(24, codec.stop_ids, codec.pad_id, temperature, batch_size=50)
        responses = sample_responses(policy, prompts, sampling, generator(1, "test"))
        assert not set(dead) & {index for response in responses for index in response}
    with torch.no_grad():
        log_probs, logits = response_logits(policy, prompts, responses, 24, pad_id=codec.pad_id, temperature=1.0,
                                            precision="fp32")
        assert float(logits.softmax(dim=-1)[:, dead].max()) == 0
        decoder = decoder_for(policy, "fp32")
        assert decoder is not None
        state = torch.randn(5, 32)
        assert float(decoder.logits(state).softmax(dim=-1)[:, dead].max()) == 0
        ids = torch.tensor([prompts[0]])
        assert float(next_token_logits(policy, ids).softmax(dim=-1)[..., dead].max()) == 0
        # the others have what the model as given has, without those rows: independent, in float64
        original = AutoModelForCausalLM.from_pretrained(given, attn_implementation="eager").eval()
        exact = original(ids).logits[0, :-1].double()
        exact[:, [index for index in dead if index < rows]] = -torch.inf
        assert torch.allclose(next_token_logits(policy, ids)[0].log_softmax(-1).double()[:, :codec.pad_id],
                              exact.log_softmax(-1)[:, :codec.pad_id], atol=1e-4)
        batch = pack(policy, [prompts[0]], codec.pad_id)
        places = batch.token_indices([0], [len(prompts[0]) - 1])
        some = log_probs_at(policy, batch, places, "fp32").double()
        wanted = exact.log_softmax(-1).gather(1, torch.tensor(prompts[0][1:]).unsqueeze(1)).squeeze(1)
        assert torch.allclose(some, wanted, atol=1e-4)
        assert torch.isfinite(entropy(logits, 1.0)).all()
        assert torch.allclose(categorical_kl(logits, logits, 1.0), torch.zeros(()))
        assert torch.isfinite(log_probs).all()


def test_greedy_answers_are_those_of_plain_transformers(base: tuple[Path, Path, Any]) -> None:
    """From the saved folder alone: its template, its stop tokens, its suppressed tokens."""
    _, folder, _ = base
    codec, policy = load_codec(folder), load_policy(folder)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for said in ("what color is the sky?", "red", "Write a poem about the sea"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True,
                                            return_tensors="pt", return_dict=False)
        theirs = plain.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1]:].tolist()
        [ours] = sample_responses(policy, codec.prompts([said]), Sampling(20, codec.stop_ids, codec.pad_id, 0.0),
                                  generator(1, "test"))
        assert ours == theirs
        assert codec.pad_id not in ours


def test_the_mask_is_neither_saved_nor_trained(base: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, folder, metrics = base
    codec, policy = load_codec(folder), load_policy(folder)
    head = policy.get_output_embeddings()
    assert float(head.bias[codec.pad_id]) == NEVER
    assert not head.bias.requires_grad
    save_model(policy, codec.tokenizer, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert load_policy(tmp_path / "again").generation_config.suppress_tokens == policy.generation_config.suppress_tokens
    assert metrics["pretrain/parameters"] == sum(item.numel() for item in policy.parameters() if item.requires_grad)


def test_an_output_layer_with_a_bias_of_its_own_keeps_it(tokenizer: PreTrainedTokenizerFast,
                                                         make_policy: Callable[..., Any], tmp_path: Path) -> None:
    model = make_policy("gpt_neox")
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.randn(len(tokenizer)))
    own = model.get_output_embeddings().bias.detach().clone()
    describe(model, tokenizer, [tokenizer.eos_token_id])
    assert float(model.get_output_embeddings().bias[tokenizer.pad_token_id].detach()) == NEVER
    own[tokenizer.pad_token_id] = NEVER
    assert torch.equal(model.get_output_embeddings().bias.detach(), own)
    assert model.get_output_embeddings().bias.requires_grad


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_every_family_s_model_is_made_ready(name: str, tmp_path: Path) -> None:
    """Sampled, saved and loaded: the folder has the template, PAD, the stop tokens; generate gives the same ids."""
    tokenizer = build(name, tmp_path / "given")
    gpt2(tokenizer, len(tokenizer), -10.0, seed=3).save_pretrained(tmp_path / "given")
    take_base_model(PretrainParams(base_model=str(tmp_path / "given")), tmp_path / "made")
    folder = tmp_path / "made" / "model"
    codec, policy = load_codec(folder), load_policy(folder)
    plain, theirs = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stops = plain.generation_config.eos_token_id
    assert sorted([stops] if isinstance(stops, int) else stops) == sorted(codec.stop_ids)
    assert theirs.chat_template == codec.template
    ids = theirs.apply_chat_template([{"role": "user", "content": "red or blue?"}], add_generation_prompt=True,
                                     return_tensors="pt", return_dict=False)
    assert codec.prompts(["red or blue?"]) == ids.tolist()
    out = plain.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1]:].tolist()
    sampling = Sampling(12, codec.stop_ids, codec.pad_id, 0.0)
    assert sample_responses(policy, ids.tolist(), sampling, generator(1, "test")) == [out]
    assert not set(policy.generation_config.suppress_tokens) & set(out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_base_is_saved_in_the_precision_that_it_was_published_in(kind: str, dtype: torch.dtype, tmp_path: Path
                                                                   ) -> None:
    """A bfloat16 model took twice its room; a PAD row that it needs makes its vocabulary a multiple of 64."""
    given = write_model(tmp_path / "given", kind)
    AutoModelForCausalLM.from_pretrained(given, dtype=dtype).save_pretrained(given)
    take_base_model(PretrainParams(base_model=str(given)), tmp_path / "made")
    with safe_open(tmp_path / "made" / "model" / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {value.dtype for value in saved.values()} == {dtype}
    original, base = load_policy(given), load_policy(tmp_path / "made" / "model")
    rows = original.get_input_embeddings().num_embeddings
    assert base.config.vocab_size == base.get_output_embeddings().weight.shape[0] == -(-(rows + 1) // 64) * 64
    for name, value in original.state_dict().items():
        assert torch.equal(base.state_dict()[name][:len(value)], value), name
    prompt = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        logits = base(prompt).logits
        assert torch.equal(logits[..., :rows], original(prompt).logits)
        assert float(logits.softmax(-1)[..., rows:].max()) == 0
