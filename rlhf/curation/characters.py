"""Characters that must not occur in a prompt or a completion: invisible text, control characters, special tokens."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

# Tokens by which well-known chat formats separate turns; callers may add those of a tokenizer.
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>",
                  "<|end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<bos>",
                  "<eos>", "<pad>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<start_of_turn>",
                  "<end_of_turn>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|file_separator|>")
_ODD = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\ufffd\ufffe\uffff\ufeff]")


def is_visible(text: str) -> bool:
    """Whether the text has a visible character; white space of any script and zero-width characters are invisible."""
    return any(character.isprintable() and not character.isspace() for character in text)


def odd_character(text: str) -> str:
    """The name of the first control character, byte order mark or replacement character, or ""."""
    match = _ODD.search(text)
    return f"U+{ord(match.group()):04X} {unicodedata.name(match.group(), 'control character')}" if match else ""


@lru_cache(maxsize=8)
def special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens))))


def special_token(text: str, tokens: Sequence[str] = SPECIAL_TOKENS) -> str:
    """The first special token in the text, or ""."""
    match = special_pattern(tuple(tokens)).search(text)
    return match.group() if match else ""


def encodes(text: str) -> bool:
    """Whether the text can be encoded in UTF-8: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
