"""Where the stages' files lie in a checkout."""

from pathlib import Path

MODELS = {"base": Path("models/pretrain"), "sft": Path("models/sft")}
POLICIES, POLICY_METRICS = Path("models/policies"), Path("metrics/policies")  # what each arm of stage ppo makes
RM, JUDGE = Path("models/rm"), Path("models/judge")
PROMPTS, CORPUS = Path("data/ppo.jsonl"), Path("data/corpus.jsonl")
TAX, BENCHMARKS = Path("data/tax"), Path("profiles/benchmarks")
PARAMETERS = Path("build/parameters.yaml")  # all parameters with their values, as DVC compares them
FEEDBACK = Path("raw/feedback")  # rows that people have labeled, for ingest


def metrics_of(stage: str) -> Path:
    """A stage's numbers (.json) and journal (.csv), without the ending: metrics/sft, metrics/policies/<arm>."""
    name, _, arm = stage.partition("@")
    return POLICY_METRICS / arm if name == "ppo" and arm else Path("metrics") / stage
