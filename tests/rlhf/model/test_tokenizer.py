"""The tokenizer that is trained here, its PAD and EOS, ids of plain texts."""

from copy import deepcopy
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rlhf.model.tokenizer import EOS, PAD, give_pad, load_tokenizer, newline_ids, text_ids, train_tokenizer


def test_training_is_deterministic(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(texts, 320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(again) == 320
    assert train_tokenizer(texts[:-40], 320).get_vocab() != again.get_vocab()


def test_pad_and_eos_differ_and_are_in_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens([tokenizer.pad_token_id, tokenizer.eos_token_id]) == [PAD, EOS]


def test_names_of_special_tokens_in_a_plain_text_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id in tokenizer(f"a{EOS}b")["input_ids"]  # asked directly it is the token
    [ids] = text_ids(tokenizer, [f"a{EOS}b"])
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"a{EOS}b"
    assert text_ids(tokenizer, []) == []


def test_pad_is_a_token_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokenizer's own one, an existing one that no text uses, or a new one."""
    kept = deepcopy(tokenizer)
    give_pad(kept, [])
    assert kept.pad_token == PAD
    for pad in (None, EOS):
        for specials, chosen in ((["<|fim|>"], PAD), (["<|reserved_3|>", "<|right_pad_id|>"], "<|right_pad_id|>"),
                                 (["<unused0>", "<|start|>"], "<unused0>")):
            changed = deepcopy(tokenizer)
            changed.add_special_tokens({"additional_special_tokens": specials})
            changed.pad_token = pad
            give_pad(changed, [changed.convert_tokens_to_ids(PAD)] if chosen != PAD else [])
            assert changed.pad_token == chosen
            assert changed.pad_token_id != changed.eos_token_id


def test_newline_ids_are_the_tokens_with_a_line_break(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = [index for index in range(len(tokenizer)) if "\n" in tokenizer.decode([index])]
    assert expected
    assert newline_ids(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert newline_ids(load_tokenizer(tmp_path)) == expected
