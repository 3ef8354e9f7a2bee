"""Characters that do not belong into a prompt or a completion: invisible text, control characters, turn marks."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

# Marks by which well-known chat formats separate turns; a tokenizer's own are added where one is given.
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>",
                  "<|end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<bos>",
                  "<eos>", "<pad>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<start_of_turn>",
                  "<end_of_turn>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|file_separator|>")
_ODD = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\ufffd\ufffe\uffff\ufeff]")


def is_visible(text: str) -> bool:
    """Whether the text has a character one can see: "", blanks of any alphabet and zero-width marks have none."""
    return any(character.isprintable() and not character.isspace() for character in text)


def odd_character(text: str) -> str:
    """The name of the first control character, byte order mark or replacement character, or ""."""
    found = _ODD.search(text)
    return f"U+{ord(found.group()):04X} {unicodedata.name(found.group(), 'control character')}" if found else ""


@lru_cache(maxsize=8)
def special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens))))


def special_token(text: str, tokens: Sequence[str] = SPECIAL_TOKENS) -> str:
    """The first special token whose name the text holds, or ""."""
    found = special_pattern(tuple(tokens)).search(text)
    return found.group() if found else ""


def encodes(text: str) -> bool:
    """Whether the text is whole characters: half of a surrogate pair has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
