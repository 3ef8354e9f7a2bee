"""Tokenizers of fifteen families, small, with chat formats as the families' own models have them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.model.tokenizer import load_tokenizer

TRAINED_ON = [
    "The quick brown fox jumps over the lazy dog, and 12 more.", "def add(a, b):\n    return a + b\n\n\nprint(add(1))",
    "What color is the sky? It is blue.", "Write a poem about the sea:\n\n- waves\n- salt", "user system assistant",
    "Grüße aus Köln, naïve café", "You are a helpful assistant.", "    if x == 3:\n        pass\n\treturn [x in y]",
    "[INST] <<SYS>> <</SYS>> [/INST] USER: ASSISTANT:",
] * 8


@dataclass(frozen=True)
class Family:
    """`template` "" for none; `ends` the tokens that end an answer; `system`: whether it has system turns."""

    kind: str
    specials: tuple[str, ...]
    names: dict[str, str]
    template: str
    ends: tuple[str, ...]
    system: bool = True
    adds_bos: bool = False
    as_text: tuple[str, ...] = ()  # marks that are no tokens


def _turns(body: str, after: str = "", before: str = "") -> str:
    return f"{before}{{% for m in messages %}}{body}{{% endfor %}}{after}"


_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_CHATML_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
_HEADER_ASKS = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                  "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
_ALTERNATE = ("{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}")
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"

FAMILIES = {
    "chatml": Family("bytes", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                     {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"},
                     _turns(_CHATML, _CHATML_ASKS), ("<|im_end|>",)),
    "qwen": Family("newer bytes", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                   {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
                   _turns(_CHATML, _CHATML_ASKS, "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a "
                                                 "helpful assistant.<|im_end|>\n{% endif %}"), ("<|im_end|>",)),
    "qwen_base": Family("newer bytes", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
                        _turns(_CHATML, _CHATML_ASKS), ("<|endoftext|>", "<|im_end|>")),
    "llama2": Family(
        "pieces", ("<unk>", "<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}" + _ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first "
        "else '') + (m.content | trim) + ' [/INST]' }}{% else %}{{ ' ' + (m.content | trim) + ' ' + eos_token }}"
        "{% endif %}{% endfor %}", ("</s>",), adds_bos=True, as_text=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),
    "llama3": Family("newer bytes", _LLAMA3_TOKENS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
                     _turns(_HEADER, _HEADER_ASKS, "{{ bos_token }}"), ("<|eot_id|>",), adds_bos=True),
    "llama32": Family(
        "newer bytes", _LLAMA3_TOKENS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}{% set rest = messages[1:] %}"
        "{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}<|start_header_id|>system<|end_header_id|>"
        "\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{{ said }}<|eot_id|>"
        "{% for m in rest %}" + _HEADER + "{% endfor %}" + _HEADER_ASKS, ("<|eot_id|>",), adds_bos=True),
    "mistral": Family(
        "pieces", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
        "{% for m in rest %}" + _ALTERNATE + "{% if m.role == 'user' %}[INST] {{ said if loop.first else '' }}"
        "{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}", ("</s>",), adds_bos=True),
    "gemma": Family(
        "pieces", ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "{{ bos_token }}" + _NO_SYSTEM + "{% for m in messages %}" + _ALTERNATE +
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}", ("<end_of_turn>", "<eos>"),
        system=False, adds_bos=True),
    "phi": Family("bytes", ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
                  {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
                  _turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "{% if add_generation_prompt %}<|assistant|>\n"
                         "{% else %}{{ eos_token }}{% endif %}"), ("<|end|>", "<|endoftext|>")),
    "deepseek": Family(
        "newer bytes", ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
                  "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        {"bos_token": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
         "eos_token": "<\uff5cend\u2581of\u2581sentence\uff5c>",
         "pad_token": "<\uff5cend\u2581of\u2581sentence\uff5c>"},
        _turns("{% if m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}{% elif m.role == 'assistant' %}"
               "<\uff5cAssistant\uff5c>{{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}",
               "{% if add_generation_prompt %}<\uff5cAssistant\uff5c>{% endif %}", "{{ bos_token }}"),
        ("<\uff5cend\u2581of\u2581sentence\uff5c>",), adds_bos=True),
    "gpt_oss": Family(
        "newer bytes", ("<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>",
                        "<|return|>"),
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}"
        "{% if m.role == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>"
        "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}<|start|>assistant"
        "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}", ("<|return|>",)),
    "added": Family("bytes", ("<|endoftext|>",), {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
                    _turns("<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n",
                           "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"), ("<|end|>", "<|endoftext|>")),
    "vicuna": Family("pieces", ("<unk>", "<s>", "</s>"),
                     {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
                     _turns("{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] + m.content + "
                            "(eos_token if m.role == 'assistant' else '\n') }}",
                            "{% if add_generation_prompt %}ASSISTANT:{% endif %}", "{{ bos_token }}"), ("</s>",),
                     adds_bos=True, as_text=("USER:", "ASSISTANT:")),
    "gpt2": Family("bytes", ("<|endoftext|>",), {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>",
                                                 "unk_token": "<|endoftext|>"}, "", ("<|endoftext|>",)),
    "spm_base": Family("pieces", ("<unk>", "<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>",
                                                            "unk_token": "<unk>"}, "", ("</s>",), adds_bos=True),
}
PLAIN_ADDED = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # family "added": tokens that are not special


def build(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """The family's tokenizer, saved in the folder and loaded from it."""
    family = FAMILIES[name]
    raw = {"bytes": _bytes, "newer bytes": _newer_bytes, "pieces": _pieces}[family.kind]()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.specials])
    if name == "added":
        raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    if family.adds_bos:
        bos = family.names["bos_token"]
        raw.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B",
                                                           [(bos, raw.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **family.names)
    tokenizer.chat_template = family.template or None
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def _newer_bytes() -> Tokenizer:
    """With a rule of Llama 3's and Qwen's kind: line breaks go with the blanks before them, digits one by one."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    return _bytes(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"),
                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


def _bytes(words: Any = None) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(TRAINED_ON, trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return raw


def _pieces() -> Tokenizer:
    """SentencePiece's way: a blank before the text, blanks as U+2581, bytes for what is unknown."""
    raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    raw.normalizer = normalizers.Sequence(marks)
    raw.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # no piece goes over a blank
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    raw.train_from_iterator(TRAINED_ON, trainers.BpeTrainer(
        vocab_size=620, show_progress=False, max_token_length=12,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]))
    whole = json.loads(raw.to_str())
    whole["added_tokens"] = []  # bytes are pieces, not special tokens
    return Tokenizer.from_str(json.dumps(whole))


_WORDS = ["blue", "the", "fox", "Köln", "naïve", "12", "3.5", "{x}", "a\tb", "漢字", "🦊", "->", "==", "don't", "e.g.",
          "return", "<b>", "[1]", "#", "*", "user", "assistant", "system", "\u00a0", "zz", "|", "'"]
_FORMS: list[Callable[[random.Random, str], str]] = [
    lambda rng, text: text, lambda rng, text: f" {text}", lambda rng, text: f"{text} ", lambda rng, text: f"{text}\n",
    lambda rng, text: f"def f(x):\n    return {text}\n\n\n    # {text}", lambda rng, text: f"{text}.\n\n{text}?",
    lambda rng, text: f"```python\n{text}\n```", lambda rng, text: text.upper()]


def text(rng: random.Random) -> str:
    """A made-up text: words, symbols, Unicode, code, blanks at its ends."""
    return rng.choice(_FORMS)(rng, " ".join(rng.choices(_WORDS, k=rng.randrange(1, 9))))


def conversation(rng: random.Random, system: bool) -> list[dict[str, Any]]:
    """Messages of one to five questions of the user, the last one unanswered."""
    turns = [{"role": "system", "content": text(rng)}] if system and rng.random() < 0.5 else []
    for number in range(rng.randrange(1, 6)):
        turns += [{"role": "assistant", "content": text(rng)}] if number else []
        turns += [{"role": "user", "content": text(rng)}]
    return turns
