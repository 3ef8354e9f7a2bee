"""Characters and marks that must not occur in a prompt or a completion: control and hidden characters, special tokens
of chat formats, marks that open another turn.

Hidden characters [Unicode TR36, TR39; "Trojan Source"] are found where they hide something: format characters that
emoji, Arabic, Persian, Indic and South-East Asian scripts need are fine in those.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

# Marks of calls of tools and of their answers.
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "[TOOL_CALLS]", "[TOOL_RESULTS]",
               "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CONTENT]", "<|python_tag|>")
# Tokens by which well-known chat formats separate turns; callers may add those of a tokenizer. Left out are names that
# texts use for something else: <think>, <mask>, <tools>, <filename>, [IMG], [ARGS], [PREFIX].
SPECIAL_TOKENS = (
    # GPT-2 and its heirs, ChatML, Phi-4
    "<|endoftext|>", "<|startoftext|>", "<|endofprompt|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>",
    # gpt-oss
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
    # Llama 2, Mistral
    "<s>", "</s>", "<unk>", "<pad>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[IMG_BREAK]", "[IMG_END]",
    # Llama 3 and 4
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|step|>", "<|image|>", "<|patch|>",
    # Gemma
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>",
    "<audio_soft_token>",
    # DeepSeek; its newer tokens are in _FAMILIES
    "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|EOT|>",
    # Phi-3, Zephyr, GLM, InternLM
    "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|observation|>", "<|plugin|>",
    "<|interpreter|>", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<eoh>", "<eoa>",
    # Cohere; the others are in _FAMILIES
    "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>", "<PAD_TOKEN>",
    # Exaone, StarCoder
    "[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]", "<|file_separator|>",
    *TOOL_TOKENS)
# Whole families: <|start_of_role|>, <|START_OF_TURN_TOKEN|>, <|vision_start|>, <|reserved_special_token_7|>,
# <|dummy_3|>, <|placeholder1|>; DeepSeek's with full-width bars; T5's, Gemma's and Nemotron's numbered ones.
_FAMILIES = (r"<\|/?[A-Za-z]+(?:_[A-Za-z0-9]+)+\|>|<\|[A-Za-z]+\d+\|>|<\uff5c[^\uff5c<>\s]{1,40}\uff5c>"
             r"|<extra_id_\d+>|<unused\d+>|<SPECIAL_\d+>")
# A turn of a transcript (blank line before it), or a heading of Alpaca's and Vicuna's templates.
_TURN_MARK = re.compile(
    r"(?:\A|\n[ \t]*\n)[ \t]*((?:Human|Assistant):|###[ \t]*(?:Instruction|Response|Human|Assistant|User|System):)"
    r"|\n[ \t]*\n[ \t]*(User:)|\n[ \t]*(###[ \t]*(?:Instruction|Response|Human|Assistant):)")
_TEMPLATE = re.compile(r"(?:\A|\n)[ \t]*(###[ \t]*(?:Instruction|Response|Human|Assistant):)")

_ODD = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\ufffd\ufffe\uffff\ufeff]")
_OVERRIDES = "\u202d\u202e\u206a-\u206f\ufff9-\ufffb"  # never needed in a text
_EMBEDDINGS = "\u202a-\u202c\u2066-\u2069"
# No width: soft hyphen, grapheme joiner, zero-width space and joiners, direction marks, word joiner, invisible
# operators; and fillers, which are blanks that count as letters.
_NO_WIDTH = ("\u00ad\u034f\u061c\u180e\u200b-\u200f\u2060-\u2064"
             "\u115f\u1160\u2800\u3164\uffa0")
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_TAGS = "\U000e0000-\U000e007f"
_HIDDEN = re.compile(f"[{_OVERRIDES}{_EMBEDDINGS}{_NO_WIDTH}{_SELECTORS}{_TAGS}]")
_RUN = re.compile(f"[{_NO_WIDTH}]+")
# The flags of England, Scotland, Wales, Texas: a black flag and the code of the region in tag characters.
_REGION_FLAG = re.compile("\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
# Scripts that join letters or break words by characters of no width: Hebrew to Tibetan, Myanmar, Hangul's old letters,
# Khmer, Mongolian, Balinese, Javanese and their kin.
_JOINING = re.compile("[\u0590-\u109f\u1100-\u11ff\u1700-\u18af\u1900-\u1aff\u1b00-\u1c4f\ua800-\ua9ff\uaa00-\uaaff"
                      "\uabc0-\uabff\ufb1d-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff]")
_HANGUL = re.compile("[\uac00-\ud7a3]")
_FUNCTION = re.compile(r"(?:\b|\d)(?:arc|ar)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp|lim|max|min|sup|inf|det|arg|gcd"
                       r"|dim|ker|deg|tr|Pr)h?\Z")


def is_visible(text: str) -> bool:
    """Whether the text has a visible character; white space of any script and zero-width characters are invisible."""
    return any(character.isprintable() and not character.isspace() for character in text)


def odd_character(text: str) -> str:
    """The code and name of the first control, replacement or hidden character of a text, or "".

    Hidden are: overrides of the writing direction; embeddings and isolates outside right-to-left texts; tag characters
    but for a flag's; characters of no width inside a word, or three in a row; variation selectors that follow nothing
    that has variants.
    """
    match = _ODD.search(text)
    if match:
        return _named(match.group())
    return "" if text.isascii() else hidden_character(text)


def hidden_character(text: str) -> str:
    """The code and name of the first hidden character, or ""."""
    if not _HIDDEN.search(text):
        return ""
    text = _REGION_FLAG.sub("\U0001f3f4", text)
    right_to_left = bool(_RIGHT_TO_LEFT.search(text))
    for match in _HIDDEN.finditer(text):
        if _hides(text, match.start(), right_to_left):
            return _named(match.group())
    return ""


def _named(character: str) -> str:
    return f"U+{ord(character):04X} {unicodedata.name(character, 'control character')}"


def _hides(text: str, place: int, right_to_left: bool) -> bool:
    """Whether the character at a place of the text, one of _HIDDEN, is not what its script or emoji needs."""
    character = text[place]
    if "\u202a" <= character <= "\u202c" or "\u2066" <= character <= "\u2069":
        return not right_to_left
    if "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef":
        return not _has_variants(text, place)
    if not _RUN.match(character):
        return True  # overrides, tag characters
    start = place
    while start and _RUN.match(text[start - 1]):
        start -= 1
    match = _RUN.match(text, start)
    assert match is not None
    before, after = text[start - 1:start], text[match.end():match.end() + 1]
    if _JOINING.match(before) or _JOINING.match(after):
        return False
    if character in "\u115f\u1160\u3164\uffa0" and _HANGUL.search(before + after):
        return False
    if match.end() - start >= 3 and "\u2800" not in match.group():  # blank braille cells draw pictures
        return True
    if character == "\u2061" and _FUNCTION.search(text[max(0, start - 8):start]):
        return False  # function application, as in formulas copied from web pages
    inside = before.isalnum() and after.isalnum()
    if "\u2061" <= character <= "\u2064":
        inside = before.isalpha() and after.isalpha()
    return inside


def _has_variants(text: str, place: int) -> bool:
    """Whether what precedes the variation selector at a place has variants: emoji and symbols, keycaps, CJK."""
    selector, before = text[place], text[place - 1:place]
    if selector == "\ufe0f" and before == selector:  # written twice, by accident
        before = text[max(0, place - 2):place - 1]
    if not before:
        return False
    if selector in "\ufe0e\ufe0f" and before in "0123456789#*":
        return True
    kind = unicodedata.category(before)
    if selector >= "\U000e0100":
        return kind == "Lo" and before >= "\u2e80"
    return kind in ("So", "Sm", "Sk", "Po", "Pd") or (kind[0] in "LN" and before >= "\u1000")


@lru_cache(maxsize=8)
def special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join([*map(re.escape, sorted(tokens, key=lambda token: (-len(token), token))), _FAMILIES]))


def special_token(text: str, tokens: Sequence[str] = SPECIAL_TOKENS) -> str:
    """The first special token of a chat format in the text, or ""; also those of known families that are not listed."""
    if "<" not in text and "[" not in text and tokens is SPECIAL_TOKENS:
        return ""
    match = special_pattern(tuple(tokens)).search(text)
    return match.group() if match else ""


def turn_mark(completion: str) -> str:
    """The mark by which a completion opens another turn, or "": `Human:`, `Assistant:` or `User:` at the beginning of a
    paragraph (`User:` of a later one), a heading of Alpaca's template."""
    if ":" not in completion:
        return ""
    match = _TURN_MARK.search(completion)
    return next(filter(None, match.groups())) if match else ""


def template_mark(prompt: str) -> str:
    """The heading of an instruction template in a prompt, or "": the tokenizer's chat format stands for it."""
    match = _TEMPLATE.search(prompt)
    return match.group(1) if match else ""


def encodes(text: str) -> bool:
    """Whether the text can be encoded in UTF-8: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
