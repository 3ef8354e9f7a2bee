"""What training makes of a row: text, ids, tokens, where the loss is, what ends an answer."""

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data.prompts import Prompt
from rlhf.model.chat_format import PromptCodec


def shown(codec: PromptCodec, prompt: Prompt, completions: Sequence[str] = (), all_answers: bool = False
          ) -> Iterator[dict[str, Any]]:
    """For each completion (or for the prompt alone) its text as the model reads it, ids, tokens, mask, stop_ids.

    `mask` is 1 on the tokens of the answer, which SFT's loss is on, PPO samples and the reward model reads last; with
    `all_answers` also on those of the earlier answers that SFT's loss is on.
    """
    [asked] = codec.prompts([prompt])
    read = [0] * len(asked)
    for start, end in codec.earlier_answers(prompt, asked) if all_answers else []:
        read[start:end] = [1] * (end - start)
    for answer in codec.completions(completions) if completions else [[]]:
        ids = asked + answer
        yield {"text": codec.tokenizer.decode(ids), "ids": ids, "tokens": codec.tokenizer.convert_ids_to_tokens(ids),
               "mask": read + [1] * len(answer), "stop_ids": list(codec.stop_ids)}
