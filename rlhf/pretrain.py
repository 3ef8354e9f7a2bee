"""The base model: a small GPT trained on a corpus, or a Hugging Face model taken as it is."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.batching import pack_documents
from rlhf.data.corpus import corpus_texts, held_out_count
from rlhf.data.packing import document_positions
from rlhf.data.token_store import Column, TokenStore, chunks, only
from rlhf.errors import UserError, disk_problem, first_line
from rlhf.files import is_writer
from rlhf.losses import completion_loss
from rlhf.model.chat_format import ChatFormatError, PromptCodec, codec_with_pad
from rlhf.model.device import device
from rlhf.model.forward import next_token_log_probs
from rlhf.model.load import load_policy, save_model, small_gpt
from rlhf.model.tokenizer import text_ids, train_tokenizer
from rlhf.model.vocabulary import check_untrained, check_vocabulary, describe
from rlhf.params import PretrainParams
from rlhf.training import distributed
from rlhf.training.loop import Part, Validation, evenly, train_loop
from rlhf.training.optim import muon_and_adamw
from rlhf.training.seeding import generator, seed_everything

LEAST_DOCUMENTS = 100
LONGEST_ROW = 2048  # tokens of a pretraining row where the parameters ask for the model's context [InstructGPT App. C]
LEAST_ROWS = 16
ROWS_OF = 64  # a vocabulary that a PAD row is added to becomes a multiple of this: matrix units are fast with it
CHECKS = 10  # times that the loss on held-out documents is measured while training


def pretrain(params: PretrainParams, texts: Sequence[str], seed: int, folder: Path) -> dict[str, float]:
    """Trains tokenizer and model on `texts` and saves them in `folder`/model. Returns metrics.

    `texts` are passed over twice: `stored_texts` keeps a large corpus out of memory. The last `held_out_count` are held
    out for `pretrain/valid_loss` (nats per token). Raises UserError where the corpus is too small.
    """
    seed_everything(seed)
    if len(texts) < LEAST_DOCUMENTS:
        raise UserError(f"data/corpus.jsonl: {len(texts)} documents; at least {LEAST_DOCUMENTS} are needed")
    cut = len(texts) - held_out_count(len(texts))
    train_texts, valid_texts = texts[:cut], texts[cut:]
    tokenizer = train_tokenizer(train_texts, params.vocab_size)
    eos_id = tokenizer.eos_token_id
    rows, valid_rows = (packed_rows(some, tokenizer, params.context, folder) for some in (train_texts, valid_texts))
    if not rows or not valid_rows:
        raise UserError(f"data/corpus.jsonl: its documents fill no row of pretrain.context = {params.context} tokens")
    model = small_gpt(params, tokenizer)
    parameters = model.num_parameters()
    describe(model, tokenizer, PromptCodec(tokenizer).stop_ids)
    distributed.check_divides(params.batch_size, "pretrain.batch_size")
    model.train()

    def loss_of_step(step: int) -> list[Part]:
        ids = corpus_batch(rows, params.batch_size, step, seed)
        mine = list(distributed.share(range(len(ids))))  # batch_size is a multiple of the processes
        loss = lm_loss(model, ids[mine], params.precision, positions_of(ids[mine], params, eos_id))
        return [(loss * (len(mine) / len(ids)), {})]

    optimizers = muon_and_adamw(model, params.lr, params.muon_lr, params.weight_decay)
    validation = Validation(evenly(params.steps, CHECKS), ["pretrain/valid_loss"],
                            lambda: {"pretrain/valid_loss": rows_loss(model, valid_rows, params, eos_id)})
    train_loop("pretrain", folder, model, optimizers, steps=params.steps, warmup=params.warmup_steps,
               loss_of_step=loss_of_step, columns=[], validation=validation)
    model.eval()
    save_model(model, tokenizer, folder / "model")
    return {"pretrain/valid_loss": rows_loss(model, valid_rows, params, eos_id), "pretrain/tokens": params.steps
            * params.batch_size * params.context, "pretrain/parameters": parameters}


def stored_texts(texts: Iterable[str], folder: Path) -> Column[str]:
    """Texts in a file in `folder`, read on access (rlhf/data/token_store.py)."""
    store = TokenStore(folder)
    for text in texts:
        store.append([text.encode()], len(text))
    return Column(store, lambda parts: bytes(only(parts)).decode())


def packed_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int,
                folder: Path) -> Column[list[int]]:
    """Texts end to end, EOS before each, in rows of `length` tokens that lie in a file in `folder`."""
    store = TokenStore(folder)
    documents = (ids for some in chunks(texts) for ids in text_ids(tokenizer, some))
    for row in pack_documents(documents, length, tokenizer.eos_token_id):
        store.append([row], length)
    return Column(store, only)


def read_corpus(path: Path, tokenizer: PreTrainedTokenizerBase, positions: int, folder: Path, row_tokens: int = 0
                ) -> Column[list[int]]:
    """The pretraining corpus in packed rows, for the stages that mix it in; they lie in a file in `folder`.

    A row has `row_tokens` tokens; 0: the model's context (`positions`), at most LONGEST_ROW. Raises UserError where
    there are fewer than LEAST_ROWS rows, or where a row would be longer than the context.
    """
    if row_tokens > positions:
        raise UserError(f"pretraining rows of {row_tokens} tokens: the model's context is {positions}")
    rows = packed_rows(corpus_texts(path), tokenizer, row_tokens or min(LONGEST_ROW, positions), folder)
    if len(rows) < LEAST_ROWS:
        raise UserError(f"{path}: nearly empty, but the profile mixes pretraining text in; give the source a corpus, "
                        "or set sft.pretrain_mix and ppo.ptx_coef to 0")
    return rows


@lru_cache(maxsize=2)  # a batch may lie on two passes
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "corpus", epoch))


def corpus_batch(rows: Sequence[list[int]], batch_size: int, step: int, seed: int) -> Tensor:
    """Rows of the packed corpus for a step: every pass over it shuffled, one after the other. [batch_size, context]."""
    places = (divmod(number, len(rows)) for number in range(step * batch_size, (step + 1) * batch_size))
    return torch.tensor([rows[int(_order(len(rows), seed, epoch)[place])] for epoch, place in places], device=device())


def positions_of(ids: Tensor, params: PretrainParams, eos_id: int) -> Tensor | None:
    """Positions of the documents of packed rows where each is to see only itself, else None."""
    return document_positions(ids, eos_id) if params.document_mask else None


def lm_loss(model: PreTrainedModel, ids: Tensor, precision: str, positions: Tensor | None = None) -> Tensor:
    """Mean next-token loss over all positions of packed rows, nats. `positions` [B, T] keep documents apart."""
    log_probs = next_token_log_probs(model, ids, precision, positions)
    return completion_loss(log_probs, torch.ones_like(log_probs))


def corpus_losses(model: PreTrainedModel, ids: Tensor, precision: str, at_once: int = 0, tokens: int = 0
                  ) -> Iterator[Tensor]:
    """This process's part of the mean loss over a step's packed rows, at most `at_once` rows and `tokens` tokens at a
    time (0: all); the parts of all processes add up to it."""
    if tokens:
        at_once = min(at_once or len(ids), max(1, tokens // ids.shape[1]))
    mine = list(distributed.share(range(len(ids))))
    most = -(-len(ids) // distributed.shares())  # rows of the process that has most: all make as many passes
    for start in range(0, most, at_once or most):
        rows = mine[start:start + (at_once or most)]
        yield lm_loss(model, ids[rows or [0]], precision) * (len(rows) / len(ids))


@torch.no_grad()
def rows_loss(model: PreTrainedModel, rows: Sequence[list[int]], params: PretrainParams, eos_id: int) -> float:
    """Mean loss over packed rows, nats per token."""
    total = 0.0
    for start in distributed.share(range(0, len(rows), 64)):
        ids = torch.tensor(list(rows[start:start + 64]), device=device())
        total += lm_loss(model, ids, params.precision, positions_of(ids, params, eos_id)).item() * len(ids)
    return distributed.all_reduce({"loss": total})["loss"] / len(rows)


def take_base_model(params: PretrainParams, folder: Path) -> dict[str, float]:
    """Saves a Hugging Face model as the base in `folder`/model, ready for chat: with a PAD token of its own, a chat
    template whose date is fixed, and the tokens that end an answer.

    Raises UserError for a model that cannot be loaded, a template that cannot be used, and a tokenizer without EOS or
    with more tokens than the model.
    """
    name = params.base_model
    try:
        codec = codec_with_pad(name, date.fromisoformat(params.template_date))
        model = load_policy(name)
    except ChatFormatError as error:
        raise UserError(f"pretrain.base_model = {name!r}: {error}") from None
    except UserError as error:
        raise UserError(f"pretrain.base_model: {error}") from None
    except Exception as error:  # whatever a foreign tokenizer or template makes transformers raise
        if disk_problem(error, folder):
            raise
        raise UserError(f"pretrain.base_model = {name!r}: cannot be loaded: {first_line(error)}") from None
    tokenizer, known = codec.tokenizer, model.get_input_embeddings().num_embeddings
    check_vocabulary(model, tokenizer, f"pretrain.base_model = {name!r}")
    named = [check_untrained(model, tokenizer, name)]
    if codec.asks_with:
        named.append(f"{name}: its chat template ends a prompt with {codec.asks_with!r}, after which answers are "
                     "trained: those of the data should go on from there, or begin with it")
    for line in filter(None, named):
        if is_writer():
            print(line, flush=True)
    narrow = exact_in_bfloat16(model)
    if tokenizer.pad_token_id >= known:
        rows = -(-(tokenizer.pad_token_id + 1) // ROWS_OF) * ROWS_OF
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():  # as transformers does, but without its random part
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[known:] = layer.weight[:known].mean(dim=0)
    model.config.pad_token_id = tokenizer.pad_token_id
    parameters = model.num_parameters()
    describe(model, tokenizer, codec.stop_ids)
    save_model(model.to(torch.bfloat16) if narrow else model, tokenizer, folder / "model")
    return {"pretrain/parameters": parameters}


def exact_in_bfloat16(model: PreTrainedModel) -> bool:
    """Whether no weight loses anything in bfloat16: the model was published in it, and is saved in it again."""
    return all(torch.equal(value, value.to(torch.bfloat16).to(value.dtype)) for value in model.parameters())
