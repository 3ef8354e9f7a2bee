"""The paper's claims, tested on the numbers of several seeds: metrics/claims.json and docs/claims.md.

A claim holds if its bar is met twice: by the 95 % interval of the mean over the seeds (Student's t: so it holds for
further seeds), and by each seed's own 95 % interval (over its prompts and items). `ours` is the mean; `low` and `high`
are the ends over the seeds; `lowest` and `highest` those of the seeds' own intervals. Claims and figures are from
Ouyang et al. 2022; the last claim is from Gao et al. 2022.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t

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


def _own_tax(model: str) -> Callable[[Numbers], Interval]:
    """What PPO costs, with what SFT has cost before it left out: SFT's mean score minus the model's, paired by item."""
    return lambda numbers: _estimate(numbers, f"tax_between/sft/{model}/mean")


def _above_half(model: str) -> Callable[[Numbers], Interval]:
    """A model's own tax minus half of PPO's; the interval adds both errors, as if they were opposed."""
    def value(numbers: Numbers) -> Interval:
        mean, low, high = _own_tax(model)(numbers)
        reference, reference_low, reference_high = _own_tax("ppo")(numbers)
        return mean - reference / 2, low - reference_high / 2, high - reference_low / 2
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
          "mean tax of PPO's own over the tasks of data/tax: SFT's score minus PPO's, as a share of a perfect score",
          _own_tax("ppo"), lambda low, high: low > 0, "low end above 0"),
    Claim("PPO-ptx removes most of the tax", "most of it; HellaSwag even gains",
          "own tax of PPO-ptx (SFT's score minus its) minus half of PPO's own tax; below 0: more than half is gone",
          _above_half("ppo_ptx"), lambda low, high: high < 0, "high end below 0"),
    Claim("A higher β does not remove it", "not even β = 2.0, a hundred times the default",
          "own tax of PPO with β fixed at ten times the first one minus half of PPO's own tax; above 0: more than half "
          "is left", _above_half("ppo_high_beta"), lambda low, high: low > 0, "low end above 0"),
    Claim("Truthfulness and harmlessness improve over the base", "TruthfulQA twice as often; toxic a quarter less",
          "share of fully truthful responses, PPO minus prompted base; the harmless share must rise too",
          _share_gain("truthful"), lambda low, high: low > 0, "both low ends above 0",
          lambda numbers: _share_gain("harmless")(numbers)[1] > 0),
    Claim("Under strong optimisation the proxy rises while the gold score falls", "a peak, then decline, in √KL",
          "fall of the gold score from its peak in a run almost without a KL penalty; the proxy must still rise",
          _gold_drop, lambda low, high: low > 0, "low end above 0, proxy above its value at the peak", _proxy_rises),
)


def judge_claims(seeds: Sequence[Numbers]) -> list[dict[str, Any]]:
    """One record per claim: claim, paper, measured, bar, ours, low, high, lowest, highest, seeds, holds. With one seed
    there is no interval over seeds: low and high are its own."""
    records = []
    for claim in CLAIMS:
        values = [claim.value(numbers) for numbers in seeds]
        lowest, highest = min(value[1] for value in values), max(value[2] for value in values)
        ours, low, high = over_seeds([value[0] for value in values])
        if len(values) == 1:
            low, high = lowest, highest
        holds = (claim.holds(low, high) and claim.holds(lowest, highest)
                 and all(claim.also(numbers) for numbers in seeds))
        records.append({"claim": claim.text, "paper": claim.paper, "measured": claim.measured, "bar": claim.bar,
                        "ours": ours, "low": low, "high": high, "lowest": lowest, "highest": highest,
                        "seeds": [value[0] for value in values], "holds": holds})
    return records


def over_seeds(values: Sequence[float]) -> Interval:
    """(mean, low, high): the mean and its 95 % interval by Student's t; of one value, the value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, mean, mean
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


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
             "says, not how people would. *Ours* is the mean with its 95 % interval over the seeds (Student's t).",
             "*Within* is from the lowest to the highest end of the seeds' own 95 % intervals. A claim holds if both",
             f"intervals meet its bar, and every seed its further conditions. {held} of {len(claims)} hold.", "",
             "| | claim | paper | ours | within | bar | holds |", "|---|---|---|---|---|---|---|"]
    for number, claim in enumerate(claims, start=1):
        lines.append(f"| {number} | {claim['claim']} | {claim['paper']} | {claim['ours']:.3f} [{claim['low']:.3f}, "
                     f"{claim['high']:.3f}] | [{claim['lowest']:.3f}, {claim['highest']:.3f}] | {claim['bar']} | "
                     f"{'yes' if claim['holds'] else '**no**'} |")
    lines += ["", *missing(claims), "How each claim is measured:", ""]
    for number, claim in enumerate(claims, start=1):
        measured = claim["measured"]
        lines.append(f"{number}. {measured[0].upper()}{measured[1:]}.")
    lines += ["", "## Numbers of each seed", "", "| | " + " | ".join(f"seed {number}" for number in seeds) + " |",
              "|---|" + "---|" * len(seeds)]
    for title, value in ROWS:
        lines.append(f"| {title} | " + " | ".join(value(numbers) for numbers in seeds.values()) + " |")
    return "\n".join(lines) + "\n"


def missing(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why claims do not hold, a line each, and an empty one after them."""
    lines = []
    for number, (claim, record) in enumerate(zip(CLAIMS, claims, strict=True), start=1):
        if record["holds"]:
            continue
        seeds = f"{len(record['seeds'])} seeds ({', '.join(f'{value:.3f}' for value in record['seeds'])})"
        if not claim.holds(record["lowest"], record["highest"]):
            why = f"the interval of at least one of the {seeds} does not meet the bar"
        elif not claim.holds(record["low"], record["high"]):
            why = (f"each of the {seeds} meets the bar by its own interval, but they differ too much for that of their "
                   "mean")
        else:
            why = f"the further condition fails in at least one of the {seeds}"
        lines.append(f"* Claim {number} does not hold: {why}.")
    return [*lines, *(["", "[notebook.md](notebook.md#the-claims-that-do-not-hold) says what is behind it.", ""]
                      if lines else [])]


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
    ("win rate over SFT: PPO", _shown("eval/win_rate/ppo_vs_sft")),
    ("PPO-ptx", _shown("eval/win_rate/ppo_ptx_vs_sft")),
    ("reward model: training labelers, held-out ones",
     lambda numbers: f"{numbers['rm']['training']:.3f}, {numbers['rm']['held_out']:.3f}"),
    ("mean tax, from the base: SFT", _shown("tax_of/sft/mean")), ("PPO", _shown("tax_of/ppo/mean")),
    ("PPO-ptx", _shown("tax_of/ppo_ptx/mean")), ("PPO at ten times β", _shown("tax_of/ppo_high_beta/mean")),
    ("own tax, from SFT: PPO", _shown("tax_between/sft/ppo/mean")),
    ("PPO-ptx", _shown("tax_between/sft/ppo_ptx/mean")),
    ("PPO at ten times β", _shown("tax_between/sft/ppo_high_beta/mean")),
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
