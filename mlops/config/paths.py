"""Where the stages' files lie in a checkout."""

from pathlib import Path

MODELS = {"base": Path("models/pretrain"), "sft": Path("models/sft"), "ppo": Path("models/ppo")}
RM = Path("models/rm")
PROMPTS = Path("data/ppo.jsonl")
TAX, BENCHMARKS = Path("data/tax"), Path("profiles/benchmarks")
FEEDBACK = Path("raw/feedback")  # rows that people have labeled, for ingest
