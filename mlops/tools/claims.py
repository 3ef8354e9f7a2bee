"""The paper's claims, judged on the numbers of several seeds: metrics/claims.json and docs/claims.md.

A claim holds where it holds in every seed: `low` and `high` are the lowest and the highest end of the seeds' 95 %
intervals, `ours` is the mean. The claims and the paper's figures are those of Ouyang et al. 2022 and, for the last,
Gao et al. 2022.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.evaluation.overoptimisation import find_turn
from rlhf.files import write_atomic, write_json

Numbers = Mapping[str, Any]
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Claim:
    """What the paper found, how it is measured here, and when it holds."""

    text: str
    paper: str
    measured: str
    value: Callable[[Numbers], Interval]
    holds: Callable[[float, float], bool]
    bar: str
    also: Callable[[Numbers], bool] = lambda numbers: True  # what must hold besides, in every seed


def _estimate(numbers: Numbers, key: str) -> Interval:
    scores = numbers["scores"]
    return scores[key], scores[f"{key}_low"], scores[f"{key}_high"]


def _win(one: str, other: str) -> Callable[[Numbers], Interval]:
    """Win rate of `one` against `other`, whichever way round it was judged."""
    def value(numbers: Numbers) -> Interval:
        key = f"eval/win_rate/{one}_vs_{other}"
        if key in numbers["scores"]:
            return _estimate(numbers, key)
        middle, low, high = _estimate(numbers, f"eval/win_rate/{other}_vs_{one}")
        return 1 - middle, 1 - high, 1 - low
    return value


def _generalises(numbers: Numbers) -> Interval:
    """Accuracy on training labelers less that on held-out ones."""
    rm = numbers["rm"]
    difference = rm["training"] - rm["held_out"]
    half = 1.96 * math.hypot(rm["training_stderr"], rm["held_out_stderr"])
    return difference, difference - half, difference + half


def _tax(model: str) -> Callable[[Numbers], Interval]:
    return lambda numbers: _estimate(numbers, f"tax_of/{model}/mean")


def _share_of_tax(model: str) -> Callable[[Numbers], Interval]:
    """A model's mean tax as a share of PPO's; the interval takes PPO's as measured."""
    def value(numbers: Numbers) -> Interval:
        middle, low, high = _tax(model)(numbers)
        whole = max(_tax("ppo")(numbers)[0], 1e-9)
        return middle / whole, low / whole, high / whole
    return value


def _share_gain(quality: str) -> Callable[[Numbers], Interval]:
    """PPO's share of fully truthful (or harmless) responses less the prompted base's; normal interval of two shares."""
    def value(numbers: Numbers) -> Interval:
        ours, theirs = (numbers["scores"][f"eval/{quality}_{model}"] for model in ("ppo", "base_prompted"))
        half = 1.96 * math.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / numbers["prompts"])
        return ours - theirs, ours - theirs - half, ours - theirs + half
    return value


def _apply_rope(numbers: Numbers) -> Interval:
    """How far the gold score falls from its peak in the run without a KL penalty."""
    run = numbers["free_run"]
    turn = find_turn([row["kl"] for row in run], [row["gold"] for row in run], "rl")
    return turn.drop, turn.drop - 1.96 * turn.drop_stderr, turn.drop + 1.96 * turn.drop_stderr


def _proxy_rises(numbers: Numbers) -> bool:
    """The reward model's score ends above where it was when the gold score peaked."""
    run = numbers["free_run"]
    gold = [row["gold"] for row in run]
    smoothed = [sum(gold[place:place + 5]) / 5 for place in range(len(gold) - 4)]
    peak = smoothed.index(max(smoothed)) + 2
    return sum(row["rm_score"] for row in run[-5:]) / 5 > run[peak]["rm_score"]


CLAIMS = (
    Claim("A small aligned model is preferred to a larger unaligned one", "1.3B PPO-ptx over 175B GPT-3",
          "win rate of PPO at a quarter of the parameters against the prompted base at full size",
          _win("small_ppo", "base_prompted"), lambda low, high: low > 0.5, "low end above 0.5"),
    Claim("PPO is preferred to SFT, SFT to the prompted base", "PPO 71 ± 4 % over the prompted base",
          "win rate of PPO against the prompted base; PPO over SFT and SFT over the prompted base are needed too",
          _win("ppo", "base_prompted"), lambda low, high: low > 0.5, "all three low ends above 0.5",
          lambda numbers: _win("ppo", "sft")(numbers)[1] > 0.5 and _win("sft", "base_prompted")(numbers)[1] > 0.5),
    Claim("The reward model generalises to labelers it was not trained on", "72.4 % → 69.6 %: 2.8 points",
          "accuracy on training labelers less that on held-out ones", _generalises,
          lambda low, high: high < 0.06, "high end below 6 points"),
    Claim("PPO has an alignment tax", "SQuADv2 −17.8, DROP −7.5, HellaSwag −3.2, translation −13.4",
          "mean tax of PPO over the tasks of data/tax, share of a perfect score; here SFT brings it about and PPO "
          "adds next to none (the table below has both)", _tax("ppo"),
          lambda low, high: low > 0, "low end above 0"),
    Claim("PPO-ptx removes most of the tax", "most of it; HellaSwag even gains", "tax of PPO-ptx / tax of PPO",
          _share_of_tax("ppo_ptx"), lambda low, high: high < 0.5, "high end below one half"),
    Claim("A higher β does not remove it", "β up to 2.0, a hundred times the usual, never did",
          "tax of PPO at ten times β, fixed / tax of PPO; PPO cannot give back what SFT has lost",
          _share_of_tax("ppo_high_beta"), lambda low, high: low > 0.5, "low end above one half"),
    Claim("Truthfulness and harmlessness improve over the base", "TruthfulQA twice as often; toxic a quarter less",
          "share of fully truthful responses, PPO less prompted base; harmless ones must rise too",
          _share_gain("truthful"), lambda low, high: low > 0, "both low ends above 0",
          lambda numbers: _share_gain("harmless")(numbers)[1] > 0),
    Claim("Pushed far enough, the proxy rises while the gold score turns over", "a peak, then decline, in √KL",
          "fall of the gold score from its peak in a run almost without KL penalty; the proxy must still rise",
          _apply_rope, lambda low, high: low > 0, "low end above 0, proxy above its value at the peak", _proxy_rises),
)


def judge_claims(seeds: Sequence[Numbers]) -> list[dict[str, Any]]:
    """One record a claim: claim, paper, measured, bar, ours, low, high, seeds, holds."""
    found = []
    for claim in CLAIMS:
        values = [claim.value(numbers) for numbers in seeds]
        low, high = min(value[1] for value in values), max(value[2] for value in values)
        found.append({"claim": claim.text, "paper": claim.paper, "measured": claim.measured, "bar": claim.bar,
                      "ours": sum(value[0] for value in values) / len(values), "low": low, "high": high,
                      "seeds": [value[0] for value in values],
                      "holds": claim.holds(low, high) and all(claim.also(numbers) for numbers in seeds)})
    return found


def write_claims(claims: Sequence[Mapping[str, Any]], seeds: Mapping[int, Numbers], profile: str, root: Path) -> None:
    """metrics/claims.json and docs/claims.md."""
    write_json(root / "metrics" / "claims.json", list(claims))
    write_atomic(root / "docs" / "claims.md", page(claims, seeds, profile).encode())


def page(claims: Sequence[Mapping[str, Any]], seeds: Mapping[int, Numbers], profile: str) -> str:
    """The claims as a page: a table, how each was measured, and the numbers of each seed."""
    held = sum(bool(claim["holds"]) for claim in claims)
    lines = ["# The paper's claims in the small", "",
             f"Written by `make study` (profile `{profile}`, seeds {', '.join(map(str, seeds))}); the same as records",
             "in `metrics/claims.json`. The embedded world is a stand-in: it shows whether the recipe behaves as the",
             "paper says, not how people would judge. A claim holds where it holds in every seed: *low* and *high* are",
             "the extreme ends of the seeds' 95 % intervals. The study's SFT model has no pretraining text mixed in,",
             f"since with it there is no tax left to study. {held} of {len(claims)} hold.", "",
             "| | claim | paper | ours | low | high | bar | holds |", "|---|---|---|---|---|---|---|---|"]
    for number, claim in enumerate(claims, start=1):
        lines.append(f"| {number} | {claim['claim']} | {claim['paper']} | {claim['ours']:.3f} | {claim['low']:.3f} | "
                     f"{claim['high']:.3f} | {claim['bar']} | {'yes' if claim['holds'] else '**no**'} |")
    lines += ["", "How each is measured:", ""]
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
            return "–"  # no prompt of that kind among the held-out ones
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
    ("KL at the gold score's peak, run without penalty", lambda numbers: f"{_peak(numbers):.2f} nats"),
    ("gold score of the best of n", lambda numbers: ", ".join(f"{row['gold']:.2f}" for row in numbers["best_of_n"])),
)


def _peak(numbers: Numbers) -> float:
    run = numbers["free_run"]
    return find_turn([row["kl"] for row in run], [row["gold"] for row in run], "rl").peak_kl
