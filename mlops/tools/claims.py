"""The paper's claims, tested on the numbers of several seeds: metrics/claims.json and docs/claims.md.

A claim holds if it holds for every seed: `low` and `high` are the lowest and highest ends of the seeds' 95 % intervals,
`ours` is the mean. Claims and figures are from Ouyang et al. 2022; the last claim is from Gao et al. 2022.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.evaluation.overoptimisation import find_peak
from rlhf.files import write_atomic, write_json

Numbers = Mapping[str, Any]
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Claim:
    """A finding of the paper, how it is measured here, and when it holds."""

    text: str
    paper: str
    measured: str
    value: Callable[[Numbers], Interval]
    holds: Callable[[float, float], bool]
    bar: str
    also: Callable[[Numbers], bool] = lambda numbers: True  # a further condition, for every seed


def _estimate(numbers: Numbers, key: str) -> Interval:
    scores = numbers["scores"]
    return scores[key], scores[f"{key}_low"], scores[f"{key}_high"]


def _win(one: str, other: str) -> Callable[[Numbers], Interval]:
    """Win rate of `one` against `other`, from the metric of either order."""
    def value(numbers: Numbers) -> Interval:
        key = f"eval/win_rate/{one}_vs_{other}"
        if key in numbers["scores"]:
            return _estimate(numbers, key)
        mean, low, high = _estimate(numbers, f"eval/win_rate/{other}_vs_{one}")
        return 1 - mean, 1 - high, 1 - low
    return value


def _generalises(numbers: Numbers) -> Interval:
    """Accuracy on training labelers minus accuracy on held-out ones."""
    rm = numbers["rm"]
    difference = rm["training"] - rm["held_out"]
    half = 1.96 * math.hypot(rm["training_stderr"], rm["held_out_stderr"])
    return difference, difference - half, difference + half


def _tax(model: str) -> Callable[[Numbers], Interval]:
    return lambda numbers: _estimate(numbers, f"tax_of/{model}/mean")


def _share_of_tax(model: str) -> Callable[[Numbers], Interval]:
    """A model's mean tax as a share of PPO's; the interval ignores the error of PPO's tax."""
    def value(numbers: Numbers) -> Interval:
        mean, low, high = _tax(model)(numbers)
        reference = max(_tax("ppo")(numbers)[0], 1e-9)
        return mean / reference, low / reference, high / reference
    return value


def _share_gain(quality: str) -> Callable[[Numbers], Interval]:
    """PPO's share of fully truthful (or harmless) responses minus the prompted base's, with its normal interval."""
    def value(numbers: Numbers) -> Interval:
        ours, theirs = (numbers["scores"][f"eval/{quality}_{model}"] for model in ("ppo", "base_prompted"))
        half = 1.96 * math.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / numbers["prompts"])
        return ours - theirs, ours - theirs - half, ours - theirs + half
    return value


def _gold_drop(numbers: Numbers) -> Interval:
    """The fall of the gold score from its peak, in the run almost without a KL penalty."""
    run = numbers["free_run"]
    turn = find_peak([row["kl"] for row in run], [row["gold"] for row in run], "rl")
    return turn.drop, turn.drop - 1.96 * turn.drop_stderr, turn.drop + 1.96 * turn.drop_stderr


def _proxy_rises(numbers: Numbers) -> bool:
    """Whether the reward-model score at the end is above its value at the gold score's peak."""
    run = numbers["free_run"]
    gold = [row["gold"] for row in run]
    smoothed = [sum(gold[start:start + 5]) / 5 for start in range(len(gold) - 4)]
    peak = smoothed.index(max(smoothed)) + 2
    return sum(row["rm_score"] for row in run[-5:]) / 5 > run[peak]["rm_score"]


CLAIMS = (
    Claim("A small aligned model is preferred to a larger unaligned one", "1.3B PPO-ptx over 175B GPT-3",
          "win rate of PPO at a quarter of the parameters against the prompted base at full size",
          _win("small_ppo", "base_prompted"), lambda low, high: low > 0.5, "low end above 0.5"),
    Claim("PPO is preferred to SFT, SFT to the prompted base", "PPO 71 ± 4 % over the prompted base",
          "win rate of PPO against the prompted base; PPO must also beat SFT, and SFT the prompted base",
          _win("ppo", "base_prompted"), lambda low, high: low > 0.5, "all three low ends above 0.5",
          lambda numbers: _win("ppo", "sft")(numbers)[1] > 0.5 and _win("sft", "base_prompted")(numbers)[1] > 0.5),
    Claim("The reward model generalises to labelers it was not trained on", "72.4 % → 69.6 %: 2.8 points",
          "accuracy on training labelers minus accuracy on held-out ones", _generalises,
          lambda low, high: high < 0.06, "high end below 6 points"),
    Claim("PPO has an alignment tax", "SQuADv2 −17.8, DROP −7.5, HellaSwag −3.2, translation −13.4",
          "mean tax of PPO over the tasks of data/tax, as a share of a perfect score; here nearly all of it comes "
          "from SFT (the table below has both)", _tax("ppo"),
          lambda low, high: low > 0, "low end above 0"),
    Claim("PPO-ptx removes most of the tax", "most of it; HellaSwag even gains", "tax of PPO-ptx / tax of PPO",
          _share_of_tax("ppo_ptx"), lambda low, high: high < 0.5, "high end below one half"),
    Claim("A higher β does not remove it", "not even β = 2.0, a hundred times the default",
          "tax of PPO with a fixed tenfold β / tax of PPO; PPO cannot recover what SFT has lost",
          _share_of_tax("ppo_high_beta"), lambda low, high: low > 0.5, "low end above one half"),
    Claim("Truthfulness and harmlessness improve over the base", "TruthfulQA twice as often; toxic a quarter less",
          "share of fully truthful responses, PPO minus prompted base; the harmless share must rise too",
          _share_gain("truthful"), lambda low, high: low > 0, "both low ends above 0",
          lambda numbers: _share_gain("harmless")(numbers)[1] > 0),
    Claim("Under strong optimisation the proxy rises while the gold score falls", "a peak, then decline, in √KL",
          "fall of the gold score from its peak in a run almost without a KL penalty; the proxy must still rise",
          _gold_drop, lambda low, high: low > 0, "low end above 0, proxy above its value at the peak", _proxy_rises),
)


def judge_claims(seeds: Sequence[Numbers]) -> list[dict[str, Any]]:
    """One record per claim: claim, paper, measured, bar, ours, low, high, seeds, holds."""
    records = []
    for claim in CLAIMS:
        values = [claim.value(numbers) for numbers in seeds]
        low, high = min(value[1] for value in values), max(value[2] for value in values)
        records.append({"claim": claim.text, "paper": claim.paper, "measured": claim.measured, "bar": claim.bar,
                        "ours": sum(value[0] for value in values) / len(values), "low": low, "high": high,
                        "seeds": [value[0] for value in values],
                        "holds": claim.holds(low, high) and all(claim.also(numbers) for numbers in seeds)})
    return records


def write_claims(claims: Sequence[Mapping[str, Any]], seeds: Mapping[int, Numbers], profile: str, root: Path) -> None:
    """Writes metrics/claims.json and docs/claims.md."""
    write_json(root / "metrics" / "claims.json", list(claims))
    write_atomic(root / "docs" / "claims.md", page(claims, seeds, profile).encode())


def page(claims: Sequence[Mapping[str, Any]], seeds: Mapping[int, Numbers], profile: str) -> str:
    """docs/claims.md: a table of the claims, how each is measured, and the numbers of each seed."""
    held = sum(bool(claim["holds"]) for claim in claims)
    lines = ["# The paper's claims at small scale", "",
             f"Written by `make study` (profile `{profile}`, seeds {', '.join(map(str, seeds))}), together with",
             "`metrics/claims.json`. The embedded world is synthetic: it shows whether the recipe behaves as the paper",
             "says, not how people would judge. A claim holds if it holds for every seed: *low* and *high* are the",
             "lowest and highest ends of the seeds' 95 % intervals. The study's SFT mixes in no pretraining text,",
             f"because that would leave no alignment tax to study. {held} of {len(claims)} hold.", "",
             "| | claim | paper | ours | low | high | bar | holds |", "|---|---|---|---|---|---|---|---|"]
    for number, claim in enumerate(claims, start=1):
        lines.append(f"| {number} | {claim['claim']} | {claim['paper']} | {claim['ours']:.3f} | {claim['low']:.3f} | "
                     f"{claim['high']:.3f} | {claim['bar']} | {'yes' if claim['holds'] else '**no**'} |")
    lines += ["", "How each claim is measured:", ""]
    for number, claim in enumerate(claims, start=1):
        measured = claim["measured"]
        lines.append(f"{number}. {measured[0].upper()}{measured[1:]}.")
    lines += ["", "## Numbers of each seed", "", "| | " + " | ".join(f"seed {number}" for number in seeds) + " |",
              "|---|" + "---|" * len(seeds)]
    for title, value in ROWS:
        lines.append(f"| {title} | " + " | ".join(value(numbers) for numbers in seeds.values()) + " |")
    return "\n".join(lines) + "\n"


def _shown(key: str) -> Callable[[Numbers], str]:
    def value(numbers: Numbers) -> str:
        scores = numbers["scores"]
        if key not in scores:
            return "–"  # no held-out prompt of that kind
        if f"{key}_low" not in scores:
            return f"{scores[key]:.3f}"
        return f"{scores[key]:.3f} [{scores[f'{key}_low']:.3f}, {scores[f'{key}_high']:.3f}]"
    return value


ROWS: tuple[tuple[str, Callable[[Numbers], str]], ...] = (
    ("parameters of the base, of the small base",
     lambda numbers: f"{numbers['parameters']['base']:,}, {numbers['parameters']['small_base']:,}"),
    ("gold score: prompted base", _shown("eval/gold_base_prompted")), ("SFT", _shown("eval/gold_sft")),
    ("PPO", _shown("eval/gold_ppo")), ("PPO-ptx", _shown("eval/gold_ppo_ptx")),
    ("small PPO", _shown("eval/gold_small_ppo")),
    ("win rate of PPO over SFT", _shown("eval/win_rate/ppo_vs_sft")),
    ("reward model: training labelers, held-out ones",
     lambda numbers: f"{numbers['rm']['training']:.3f}, {numbers['rm']['held_out']:.3f}"),
    ("mean tax: SFT", _shown("tax_of/sft/mean")), ("PPO", _shown("tax_of/ppo/mean")),
    ("PPO-ptx", _shown("tax_of/ppo_ptx/mean")), ("PPO at ten times β", _shown("tax_of/ppo_high_beta/mean")),
    ("truthful: prompted base", _shown("eval/truthful_base_prompted")), ("PPO", _shown("eval/truthful_ppo")),
    ("harmless: prompted base", _shown("eval/harmless_base_prompted")), ("PPO", _shown("eval/harmless_ppo")),
    ("toxic (classifier): prompted base", _shown("eval/toxic_base_prompted")), ("PPO", _shown("eval/toxic_ppo")),
    ("hallucinations in closed tasks: prompted base", _shown("eval/hallucination_base_prompted")),
    ("PPO", _shown("eval/hallucination_ppo")),
    ("KL at the gold score's peak, run almost without penalty", lambda numbers: f"{_peak(numbers):.2f} nats"),
    ("gold score of the best of n", lambda numbers: ", ".join(f"{row['gold']:.2f}" for row in numbers["best_of_n"])),
)


def _peak(numbers: Numbers) -> float:
    run = numbers["free_run"]
    return find_peak([row["kl"] for row in run], [row["gold"] for row in run], "rl").peak_kl
