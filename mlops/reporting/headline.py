"""The top of the report: formatted numbers, the verdict, the four cards."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mlops.reporting.journals import KlRule
from mlops.reporting.plots import Estimate, label

MINUS, DASH, NBSP = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NO-BREAK SPACE}"
FEW_PROMPTS = 200  # intervals of win rates are wider than 14 points
Form = Callable[[float | None], str]


def arms_of(evaluation: Mapping[str, Any]) -> list[str]:
    """The policies that PPO trained, in the profile's order."""
    return [str(arm) for arm in evaluation.get("eval/arms", ["ppo"])]


def promoted_of(evaluation: Mapping[str, Any]) -> str:
    """The arm that the gates take, of which the keys without a model's name are."""
    return str(evaluation.get("eval/arm", "ppo"))


def number(values: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`, else None."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def percent(value: float | None) -> str:
    """A share as percent with one decimal."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{100 * value:.1f}{NBSP}%".replace("-", MINUS)


def score(value: float | None) -> str:
    """A score with two decimals, three below 1."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.{2 if abs(value) >= 1 else 3}f}".replace("-", MINUS)


def signed(value: float | None) -> str:
    """A score with its sign."""
    return score(value) if value is None or value <= 0 else "+" + score(value)


def length(value: float | None) -> str:
    """A mean length with one decimal."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.1f}"


def figure(value: Any) -> str:
    """Any metric: whole numbers with separators, others to four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace("-", MINUS)
    return f"{value:.4g}".replace("-", MINUS)


def estimate(values: Mapping[str, Any], key: str, name: str = "") -> Estimate | None:
    """`key` with its `_low`, `_high` and `_n`; with a count but no interval, the Wilson interval of a share."""
    value = number(values, key)
    if value is None:
        return None
    low, high, n = number(values, key + "_low"), number(values, key + "_high"), number(values, key + "_n")
    if (low is None or high is None) and n and 0 <= value <= 1:
        middle, spread = (value + 1.92 / n) / (1 + 3.84 / n), math.sqrt(value * (1 - value) / n + 0.96 / n**2)
        low, high = middle - 1.96 * spread / (1 + 3.84 / n), middle + 1.96 * spread / (1 + 3.84 / n)
    return Estimate(name or key, value, low, high, None if n is None else int(n))


def verdict(evaluation: Mapping[str, Any], rule: KlRule) -> dict[str, str]:
    """{"tone": good, bad or open, "headline", "text"}: is the promoted arm better than SFT, and at what price?

    `rule`: what the arm's β followed.
    """
    arm = promoted_of(evaluation)
    win, gain = estimate(evaluation, "eval/win_rate_vs_sft"), estimate(evaluation, "eval/gold_gain_vs_sft")
    tone, headline = _answer(win, gain, label(arm), str(evaluation.get("eval/judge", "gold")) == "gold")
    sentences = []
    if win:
        n = number(evaluation, "eval/prompts")
        few = ", which are few" if n and n < FEW_PROMPTS else ""
        where = f" on {int(n):,} held-out prompts{few}" if n else ""
        sentences.append(f"{judge_words(evaluation)} gives {label(arm)} a win rate of {percent(win.value)}"
                         f"{_interval(win, percent)} against SFT{where}.")
    if gain:
        sentences.append(f"The mean gold score changes by {signed(gain.value)}{_interval(gain, signed)}.")
    sentences.append(_price(evaluation, rule))
    rm_sft, rm_ppo = (number(evaluation, f"eval/rm_score_{name}") for name in ("sft", arm))
    fell = gain is not None and gain.high is not None and gain.high < 0
    if fell and rm_sft is not None and rm_ppo is not None and rm_ppo > rm_sft:
        sentences.append("The reward-model score rose while the gold score fell: the policy over-optimised it.")
    return {"tone": tone, "headline": headline, "text": " ".join(sentences)}


def judge_words(evaluation: Mapping[str, Any]) -> str:
    """Who judged, as the subject of a sentence."""
    kind, right = str(evaluation.get("eval/judge", "gold")), number(evaluation, "eval/judge_accuracy")
    accuracy = f", right on {percent(right)} of the held-out comparisons," if right is not None else ""
    return {"gold": "The gold labeler", "model": "The judge model", "reward_model": "The judging reward model",
            "held_out": f"A reward model trained on other comparisons{accuracy}"}.get(kind, "The reward model itself")


def _answer(win: Estimate | None, gain: Estimate | None, name: str, truth: bool = True) -> tuple[str, str]:
    """(tone, headline). A win rate clear of 50 % decides, unless the gold score clearly moved the other way.

    `truth`: the gold labeler judges, which knows; any other judge has a preference.
    """
    if win is None:
        return "open", "Not measured: no win rate against SFT."
    if win.low is None or win.high is None:
        return "open", "Open: the win rate has no interval."
    if win.low > 0.5:
        if gain and gain.high is not None and gain.high < 0:
            return "open", f"Mixed: {name} wins more often than SFT, but its mean gold score is lower."
        return "good", f"Yes: {name} is better than SFT." if truth else f"The judge prefers {name} to SFT."
    if win.high < 0.5:
        if gain and gain.low is not None and gain.low > 0:
            return "open", f"Mixed: {name} wins less often than SFT, but its mean gold score is higher."
        return "bad", f"No: {name} is worse than SFT." if truth else f"The judge prefers SFT to {name}."
    return "open", f"Not shown: the difference between {name} and SFT is not significant."


def _interval(value: Estimate, form: Form) -> str:
    if value.low is None or value.high is None:
        return ""
    return f" (95{NBSP}% interval {form(value.low)} to {form(value.high)})"


def _price(evaluation: Mapping[str, Any], rule: KlRule) -> str:
    """The price in words: KL relative to its goal band, and the mean alignment tax."""
    parts = []
    kl, mean = number(evaluation, f"eval/kl_{promoted_of(evaluation)}"), tax_mean(evaluation)
    if kl is not None:
        where = f", {_band_text(kl, rule.limits)}" if rule.limits else ""
        parts.append(f"{score(kl)}{NBSP}nats of KL from the SFT policy{where}")
    if mean:
        interval = _interval(mean, points) + _tax_words(mean)
        parts.append(f"a mean alignment tax of {points(mean.value)}{NBSP}points{interval}")
    return "The price: " + "; and ".join(parts) + "." if parts else "The price was not measured."


def _band_text(kl: float, limits: tuple[float, float]) -> str:
    low, high = limits
    where = "below" if kl < low else "above" if kl > high else "inside"
    return f"{where} the goal band of {score(low)} to {score(high)}"


def points(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f}".replace("-0.0", "0.0").replace("-", MINUS)


def _tax_words(mean: Estimate) -> str:
    if mean.low is None or mean.high is None:
        return ""
    return ", a loss" if mean.low > 0 else ", a gain" if mean.high < 0 else ", not distinguishable from zero"


def headline_cards(evaluation: Mapping[str, Any], rule: KlRule) -> list[dict[str, Any]]:
    """The four cards: title, value, range, note, tone, and the strip that draws the interval."""
    win, gain = estimate(evaluation, "eval/win_rate_vs_sft"), estimate(evaluation, "eval/gold_gain_vs_sft")
    base, mean = estimate(evaluation, "eval/win_rate_vs_base"), tax_mean(evaluation)
    arm = promoted_of(evaluation)
    kl = number(evaluation, f"eval/kl_{arm}")
    cards: list[dict[str, Any]] = []
    if win:
        note = f"against base {percent(base.value)}" if base else ""
        cards.append({"title": "Win rate against SFT", "value": percent(win.value), "range": _range(win, percent),
                      "note": note, **_strip(win, 0.5, "50 %", up=True, ends=(0.0, 1.0))})
    if gain:
        before, after = (score(number(evaluation, f"eval/gold_{name}")) for name in ("sft", arm))
        note = f"SFT {before} → {label(arm)} {after}"
        cards.append({"title": "Gold score gain", "value": signed(gain.value), "range": _range(gain, signed),
                      "note": note, **_strip(gain, 0, "0", up=True)})
    if kl is not None:
        limits = rule.limits
        inside = limits is not None and limits[0] <= kl <= limits[1]
        cards.append({"title": "KL to the SFT policy", "value": f"{score(kl)}{NBSP}nats",
                      "note": f"{_band_text(kl, limits).split(' the ')[0]} its goal band" if limits else
                              "beta is fixed, no goal" if rule.name == "fixed" else "",
                      "range": f"goal {score(rule.goal)}, band {score(limits[0])} to {score(limits[1])}" if limits
                               else "",
                      **_strip(Estimate("kl", kl, *(limits or (None, None))), rule.goal or 0, "goal", band=True),
                      "tone": "good" if inside else "open"})
    if mean:
        cards.append({"title": "Mean alignment tax", "value": f"{points(mean.value)}{NBSP}points",
                      "range": _range(mean, points), "note": f"base {MINUS} {label(arm)}, lower is better",
                      **_strip(mean, 0, "0", up=False)})
    return cards


def _range(value: Estimate, form: Form) -> str:
    return "no interval" if value.low is None else f"{form(value.low)} to {form(value.high)}"


def _strip(value: Estimate, mark: float, label: str, up: bool = True, ends: tuple[float, float] | None = None,
           band: bool = False) -> dict[str, Any]:
    """Positions of interval, dot and mark in percent of the strip's width, and the tone."""
    low = value.value if value.low is None else value.low
    high = value.value if value.high is None else value.high
    reach = 1.25 * max(abs(low - mark), abs(high - mark), abs(value.value - mark), 1e-9)
    left, right = ends or ((0.0, max(2 * mark, 1.1 * value.value, 1e-9)) if band else (mark - reach, mark + reach))
    places = {name: round(100 * min(1.0, max(0.0, (x - left) / (right - left))), 2)
              for name, x in (("low", low), ("dot", value.value), ("high", high), ("mark", mark))}
    sign = 0 if low <= mark <= high else 1 if low > mark else -1
    tone = "open" if sign == 0 or value.low is None else "good" if (sign > 0) == up else "bad"
    return {"strip": places, "label": label, "band": band, "tone": tone}


def tax_mean(evaluation: Mapping[str, Any]) -> Estimate | None:
    """The mean alignment tax with its interval: measured, or from the scores' standard errors.

    The errors are added as for independent models. Base and PPO answer the same items, so the interval is too wide.
    """
    mean = estimate(evaluation, "tax/mean")
    if mean is None or mean.low is not None:
        return mean
    tasks = tax_tasks(evaluation)
    errors = [number(evaluation, f"tax_se/{model}/{task}") for task in tasks
              for model in ("base", promoted_of(evaluation))]
    known = [error for error in errors if error is not None]
    if not tasks or len(known) < len(errors):
        return mean
    half = 1.96 * math.sqrt(sum(error * error for error in known)) / len(tasks)
    return Estimate("tax/mean", mean.value, mean.value - half, mean.value + half)


def tax_tasks(evaluation: Mapping[str, Any]) -> list[str]:
    """The names of the tasks that have scores, sorted."""
    return sorted({key.split("/", 2)[2] for key in evaluation if key.startswith("tax_score/") and key.count("/") > 1})
