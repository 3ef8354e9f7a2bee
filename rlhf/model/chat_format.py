"""Conversations as token ids: those that the tokenizer's own chat template gives, in which no text can open a turn.

A conversation is rendered by the template and tokenized whole, so its ids are those of `apply_chat_template`. Text
that holds the name of a special token, or a mark by which the template opens a turn, is cut inside that name and
tokenized in pieces: it stays text. An answer ends with the token that the template puts there.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any
from unicodedata import normalize

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf.data.prompts import ROLES, Message, Prompt
from rlhf.errors import UserError, disk_problem, first_line
from rlhf.model.folders import vocabulary_size
from rlhf.model.tokenizer import OWN_TEMPLATE, give_pad, load_tokenizer

BOS = "{{ bos_token }}"  # before it, where the tokenizer puts BOS before a text
DATE = date(2024, 7, 26)  # of templates that ask for today's; Llama 3.2's when it is told none
_CLOCK = "strftime_now"
_CODES = ("%d", "%-d", "%e", "%m", "%-m", "%Y", "%y", "%B", "%b", "%A", "%a", "%j", "%F", "%D", "%H", "%M", "%S")
_FAULTS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
_MARK_LIKE = re.compile(r"(?=.{2,30}\Z)(?=.*[A-Za-z])(?:[\[<#|{*=].*|.*[:\]>|}])\Z")  # [INST], <<SYS>>, Human:
_BRACKETED = re.compile(r"[\[<{|].*[A-Za-z].*[\]>}|]\Z")
MOST_WORDS = 3  # of a mark
_OF_TOOLS = ("tools", "tool_calls")  # keys of a message
# What a model says between tags, such as <think> and <tool_call>, and not a role.
_TAG = re.compile(r"</?(?!(?:system|user|human|assistant|bot|model|developer)>)[A-Za-z][\w.-]*>")
_NO_SIGN = re.compile(r"[^\w\s/.,:;!?'()-]")  # signs that names of special tokens are made of
_SHORT: list[Message] = [{"role": "user", "content": "x"}]
_ANSWER, _ASKED = "\u27e6answer\u27e7", "\u27e6asked\u27e7"


class ChatFormatError(UserError, ValueError):
    """A template that cannot be used, or that refuses a conversation: why. Ends a stage with this one line."""


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of a model that has none: OWN_TEMPLATE, after BOS where the tokenizer puts that before texts."""
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return (BOS if starts_with_bos else "") + OWN_TEMPLATE


def with_fixed_date(template: str, day: date = DATE) -> str:
    """The template with `day` wherever it asks for today's date: a run of tomorrow, or in another time zone, has the
    same prompts."""
    macro = f"{{%- macro {_CLOCK}(format) -%}}"
    if _CLOCK not in template or template.startswith(macro):
        return template
    filled = "".join(f" | replace('{code}', '{day.strftime(code)}')" for code in _CODES)
    return f"{macro}{{{{ format{filled} }}}}{{%- endmacro -%}}{template}"


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as messages. Raises ChatFormatError for what is neither a text nor messages with role and content."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = []
    for number, message in enumerate(prompt, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ChatFormatError(f"message {number} has no content that is text")
        if message.get("role") not in ROLES:
            raise ChatFormatError(f"message {number} has an unknown role: {message.get('role')!r}")
        messages.append(dict(message))
    return messages


def asked(request: Mapping[str, Any]) -> Prompt:
    """The prompt of a request to a served model: its `messages`, as in OpenAI's API, or its `prompt`, a text.

    Raises ChatFormatError where there is neither, or both.
    """
    found = {key: value for key in ("prompt", "messages")
             if (value := request.get(key)) is not None and value == value}  # a table has NaN where a row has none
    if len(found) != 1:
        raise ChatFormatError(f"{'both prompt and messages' if found else 'neither prompt nor messages'}; give one")
    if "messages" in found:
        return messages_of(list(found["messages"]))
    return str(found["prompt"])


def templates_of(tokenizer: PreTrainedTokenizerBase, day: date = DATE) -> tuple[str, str]:
    """(template, template of conversations that name tools), with a fixed date. Raises ChatFormatError."""
    if not tokenizer.chat_template:
        return (own_template(tokenizer),) * 2
    if not isinstance(tokenizer.chat_template, dict):
        return (with_fixed_date(tokenizer.chat_template, day),) * 2
    named = tokenizer.chat_template
    if "default" not in named:
        raise ChatFormatError(f"its chat templates are {', '.join(sorted(named))}; one must be named default")
    default = str(named["default"])
    return with_fixed_date(default, day), with_fixed_date(str(named.get("tool_use") or default), day)


def _any_of(marks: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(marks, key=lambda mark: (-len(mark), mark)))) or r"(?!)")


def _of_tools(turns: Sequence[Message]) -> bool:
    return any(message.keys() & _OF_TOOLS for message in turns)


def _tool_text(message: Message) -> str:
    """The tools that a message names or calls, as text; "" if there is none."""
    found = [message[key] for key in _OF_TOOLS if key in message]
    return json.dumps(found, ensure_ascii=False, sort_keys=True) if found else ""


class PromptCodec:
    """Ids of prompts and answers, in the tokenizer's chat template, or in `own_template` where it has none.

    `stops`: further tokens that end an answer, beside EOS and the one that the template puts there (`end_id`);
    `stop_ids` are all of them. `marks`: the names that are broken up in texts; tags that are tokens (<think>,
    <tool_call>) are so only in what is not the assistant's. `asks_with`: what a prompt ends with and an answer in a
    conversation does not follow. Raises ChatFormatError for a tokenizer
    without EOS or PAD, or whose PAD ends answers, and for a template that does not render a user's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Iterable[int] = (), day: date = DATE,
                 needs_pad: bool = True) -> None:
        self.tokenizer = tokenizer
        self.pad_id, self.eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        if self.eos_id is None:
            raise ChatFormatError("its tokenizer has no EOS; name the token that ends a text as eos_token in "
                                  "tokenizer_config.json")
        self.template, self.tool_template = templates_of(tokenizer, day)
        self._as_parts = False
        self._as_parts = not self._renders_text()
        self._counts: dict[tuple[Any, ...], int] = {}
        self._known: set[tuple[Any, ...]] = set()
        self._added = {token: index for token, index in tokenizer.get_added_vocab().items() if token.strip()}
        self._special = {*tokenizer.all_special_ids,
                         *(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)}
        self._frame()
        self.stop_ids = tuple(sorted({self.eos_id, self.end_id, *stops}))
        if needs_pad and (self.pad_id is None or self.pad_id in self.stop_ids):
            raise ChatFormatError("its tokenizer needs a PAD token that differs from those that end an answer")

    # --- the template's frame --------------------------------------------------------------------------------

    def _renders_text(self) -> bool:
        """Whether the template takes contents that are text; False where it wants lists of parts. Raises."""
        refusals = []
        for as_parts in (False, True):
            self._as_parts = as_parts
            try:
                if _ASKED in self._render([[{"role": "user", "content": _ASKED}]], True)[0]:
                    return not as_parts
                refusals.append("it leaves the user's text out")
            except ChatFormatError as error:
                refusals.append(str(error))
        raise ChatFormatError(f"its chat template cannot be used: {refusals[0]}")

    def _frame(self) -> None:
        """Learns what the template puts around turns: its tokens, its marks that are text, the end of an answer."""
        self._opening = self._render([_SHORT], True)[0]  # the prompt that answers are tokenized after
        [self._start] = self._ids([self._opening])
        whole = self._render([[*_SHORT, {"role": "assistant", "content": _ANSWER}]], False)[0]
        if _ANSWER not in whole:
            raise ChatFormatError("its chat template leaves the assistant's text out")
        before, self._closing = whole.split(_ANSWER, 1)
        self._lead = before[len(self._opening):] if before.startswith(self._opening) else ""
        pairs = enumerate(zip(before, self._opening, strict=False))
        same = next((place for place, (one, other) in pairs if one != other), min(len(before), len(self._opening)))
        self.asks_with = self._opening[same:].strip()  # before a new answer only, such as <think>
        asked = [{"role": "user", "content": _ASKED}]
        texts = [self._render([[*asked, {"role": "assistant", "content": _ANSWER}]], False)[0],
                 self._render([asked], True)[0], *self._probes()]
        ids = {index for text in texts for index in self._ids([text])[0]}
        tags = {token.strip() for token, index in self._added.items()
                if index not in self._special and _TAG.fullmatch(token.strip())}
        frame = {token: index for token, index in self._added.items()
                 if index in ids and len(token.strip()) > 1 and token.strip() not in tags}
        self.frame_ids = frozenset(index for index in ids if index in self._special or index in frame.values())
        self._protected = frozenset({*self._special, *frame.values()})
        self._counted = self._protected - {self.tokenizer.unk_token_id}
        names = {self.tokenizer.convert_ids_to_tokens(index) for index in self._protected} | frame.keys()
        tokens = {name for name in names if name and name.strip()}
        boundaries = [part for text in texts for part in re.split("\u27e6[a-z]+\u27e7", text)[1:-1]]
        inside = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        lines = {line.strip() for text in texts for part in re.split("\u27e6[a-z]+\u27e7", text)
                 for piece in inside.split(part) for line in piece.splitlines() if len(line.split()) <= MOST_WORDS}
        plain = {word for line in lines for word in line.split() if _BRACKETED.match(word)}
        if any(part.strip() and not inside.search(part) for part in boundaries):  # turns without a token between them
            plain |= set(filter(_MARK_LIKE.match, lines))
        plain = {mark for mark in plain if not _TAG.fullmatch(mark)}
        self.marks = sorted(tokens | plain)
        self._said = _any_of(tokens | plain)  # in the assistant's texts
        self._mark = _any_of(tokens | plain | tags)
        self._cuts = {mark: self._cut_of(mark) for mark in plain}
        self._lead_ids = self._ids([self._lead])[0] if self._lead else []
        # Where the lead's last token is joined with the answer's first the text tells it.
        self._lead_said = "" if set(self._lead_ids) & self._special else self._lead.strip()
        closing = [index for index in self._ids([self._closing])[0] if index in self._protected]
        self.end_id: int = closing[0] if closing else self.eos_id
        self._ends_itself = bool(closing)

    def _probes(self) -> list[str]:
        """Conversations of several turns, with a system's turn too where the template has one."""
        turns = [{"role": role, "content": f"\u27e6{role}\u27e7"} for role in ("system", "user", "assistant", "user")]
        found = []
        for some in (turns, turns[1:]):
            try:
                found.append(self._render([some], True)[0])
            except ChatFormatError:
                continue
        return found

    def _cut_of(self, mark: str) -> int:
        """Where a mark that is plain text is cut so that its pieces have other ids than the whole; 0: nowhere."""
        whole = {tuple(self._ids([before + mark])[0]) for before in ("", " ", "\n")}
        for cut in sorted(range(1, len(mark)), key=lambda place: abs(place - len(mark) / 2)):
            pieces = {tuple(self._ids([before + mark[:cut]])[0] + self._following(mark[cut:]))
                      for before in ("", " ", "\n")}
            if not pieces & whole:
                return cut
        return 0

    # --- rendering and tokenizing ----------------------------------------------------------------------------

    def _render(self, conversations: Sequence[Sequence[Message]], open_answer: bool) -> list[str]:
        if any(map(_of_tools, conversations)):
            return [self._render_tools(turns, open_answer) if _of_tools(turns) else
                    self._render([turns], open_answer)[0] for turns in conversations]
        return self._rendered(conversations, open_answer, None)

    def _render_tools(self, turns: Sequence[Message], open_answer: bool) -> str:
        """A conversation that names tools or calls them, in the template's own form. Raises where it has none."""
        tools, rest = turns[0].get("tools"), turns
        if tools:
            first = {key: value for key, value in turns[0].items() if key != "tools"}
            rest = [*([first] if first["content"] else []), *turns[1:]]
        names = [tool["function"]["name"] for message in turns for key in _OF_TOOLS for tool in message.get(key, ())]
        held = self._mark.search("".join(map(_tool_text, turns)))
        if held:
            raise ChatFormatError(f"a tool, or a call of one, holds {held.group()}, by which the chat template marks "
                                  "its own tokens")
        if self.tool_template.removeprefix(BOS) == OWN_TEMPLATE:
            raise ChatFormatError("its chat template has no tools; write tool_turns: drop")
        [text] = self._rendered([rest], open_answer, tools)
        if missing := [name for name in names if name not in text]:
            raise ChatFormatError(f"its chat template leaves tools out: {missing[0]}; write tool_turns: drop")
        return text

    def _rendered(self, conversations: Sequence[Sequence[Message]], open_answer: bool, tools: Any) -> list[str]:
        if self.template == OWN_TEMPLATE:  # what jinja would make of it, in less time
            eos = self.tokenizer.eos_token
            return ["".join([message["content"] + ("\n" if message["role"] == "user" else eos) for message in turns])
                    for turns in conversations]
        if self._as_parts:
            conversations = [[{**message, "content": [{"type": "text", "text": message["content"]}]}
                              for message in turns] for turns in conversations]
        try:
            return list(self.tokenizer.apply_chat_template(
                [list(turns) for turns in conversations], tokenize=False,
                chat_template=self.tool_template if tools else self.template,
                add_generation_prompt=open_answer, tools=tools))
        except _FAULTS as error:
            said = " ".join(str(error).split()) or type(error).__name__
            if len(conversations) > 1:  # names the one that is at fault
                return [self._rendered([turns], open_answer, tools)[0] for turns in conversations]
            roles = ", ".join(message["role"] for message in conversations[0])
            raise ChatFormatError(f"its chat template refuses a conversation of {roles}: {said}") from None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    @cached_property
    def _adds_blank(self) -> bool:
        """Whether the tokenizer puts a blank before a text, as SentencePiece does."""
        first = self.tokenizer.convert_ids_to_tokens(self._ids(["x"])[0])[0]
        return first.startswith("\u2581")

    def _following(self, text: str) -> list[int]:
        """Ids of a text that follows another."""
        if not self._adds_blank or not text:
            return self._ids([text])[0]
        for other in ("\u6f22", "\n", "x"):  # one that no piece joins with what follows
            before, whole = self._ids([other, other + text])
            if whole[:len(before)] == before:
                return whole[len(before):]
        return self._ids([text])[0]

    def _broken_up(self, message: Message, everywhere: bool, gap: str) -> str:
        """A message's text with `gap` inside each mark, or after each character that is no letter, digit or blank."""
        text, marks = message["content"], self._marks_in(message)
        if everywhere:
            return re.sub(r"([^\w\s])", rf"\1{gap}", text)
        pieces = []
        while match := marks.search(text):
            cut = self._cuts.get(match.group(), 1)
            if not cut:
                raise ChatFormatError(f"a text holds {match.group()}, by which the chat template opens a turn: its "
                                      "tokens cannot be told from the template's")
            pieces.append(text[:match.start() + cut])
            text = text[match.start() + cut:]
        return gap.join([*pieces, text])

    def _encode(self, conversations: Sequence[Sequence[Message]], open_answer: bool) -> list[list[int]]:
        """Ids of conversations, each tokenized whole but where a text holds a mark."""
        for turns in conversations:
            self._check_structure(turns, open_answer)
        rendered = self._render(conversations, open_answer) if conversations else []
        ids = self._ids(rendered)
        for number, turns in enumerate(conversations):
            if any(self._marks_in(message).search(message["content"]) for message in turns) or self._tampered(
                    turns, open_answer, ids[number]):
                ids[number] = self._encode_hostile(turns, open_answer)
        return ids

    def _check_structure(self, turns: Sequence[Message], open_answer: bool) -> None:
        """Raises ChatFormatError where the template raises on such turns, or leaves the text of one out.

        Each structure is looked at once.
        """
        structure = (open_answer, *((message["role"], not message["content"], *sorted(message.keys() & _OF_TOOLS))
                                    for message in turns))
        if structure in self._known or self.template == OWN_TEMPLATE:
            return
        marked = [{**message, "content": f"\u27e6{place}\u27e7" if message["content"] else ""}
                  for place, message in enumerate(turns)]
        [text] = self._render([marked], open_answer)
        for message in marked:
            if message["content"] not in text:
                roles = ", ".join(turn["role"] for turn in turns)
                raise ChatFormatError(f"its chat template leaves the text of role {message['role']} out, in a "
                                      f"conversation of {roles}")
        self._known.add(structure)

    def _encode_hostile(self, turns: Sequence[Message], open_answer: bool) -> list[int]:
        text = "".join(message["content"] for message in turns)
        gap = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        for everywhere in (False, True):
            cut = [{**message, "content": self._broken_up(message, everywhere, gap)} for message in turns]
            first, *others = self._render([cut], open_answer)[0].split(gap)
            ids = self._ids([first])[0] + [index for piece in others for index in self._following(piece)]
            if not self._tampered(turns, open_answer, ids):
                return ids
        raise ChatFormatError(f"a text would become a token of the chat format: {text[:60]!r}")

    def _tampered(self, turns: Sequence[Message], open_answer: bool, ids: list[int]) -> bool:
        """Whether the ids hold more, or fewer, tokens of the frame than plain texts in the same turns would."""
        key = (open_answer, *((message["role"], bool(message["content"].strip()), _tool_text(message))
                              for message in turns))
        if key not in self._counts:
            plain = [{**message, "content": f"x{place}" if message["content"].strip() else ""}
                     for place, message in enumerate(turns)]
            self._counts[key] = self._tokens_of_frame(self._ids(self._render([plain], open_answer))[0])
        found = self._tokens_of_frame(ids)
        if found == self._counts[key]:
            return False
        # A template may ask for words of a text, such as /no_think: the texts without signs.
        plain = [{**message, "content": self._mark.sub("x", _NO_SIGN.sub("x", normalize("NFKC", message["content"])))}
                 for message in turns]
        return found != self._tokens_of_frame(self._ids(self._render([plain], open_answer))[0])

    def _marks_in(self, message: Message) -> re.Pattern[str]:
        return self._said if message["role"] == "assistant" else self._mark

    def _tokens_of_frame(self, ids: list[int]) -> int:
        frame = self._counted
        return len([index for index in ids if index in frame])

    # --- what training, sampling and serving use -------------------------------------------------------------

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Ids that an answer to each prompt follows. Raises ChatFormatError for one that the template refuses."""
        return self._encode([messages_of(prompt) for prompt in prompts], True)

    def check(self, prompt: Prompt) -> None:
        """Raises ChatFormatError for a conversation that the template refuses or leaves a part of out."""
        messages = messages_of(prompt)
        self._check_structure(messages, True)
        if _of_tools(messages):
            self._render([messages], True)

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers, which follow a prompt's, up to and with the token that ends an answer.

        They are the template's of prompt and answer together, but where a token would hold the prompt's end and the
        answer's beginning: a model is asked after the prompt's ids, so it is trained there.
        """
        conversations = [[*_SHORT, {"role": "assistant", "content": text}] for text in texts]
        start = self._start
        return [self._ended(ids[len(start):] if ids[:len(start)] == start else self._apart(turns))
                for ids, turns in zip(self._encode(conversations, False), conversations, strict=True)]

    def _apart(self, turns: Sequence[Message]) -> list[int]:
        """Ids of the last turn's text and what the template puts around it, tokenized apart from the prompt."""
        text = turns[-1]["content"]
        gap = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        safe = {**turns[-1], "content": self._broken_up(turns[-1], False, gap)}
        whole = self._render([[*turns[:-1], safe]], False)[0]
        if whole.startswith(self._opening):
            answer = whole[len(self._opening):]
        else:  # the prompt asks with more than this; an answer that begins with it goes on from there
            said = safe["content"].lstrip()
            goes_on = self.asks_with and said.startswith(self.asks_with)
            answer = (said[len(self.asks_with):].lstrip() if goes_on else safe["content"]) + self._closing
        return [index for piece in answer.split(gap) for index in self._following(piece)]

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids of an answer up to its end, which is EOS where the template has none."""
        if not self._ends_itself:
            return [*ids, self.end_id]
        return ids[:ids.index(self.end_id) + 1]

    def earlier_answers(self, prompt: Prompt, asked: list[int]) -> list[tuple[int, int]]:
        """(start, end) of each answer in a prompt's ids, `asked`, its end included.

        An answer that the template renders differently once others follow (reasoning that it leaves out) is not among
        them: nobody is ever asked to give it in that form.
        """
        messages = messages_of(prompt)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or not number or message.get("weight") == 0:
                continue
            [before] = self.prompts([messages[:number]])
            if asked[:len(before)] != before or self.end_id not in asked[len(before):]:
                continue
            span = (len(before), asked.index(self.end_id, len(before)) + 1)
            said = asked[slice(*span)]
            [whole] = self._encode([messages[:number + 1]], False)
            if whole[:span[1]] == asked[:span[1]] and ("tool_calls" in message or
                                                       said == self.completions([message["content"]])[0]):
                spans.append(span)
        return spans

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer without special tokens, the template's lead and outer white space."""
        ids = [index for index in ids if index not in self.stop_ids]
        if self._lead_ids and ids[:len(self._lead_ids)] == self._lead_ids:
            ids = ids[len(self._lead_ids):]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return text.removeprefix(self._lead_said).lstrip() if self._lead_said else text


def load_codec(folder: str | Path) -> PromptCodec:
    """The codec of a model folder (or hub name): its tokenizer, and the stop tokens of its generation_config.json."""
    try:
        codec = PromptCodec(load_tokenizer(folder), stops_of(folder))
    except UserError:
        raise
    except Exception as error:  # whatever a damaged tokenizer makes transformers raise
        if disk_problem(error, Path(folder)):
            raise
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from None
    rows = vocabulary_size(folder)
    if rows and max(codec.pad_id, *codec.stop_ids) >= rows:
        raise UserError(f"{folder}: its tokenizer's PAD or end token has no row among the model's {rows:,}: was "
                        "tokenizer_config.json lost or changed?")
    return codec


def codec_with_pad(name: str | Path, day: date = DATE) -> PromptCodec:
    """The codec of a base model as it comes: a PAD token of its own is found or added, and the tokenizer gets the
    template that the codec uses. `day`: what a template that asks for the date is told. Raises ChatFormatError."""
    tokenizer, stops = load_tokenizer(name), stops_of(name)
    codec = PromptCodec(tokenizer, stops, day, needs_pad=False)
    give_pad(tokenizer, {*codec.stop_ids, *codec.frame_ids})
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {key: with_fixed_date(text, day) for key, text in tokenizer.chat_template.items()}
    else:
        tokenizer.chat_template = codec.template
    return PromptCodec(tokenizer, stops)


def stops_of(folder: str | Path) -> list[int]:
    """The tokens that end an answer by a model's generation_config.json; none where it has no such file."""
    try:
        found = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    except (OSError, ValueError):
        return []
    return [found] if isinstance(found, int) else list(found or [])
