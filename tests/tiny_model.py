"""Tiny models as others publish them, and comparisons of people who have one: what the first hour starts from."""

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ANIMALS = ("cat", "dog", "fox", "owl", "bee", "cow", "hen", "pig", "bat", "elk", "frog", "goat", "hawk", "lion")
PLACES = ("forest", "river", "garden", "house", "field", "city", "lake", "barn", "meadow", "mountain")
ASKED = ("Where does the {} number {} live?", "Tell me the home of {} {}.", "What is the place of {} {} in the story?")
WORSE = ("I do not know.", "No.", "{0} {0} {0}", "Go away, that is a stupid question.")


def comparisons(count: int, seed: int = 1) -> list[tuple[str, str, str]]:
    """(question, better answer, worse answer)."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        animal = rng.choice(ANIMALS)
        question = rng.choice(ASKED).format(animal, rng.randint(2, 999))
        rows.append((question, f"The {animal} lives in the {rng.choice(PLACES)}, near the old {rng.choice(PLACES)}.",
                     rng.choice(WORSE).format(animal)))
    return rows


def write_pairs(path: Path, count: int, columns: tuple[str, str, str] = ("question", "better", "worse")) -> Path:
    """A CSV file of comparisons."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(comparisons(count))
    return path


def write_model(folder: Path, kind: str) -> Path:
    """A model folder without PAD and without chat template, its kind "gpt2", "llama" or "qwen2"."""
    special = ["<s>", "</s>"] if kind == "llama" else ["<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator((" ".join(row) for row in comparisons(300)), trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[-1]).save_pretrained(
        folder)
    torch.manual_seed(0)
    size, last = tokenizer.get_vocab_size(), len(special) - 1
    if kind == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(
            vocab_size=size, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=last))
    else:
        config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
        model = cls(config(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0,
                           eos_token_id=last))
    model.save_pretrained(folder)
    return folder
