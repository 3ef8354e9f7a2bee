"""Tokenizers: training one, and turning prompts and completions into ids that text cannot tamper with."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|endoftext|>"
# A prompt is a line, a completion is what follows it up to EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{{ '\\n' if message.role == 'user' else eos_token }}{% endfor %}"
)
_MARK = "\u0001user text\u0001"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries, PAD and EOS included and different."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder (or hub name)."""
    return AutoTokenizer.from_pretrained(str(folder))


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of plain texts; the names of special tokens inside a text stay text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


class PromptCodec:
    """Ids of prompts and completions in the tokenizer's own chat format.

    The frame around a prompt (role marks, separators) is rendered once with a mark in the user's place; user text
    is tokenized apart from it with special tokens switched off, so that it cannot inject a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pad_id, self.eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        if self.pad_id is None or self.eos_id is None or self.pad_id == self.eos_id:
            raise ValueError("the tokenizer needs a PAD and an EOS token that differ")
        before, after = "", "\n"
        if tokenizer.chat_template:
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True)
            before, after = rendered.split(_MARK)
        self._before = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
        self._after = tokenizer(after, add_special_tokens=False)["input_ids"]

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Ids that a response to each prompt continues."""
        return [self._before + ids + self._after for ids in text_ids(self.tokenizer, texts)]

    def completions(self, texts: list[str]) -> list[list[int]]:
        """Ids of completions, EOS included."""
        return [[*ids, self.eos_id] for ids in text_ids(self.tokenizer, texts)]

    def decode(self, ids: list[int]) -> str:
        """Text of a response without special tokens and outer white space."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


@lru_cache(maxsize=8)
def cached_codec(folder: str) -> PromptCodec:
    """The codec of a model folder."""
    return PromptCodec(load_tokenizer(folder))


def newline_ids(tokenizer: Any) -> list[int]:
    """Ids of tokens that hold a line break: where a base model's answer ends."""
    return sorted(index for token, index in tokenizer.get_vocab().items()
                  if "\n" in tokenizer.convert_tokens_to_string([token]))
