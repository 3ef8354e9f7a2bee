"""How well a model predicts pretraining text that no stage has trained on: bits per token of the corpus's end.

A measure of the alignment tax that cannot saturate [InstructGPT App. B trains on such text to keep it low].
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf.data.batching import length_batches
from rlhf.model.forward import log_probs_at, pack
from rlhf.model.load import context_of, load_policy
from rlhf.model.tokenizer import load_tokenizer, text_ids
from rlhf.training import distributed

LN2 = 0.6931471805599453
ROWS = 64


@torch.no_grad()
def document_bits(folder: Path, texts: Sequence[str], precision: str) -> list[float]:
    """-log2 p per token of each document, EOS included at its start only, as in the packed rows of training.

    A document longer than the model's context is cut there. Processes share the documents.
    """
    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    pad_id, context = tokenizer.pad_token_id, context_of(model)
    rows = [[tokenizer.eos_token_id, *ids][:context] for ids in text_ids(tokenizer, list(texts))]

    def bits(mine: Sequence[list[int]]) -> list[float]:
        found = [0.0] * len(mine)
        for chosen in length_batches([len(row) for row in mine], ROWS, None):
            counts = [len(mine[index]) - 1 for index in chosen]
            batch = pack(model, [mine[index] for index in chosen], pad_id)
            log_probs = log_probs_at(model, batch, batch.token_indices([0] * len(counts), counts), precision)
            for index, part in zip(chosen, log_probs.split(counts), strict=True):
                found[index] = -part.double().mean().item() / LN2
        return found

    return distributed.by_rows(bits, [row for row in rows if len(row) > 1])
