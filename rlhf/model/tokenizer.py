"""Tokenizers: training one, loading one, ids of plain texts. Conversations are in rlhf/model/chat_format.py."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.model.folders import check_folder

PAD, EOS = "<|pad|>", "<|endoftext|>"
# For models without a template: a user's turn ends with a line break, every other with EOS.
OWN_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{{ '\\n' if message.role == 'user' else eos_token }}{% endfor %}"
)
_UNUSED = re.compile(r"pad|reserved|unused|dummy|placeholder", re.IGNORECASE)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries, PAD and EOS included and different."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS)
    fast.chat_template = OWN_TEMPLATE
    return fast


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder (or hub name). A model's own code is never run. Raises OSError, ValueError, and
    UserError for a damaged file."""
    path, name = Path(folder), str(folder)
    if name.startswith(("/", ".", "~")) and not path.is_dir():
        raise OSError("no such folder")
    if path.is_dir() and not any(path.glob("*token*")) and not any(path.glob("*vocab*")):
        raise OSError("the folder holds no tokenizer (tokenizer.json)")
    check_folder(folder)
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def give_pad(tokenizer: PreTrainedTokenizerBase, taken: Iterable[int]) -> None:
    """Gives a tokenizer a PAD token that nothing else is: its own, an existing one that no text uses, or a new one.

    `taken`: ids that mean something, such as those that end an answer.
    """
    used = {*taken, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in used:
        return
    special = {index: token.content for index, token in sorted(tokenizer.added_tokens_decoder.items())
               if token.special and index not in used and _UNUSED.search(token.content)}
    named = sorted(special, key=lambda index: ("pad" not in special[index].lower(), index))
    tokenizer.add_special_tokens({"pad_token": special[named[0]] if named else PAD})


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of plain texts; the names of special tokens inside a text stay text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def newline_ids(tokenizer: Any) -> list[int]:
    """Ids of tokens that hold a line break: where a base model's answer ends."""
    return sorted(index for token, index in tokenizer.get_vocab().items()
                  if "\n" in tokenizer.convert_tokens_to_string([token]))
