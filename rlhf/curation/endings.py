"""Completions that break off: an open code block, or a last word or mark with which no sentence ends."""

import re

# Words that end no English sentence. Lower case only: The answer is A, AND and OR, the band The The.
_UNFINISHED = re.compile(r"(?:^|\s)(?:the|an|and|or|because|their|your|my|than|whose|although|"
                         r"(?:of|with|for|in|to|as|on|from|and|like|by|into|about) a)$")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S*$")
_EMOTICON = re.compile(r"(?:^|\s)[:;=8xX][-'o^]?[(\[{]$")
_FENCE = re.compile(r"^ {0,3}(?:[-*+>] +|\d+[.)] +)*(`{3,}|~{3,})(.*)$")
MIN_WORDS = 4  # a shorter last line may be a word that was asked for, a list's item or the close of a letter


def open_code_block(text: str) -> bool:
    """Whether a fenced code block is begun and not ended, by CommonMark's rules."""
    fence = ""
    for line in text.splitlines():
        match = _FENCE.match(line)
        if not match:
            continue
        marks, rest = match.groups()
        if fence:
            if marks.startswith(fence) and not rest.strip():
                fence = ""
        elif not (marks[0] == "`" and "`" in rest):  # a span of code in one line
            fence = marks
    # A block that begins in the middle of a line is none to CommonMark, but people write it: its end opens nothing.
    return bool(fence) and text.count(fence) % 2 == 1


def truncated(text: str) -> str:
    """Why a completion seems to break off, or "". Precision comes first: see docs/data-rules.md."""
    if open_code_block(text):
        return "breaks off inside a code block"
    last = text.rstrip().rsplit("\n", 1)[-1]
    if len(last.split()) < MIN_WORDS or _ADDRESS.search(last) or _EMOTICON.search(last):
        return ""
    if (last.endswith((",", "(", "[", "{")) and last[-2] not in ".!?") or _UNFINISHED.search(last):
        return f"breaks off: ... {last[-30:]}"
    return ""
