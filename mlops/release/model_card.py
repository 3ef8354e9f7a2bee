"""The Hugging Face model card of a promoted policy: what it is, its training data, its evaluation and gates."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from mlops.config.loader import load_params
from mlops.release.gates import Gate
from mlops.reporting.comparison import in_order, models_of
from mlops.reporting.headline import arms_of, estimate, judge_words, number, percent, score
from mlops.reporting.models import at_ceiling, model_table
from mlops.reporting.report import data_versions

SHOWN = ("gold", "helpful", "truthful", "harmless", "toxic", "repetition", "length")


def model_card(root: Path, metrics: Mapping[str, Any], gates: Sequence[Gate], reasons: Sequence[str]) -> str:
    """README.md of models/promoted. `reasons`: why the policy is not promoted; the card begins with them."""
    loaded = load_params(root)
    stages = loaded.stages
    source = json.loads((root / "data" / "source.json").read_text(encoding="utf-8"))
    data = ModelCardData(
        base_model=stages.pretrain.base_model or None, library_name="transformers", pipeline_tag="text-generation",
        tags=["rlhf", "ppo", "instructgpt", "instructflow"], model_name=None)
    models = models_of(metrics)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("model_card.md.j2").render(
        front=data.to_yaml().strip(), embedded=source["source"] == "embedded",
        reasons=reasons, gates=gates, models=models,
        base=stages.pretrain.base_model or "a small GPT trained from scratch on data/corpus.jsonl",
        seed=loaded.seed, profile=loaded.profile, arm=stages.promoted, ppo=stages.arms[stages.promoted],
        sft=stages.sft, rm=stages.rm,
        versions=data_versions(root), judge=judge_words(metrics),
        qualities=_qualities(metrics, models), wins=_wins(metrics),
        steps=model_table(metrics), ceiling=at_ceiling(metrics),
        kl=score(number(metrics, f"eval/kl_{stages.promoted}")),
        prompts=int(metrics["eval/prompts"]),
        accuracy=_rm_accuracy(root), sources=source.get("names", [])).strip() + "\n"


def _qualities(metrics: Mapping[str, Any], models: Sequence[str]) -> list[tuple[str, list[str]]]:
    rows = []
    for stem in SHOWN:
        values = [number(metrics, f"eval/{stem}_{model}") for model in models]
        if any(value is not None for value in values):
            form = score if stem in ("gold", "length") else percent
            rows.append((stem, [form(value) for value in values]))
    return rows


def _wins(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(opponent, win rate with interval) of the policy; without an independent judge, what its reward model prefers."""
    rows = []
    for word in ("win_rate", "rm_prefers")[:1 if any(key.startswith("eval/win_rate_vs_") for key in metrics) else 2]:
        prefix = f"eval/{word}_vs_"
        names = {key.removeprefix(prefix) for key in metrics if key.startswith(prefix)}
        plain = [name for name in names if "/" not in name
                 and not name.endswith(("_low", "_high", "_equal_length", "_length_weight"))]
        for name in in_order(plain, arms_of(metrics)):
            rate = estimate(metrics, prefix + name)
            if rate and rate.low is not None:
                rows.append((name, f"{percent(rate.value)} ({percent(rate.low)} to {percent(rate.high)})"))
    return rows


def _rm_accuracy(root: Path) -> str:
    path = root / "metrics" / "rm.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return percent(number(values, "rm/accuracy"))
