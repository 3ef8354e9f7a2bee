"""What training makes of a row: text, ids, tokens, where the loss is, what ends an answer."""

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.model.chat_format import Prompt, PromptCodec


def shown(codec: PromptCodec, prompt: Prompt, completions: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """For each completion (or for the prompt alone) its text as the model reads it, ids, tokens, mask, stop_ids.

    `mask` is 1 on the tokens of the answer, which SFT's loss is on, PPO samples and the reward model reads last.
    """
    [asked] = codec.prompts([prompt])
    for answer in codec.completions(completions) if completions else [[]]:
        ids = asked + answer
        yield {"text": codec.tokenizer.decode(ids), "ids": ids, "tokens": codec.tokenizer.convert_ids_to_tokens(ids),
               "mask": [0] * len(asked) + [1] * len(answer), "stop_ids": list(codec.stop_ids)}
