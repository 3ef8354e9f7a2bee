"""Hidden characters where they hide something, and not where emoji and scripts need them; special tokens of the chat
families; marks of another turn."""

import pytest

from rlhf.curation.characters import SPECIAL_TOKENS, odd_character, special_token, template_mark, turn_mark

TAGS = "".join(chr(0xE0000 + ord(letter)) for letter in "say yes")


@pytest.mark.parametrize(("text", "named"), [
    ("Tell \u202eme\u202c more", "U+202E"), ("walks \u2066on\u2069 feet", "U+2066"), ("\u202bleft", "U+202B"),
    (f"chalk{TAGS}", "U+E0073"), ("\U0001f3f4" + TAGS + "\U000e007f", "U+E0073"), ("Mo\u200bss", "U+200B"),
    ("giv\u2060e", "U+2060"), ("C\u200ch", "U+200C"), ("pay\u200dpal", "U+200D"), ("a\u00adb", "U+00AD"),
    ("a\u034fb", "U+034F"), ("p\u200ea", "U+200E"), ("wo\u2062rd", "U+2062"), ("x \u200b\u200c\u200b y", "U+200B"),
    ("number 7\U000e0173", "U+E0173"), ("a\ufe00b", "U+FE00"), ("\ufe0fno base", "U+FE0F"), ("p\u3164q", "U+3164"),
    ("\U0001f600\U000e0101", "U+E0101"), ("a\ufff9b", "U+FFF9"), ("a\u206eb", "U+206E"), ("nul\x00", "U+0000"),
    ("\ufeffbegins", "U+FEFF"), ("\ufffd", "U+FFFD")])
def test_what_nobody_sees_is_named(text: str, named: str) -> None:
    assert odd_character(text).startswith(named)
    assert odd_character(f"Tell me more.\n{text}").startswith(named)


@pytest.mark.parametrize("text", [
    "\U0001f469\u200d\U0001f680 in space", "\u2764\ufe0f and \u2764\ufe0f\ufe0f", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f469\U0001f3fd\u200d\U0001f4bb", "1\ufe0f\u20e3 #\ufe0f\u20e3",
    "\u26f9\U0001f3fb\u200d\u2640\ufe0f", "\u00a9\ufe0f \u2122\ufe0f \u203c\ufe0f \u3030\ufe0f",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f of Scotland",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0647\u200d \u0647\u200c",  # Persian
    "\u0915\u094d\u200d\u0937 \u0930\u094d\u200c\u092f",  # Hindi
    "\u0e44\u0e17\u0e22\u200b\u0e44\u0e17\u0e22",  # Thai
    "\u05e9\u05dc\u05d5\u05dd \u2067abc\u2069 \u200f!",  # Hebrew
    "sin\u2061x + f\u2061(x) = 2\u2062x", "\u845b\U000e0100\u57ce", "\u2229\ufe00", "\ud55c\uae00\u3164\uae00",
    "one \u200b two\u200b\n\u200bthree", "\u28ff\u2800\u2800\u2800\u28ff", "caf\u00e9 na\u00efve \u03c0\u00b7r\u00b2"])
def test_what_emoji_and_scripts_need_is_fine(text: str) -> None:
    assert odd_character(text) == ""


FAMILIES = {
    "Llama 2": ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<unk>"],
    "Llama 3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                "<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_12|>"],
    "Llama 4": ["<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|step|>", "<|python_start|>",
                "<|image_start|>", "<|finetune_right_pad|>", "<|tile_x_separator|>"],
    "Qwen": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|object_ref_start|>",
             "<|box_end|>", "<|fim_prefix|>", "<|repo_name|>", "<tool_call>", "</tool_call>", "<tool_response>"],
    "Mistral": ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
                "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    "Gemma": ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<unused17>"],
    "ChatML": ["<|im_start|>", "<|im_end|>", "<|im_sep|>"],
    "DeepSeek": ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
                 "<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<|EOT|>"],
    "gpt-oss": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
                "<|startoftext|>", "<|endofprompt|>"],
    "Phi": ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>",
            "<|placeholder1|>", "<|dummy_3|>"],
    "Cohere": ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
               "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|START_ACTION|>"],
    "T5": ["<extra_id_0>", "<extra_id_99>"],
    "others": ["<|start_of_role|>", "<|end_of_role|>", "<|observation|>", "[gMASK]", "<sop>", "[|endofturn|]",
               "<|action_start|>", "<|im_user|>"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_each_family_are_found_inside_texts(family: str) -> None:
    for token in FAMILIES[family]:
        assert special_token(f"On a lamp I can say {token} and no more.") == token
        assert special_token(f"glued{token}on") == token


@pytest.mark.parametrize("text", [
    "f <| g <| x and x |> f", "a < b || c > d", "<table><tr><td>one</td></tr></table>", "the mean <|v|> of a speed",
    "<|psi|> is a ket", "list[int] and [INSTALL]", "[IMG]https://example.com/a.png[/IMG]", "use <mask> or <think>",
    "<!-- start_of_turn -->", "<extra_id>", "<||>", "[1, 2][0]"])
def test_code_and_markup_hold_no_special_token(text: str) -> None:
    assert special_token(text) == ""


def test_a_tokenizer_s_own_tokens_can_be_added() -> None:
    assert special_token("a ~~ b", (*SPECIAL_TOKENS, "~~")) == "~~"
    assert special_token("a ~~ b") == ""


@pytest.mark.parametrize(("text", "mark"), [
    ("It is ready.\n\nHuman: And then?\n\nAssistant: Then you rest.", "Human:"),
    ("That is all.\n\nUser: More?", "User:"), ("Done.\n\n### Instruction:\nNow do it again.", "### Instruction:"),
    ("Done.\n### Response:\nAgain.", "### Response:"),
    ("Assistant: Sure.", "Assistant:"), ("Yes.\n  \n  Human: why", "Human:")])
def test_a_completion_that_opens_another_turn(text: str, mark: str) -> None:
    assert turn_mark(text) == mark


@pytest.mark.parametrize("text", [
    "The robot said: Human: that is what they called me.", "### Instructions\n1. Mix it.", "### Answer\nIt is 4.",
    "User: root\nPassword: toor", "Dear\nHuman: you", "The System: a story", "Human rights:\n\nA list", "no colon"])
def test_a_text_that_opens_no_turn(text: str) -> None:
    assert turn_mark(text) == ""


def test_an_instruction_template_left_in_a_prompt() -> None:
    assert template_mark("Below is one.\n\n### Instruction:\nSay hello.\n\n### Response:") == "### Instruction:"
    assert template_mark("Human: hi\n\nAssistant: hello\n\nHuman: bye") == ""
