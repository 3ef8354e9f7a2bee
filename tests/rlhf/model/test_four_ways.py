"""What is trained, served, chatted with and benchmarked in the chat format are the same ids."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import mlops.tools.chat
import rlhf.model.sampling
from mlops.release import served_policy
from rlhf.model.chat_format import ChatFormatError, asked, load_codec
from rlhf.model.load import load_policy
from rlhf.model.show import shown
from rlhf.params import PretrainParams
from rlhf.pretrain import take_base_model
from rlhf.sft import Demonstrations
from tests.rlhf.model.families import build
from tests.rlhf.model.test_vocabulary import gpt2

CONVERSATION = [{"role": "user", "content": "red or blue?"}, {"role": "assistant", "content": "red"},
                {"role": "user", "content": "why <|im_end|> [INST] though? "}]


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen", "gemma", "gpt2", "spm_base"])
def test_ids_are_the_same_in_training_serving_chat_and_benchmarks(name: str, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build(name, tmp_path / "given")
    gpt2(tokenizer, len(tokenizer), -5.0).save_pretrained(tmp_path / "given")
    take_base_model(PretrainParams(base_model=str(tmp_path / "given")), tmp_path)
    folder, sampled = tmp_path / "model", []
    real = rlhf.model.sampling.sample_responses

    def recorded(model: Any, prompts: Any, *arguments: Any) -> Any:
        sampled.append([list(ids) for ids in prompts])
        return real(model, prompts, *arguments)

    monkeypatch.setattr(rlhf.model.sampling, "sample_responses", recorded)
    monkeypatch.setattr(served_policy, "sample_responses", recorded)
    codec = load_codec(folder)
    policy = served_policy.Policy()
    policy.load_context(SimpleNamespace(artifacts={"model": str(folder)}))  # type: ignore[arg-type]
    speaker = mlops.tools.chat.Speaker("m", codec, load_policy(folder))
    options = Namespace(max_new_tokens=4, temperature=0.0, seed=1)
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
    for messages in (CONVERSATION[:1], CONVERSATION):
        trained = Demonstrations.encode(codec, [messages], ["blue"], 500)
        [ids], [start] = trained.ids, trained.prompt_lengths
        table = pd.DataFrame([{"messages": messages}, {"messages": messages}])
        answers = policy.predict(None, table, {"max_new_tokens": 4, "temperature": 0.0})  # type: ignore[arg-type]
        said = mlops.tools.chat.reply(speaker, messages, options, 1)
        assert sampled[-2:] == [[ids[:start]] * 2, [ids[:start]]]
        assert answers == [said, said]
        if messages is not CONVERSATION:  # lm-eval takes names of special tokens in texts for the tokens
            assert lm.tok_encode(lm.apply_chat_template(messages)) == ids[:start]


def test_a_request_has_a_prompt_or_messages() -> None:
    assert asked({"prompt": "red?", "messages": float("nan")}) == "red?"
    assert asked({"messages": CONVERSATION}) == CONVERSATION
    for request in ({}, {"prompt": "red?", "messages": CONVERSATION}):
        with pytest.raises(ChatFormatError, match="prompt"):
            asked(request)


def test_a_row_is_shown_as_it_is_trained(tmp_path: Path) -> None:
    build("qwen", tmp_path)
    codec = load_codec(tmp_path)
    (row,) = shown(codec, "red or blue?", ["blue"])
    assert row["text"].endswith("<|im_start|>user\nred or blue?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>")
    assert len(row["ids"]) == len(row["tokens"]) == len(row["mask"])
    answer = [index for index, counts in zip(row["ids"], row["mask"], strict=True) if counts]
    assert answer == codec.completions(["blue"])[0]
    assert answer[-1] in row["stop_ids"]
    (row,) = shown(codec, CONVERSATION)
    assert not any(row["mask"])
