"""Tokenizers: training one, and turning prompts and completions into ids that text cannot tamper with."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|endoftext|>"
# A prompt ends with a line break; a completion is what follows it up to EOS.
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


def load_with_pad(name: str | Path) -> PreTrainedTokenizerBase:
    """A model's own tokenizer, given a PAD token where it has none or uses EOS for it."""
    tokenizer = load_tokenizer(name)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of plain texts; the names of special tokens inside a text stay text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


class PromptCodec:
    """Ids of prompts and completions in the tokenizer's own chat format.

    The frame around a prompt (role marks, separators) is rendered once with a mark in the user's place; user text
    is tokenized apart from it with special tokens switched off, so that it cannot inject a turn. Role marks that the
    tokenizer does not know as special (added tokens of its chat format) are broken up in user text; `marks` names all.
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
        frame = _conversation_ids(tokenizer) if tokenizer.chat_template else set()
        added = {token: index for token, index in tokenizer.get_added_vocab().items()
                 if index in frame and len(token.strip()) > 1}
        self.marks = sorted({*added, *(token for token in tokenizer.all_special_tokens if token.strip())})
        self._plain = frozenset(added.values()) - frozenset(tokenizer.all_special_ids)
        self._mark = re.compile("|".join(map(re.escape, sorted(added)))) if self._plain else None

    def _text_ids(self, texts: list[str]) -> list[list[int]]:
        ids = text_ids(self.tokenizer, texts)
        if self._mark is None:
            return ids
        return [self._broken_up(text) if self._plain.intersection(row) else row
                for text, row in zip(texts, ids, strict=True)]

    def _broken_up(self, text: str) -> list[int]:
        """Ids of a text that holds a role mark: tokenized in two parts, cut inside the mark."""
        found = self._mark.search(text) if self._mark else None
        [ids] = text_ids(self.tokenizer, [text])
        if found is None or not self._plain.intersection(ids):
            return ids
        cut = found.start() + 1
        return self._broken_up(text[:cut]) + self._broken_up(text[cut:])

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Ids that a response to each prompt continues."""
        return [self._before + ids + self._after for ids in self._text_ids(texts)]

    def completions(self, texts: list[str]) -> list[list[int]]:
        """Ids of completions, EOS included."""
        return [[*ids, self.eos_id] for ids in self._text_ids(texts)]

    def decode(self, ids: list[int]) -> str:
        """Text of a response without special tokens and outer white space."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _conversation_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All ids that the chat format puts around the turns of a conversation, a system's turn where it knows one."""
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        rendered = tokenizer.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True)
    return set(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def newline_ids(tokenizer: Any) -> list[int]:
    """Ids of tokens that hold a line break: where a base model's answer ends."""
    return sorted(index for token, index in tokenizer.get_vocab().items()
                  if "\n" in tokenizer.convert_tokens_to_string([token]))
