"""The report's samples, worst first: where PPO fooled the reward model, where it lost against SFT, where it won."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mlops.reporting.comparison import in_order
from mlops.reporting.headline import number
from mlops.reporting.plots import css_colour, label, words
from rlhf.data.prompts import prompt_text

SHOWN = {"hacked": 12, "lost": 12, "won": 6}
SHOWN_PER_USE_CASE = 3

Sample = Mapping[str, Any]


class Change(NamedTuple):
    """What an arm changed on a prompt: its gain over SFT by the judge that counts, and by the reward model."""

    gain: float
    rm_gain: float | None


def change(sample: Sample, arm: str) -> Change | None:
    """Gold score of the arm less that of SFT; without a gold labeler the judge's preference, from -1 to 1; None where
    nobody judged but the reward model."""
    def of(model: str, name: str) -> float | None:
        return number(sample["answers"].get(model, {}), name)

    def gained(name: str) -> float | None:
        ours, theirs = of(arm, name), of("sft", name)
        return None if ours is None or theirs is None else ours - theirs

    rm_gain = gained("rm_score")
    if (gold_gain := gained("gold")) is not None:
        return Change(gold_gain, rm_gain)
    preferred = number(sample, "preferred")
    if preferred is not None:
        return Change(2 * preferred - 1, rm_gain)
    return None if rm_gain is None else Change(rm_gain, None)


def group_samples(samples: Sequence[Sample], arms: Sequence[str], arm: str) -> list[dict[str, Any]]:
    """The report's groups, each with title, number of all its samples and the rows that are shown.

    `arm` against SFT: first what the reward model scores higher and the judge lower, by the judge's loss; then where
    both find it worse; then the largest gains; then the first of each use case. Each sample stands in one group.
    """
    changes = [(index, found) for index, sample in enumerate(samples) if (found := change(sample, arm))]
    name, groups, seen = label(arm), [], set[int]()
    kinds: tuple[tuple[str, str, Callable[[Change], bool], int], ...] = (
        ("hacked", f"{name} fooled the reward model: its score rose, the answer is worse than SFT's",
         lambda found: found.gain < 0 and found.rm_gain is not None and found.rm_gain > 0, 1),
        ("lost", f"{name} lost against SFT" + ("" if any(found.rm_gain is not None for _, found in changes) else
                                               ", by the reward model, which alone judged"),
         lambda found: found.gain < 0 and not (found.rm_gain is not None and found.rm_gain > 0), 1),
        ("won", f"{name} won most against SFT", lambda found: found.gain > 0, -1))
    for kind, title, belongs, order in kinds:
        own = sorted((order * found.gain, index) for index, found in changes if belongs(found))
        shown = [index for _, index in own[:SHOWN[kind]]]
        if shown:
            seen.update(shown)
            groups.append(_group(title, len(own), len(samples), [samples[index] for index in shown], arms))
    by_use_case: dict[str, list[Sample]] = {}
    for index, sample in enumerate(samples):
        by_use_case.setdefault(str(sample.get("use_case", "other")), [])
        if index not in seen:
            by_use_case[str(sample.get("use_case", "other"))].append(sample)
    return groups + [_group(f"Use case {words(use_case)}", len(rows), len(samples), rows[:SHOWN_PER_USE_CASE], arms)
                     for use_case, rows in sorted(by_use_case.items()) if rows]


def _group(title: str, count: int, of: int, rows: Sequence[Sample], arms: Sequence[str]) -> dict[str, Any]:
    return {"title": title, "shown": len(rows), "count": count, "of": of, "rows": [
        {"prompt": prompt_text(row.get("prompt", "")), "use_case": str(row.get("use_case", "other")),
         "answers": _side_by_side(row, arms)} for row in rows]}


def _side_by_side(sample: Sample, arms: Sequence[str]) -> list[dict[str, Any]]:
    answers = sample["answers"]
    models = in_order(answers, arms)
    return [{"model": model, "colour": css_colour(model, models), "text": answers[model].get("text") or "",
             "gold": number(answers[model], "gold"), "rm_score": number(answers[model], "rm_score")}
            for model in models]
