"""What rankings say of the labelers who made them: agreement with the others, and ranks that follow the order of
presentation. Statistics for the data checks and for batches of labels.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

Z = 1.959963984540054  # two-sided 95 %
MIN_PAIRS, MIN_ROWS = 20, 20
MIN_GAP = 0.1  # share of pairs by which an outlier's agreement is below the others'
LEANING, APART = 0.6, 0.4  # mean order correlation of a labeler, and its distance from the others'
NOBODY = ("unknown", "consensus")  # ids that stand for no labeler

Comparison = tuple[str, str, Sequence[str], Sequence[int]]  # labeler, prompt, completions as presented, ranks


@dataclass
class Count:
    """Agreeing pairs among those on which both labelers have a preference."""

    agreed: int = 0
    pairs: int = 0

    @property
    def share(self) -> float:
        return self.agreed / self.pairs if self.pairs else math.nan

    def add(self, other: "Count") -> None:
        self.agreed += other.agreed
        self.pairs += other.pairs

    def clearly_below(self, other: "Count") -> bool:
        """Whether both have pairs and this one's 95 % interval lies below the other's."""
        return bool(self.pairs and other.pairs) and self.interval()[1] < other.interval()[0]

    def interval(self, z: float = Z) -> tuple[float, float]:
        """Wilson's interval of the share, by default at 95 %."""
        return wilson(self.share, self.pairs, z) if self.pairs else (0.0, 1.0)


def wilson(share: float, trials: int, z: float) -> tuple[float, float]:
    """Wilson's interval of a share of `trials`, `z` standard deviations to both sides."""
    weight = z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return middle - half, middle + half


@dataclass(frozen=True)
class Outlier:
    """A labeler whose agreement with the others is clearly below theirs among themselves."""

    name: str
    own: Count
    others: Count


def outliers_of(agreed: Mapping[tuple[str, str], Count], z: float = Z, judged: Mapping[str, int] | None = None,
                least: int = 1) -> list[Outlier]:
    """Labelers who agree with the others less than these among themselves, by MIN_GAP at least, and the two intervals
    do not overlap.

    `agreed`: by pair of labelers, (name, name) in alphabetical order. The farthest is taken out first, and the others
    are judged without it: agreement with someone who guesses says nothing of a labeler. `judged`: the number of
    different pairs of completions that a labeler judged, which are its independent trials where many labelers judge the
    same ones; None: all comparisons count. `least`: trials that it takes.
    """
    found: list[Outlier] = []
    left = dict(agreed)
    while True:
        total = Count()
        by_name: dict[str, Count] = defaultdict(Count)
        for names, count in sorted(left.items()):
            total.add(count)
            for name in names:
                by_name[name].add(count)
        candidates = []
        for name, own in by_name.items():
            others = Count(total.agreed - own.agreed, total.pairs - own.pairs)
            trials = min(own.pairs, judged[name]) if judged else own.pairs
            if min(trials, others.pairs) >= max(1, least) and others.share - own.share >= MIN_GAP \
                    and wilson(own.share, trials, z)[1] < others.interval(z)[0]:
                candidates.append(Outlier(name, own, others))
        if not candidates:
            return sorted(found, key=lambda item: item.name)
        found.append(min(candidates, key=lambda item: (item.own.share, item.name)))
        left = {names: count for names, count in left.items() if found[-1].name not in names}


def strict_z(count: int) -> float:
    """The two-sided 95 % quantile for `count` tests at once (Bonferroni), at least 2.5."""
    return max(2.5, NormalDist().inv_cdf(1 - 0.025 / max(1, count)))


def agreement_by_pair(rows: Sequence[Comparison]) -> tuple[dict[tuple[str, str], Count], dict[str, int]]:
    """How often each two labelers agree on a pair of completions of one prompt on which both have a preference, and by
    labeler on how many different pairs."""
    several = {prompt for prompt, count in Counter(prompt for _, prompt, _, _ in rows).items() if count > 1}
    votes: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)
    for labeler, prompt, completions, ranks in rows:
        if prompt in several and labeler not in NOBODY:
            for (one, rank), (other, other_rank) in combinations(sorted(zip(completions, ranks, strict=True)), 2):
                if rank != other_rank and one != other:
                    votes[prompt, one, other][labeler] = 1 if rank < other_rank else -1
    counts: dict[tuple[str, str], Count] = defaultdict(Count)
    judged: Counter[str] = Counter()
    for signs in votes.values():
        judged.update(list(signs) if len(signs) > 1 else ())
        for (one, sign), (other, other_sign) in combinations(sorted(signs.items()), 2):
            counts[one, other].add(Count(int(sign == other_sign), 1))
    return dict(counts), dict(judged)


def order_correlation(ranks: Sequence[int]) -> float:
    """Kendall's tau-a of ranks with their order: 1 where the first is best and so on, -1 where the last is."""
    signs = [(other > one) - (other < one) for one, other in combinations(ranks, 2)]
    return sum(signs) / len(signs)


@dataclass(frozen=True)
class Leaning:
    """Mean order correlation of a labeler's rankings and of the others'; `z` of their difference."""

    rows: int
    mean: float
    others: float
    z: float

    @property
    def follows_order(self) -> bool:
        """Whether the labeler ranks by position, and the others do not: where all do, the data is written that way."""
        return abs(self.mean) >= LEANING and abs(self.mean - self.others) >= APART


def leanings(rankings: Iterable[tuple[str, Sequence[int]]]) -> dict[str, Leaning]:
    """By labeler, from (labeler, ranks in the order of presentation); two-sample z with the pooled variance."""
    values: dict[str, list[float]] = defaultdict(list)
    for name, ranks in rankings:
        if name not in NOBODY and len(set(ranks)) > 1:
            values[name].append(order_correlation(ranks))
    count, total = sum(map(len, values.values())), sum(map(sum, values.values()))
    squares = sum(value * value for own in values.values() for value in own)
    found = {}
    for name, own in sorted(values.items()):
        rest = count - len(own)
        if not rest:
            continue
        variance = squares / count - (total / count) ** 2
        mean, others = sum(own) / len(own), (total - sum(own)) / rest
        deviation = math.sqrt(max(variance, 1e-12) * (1 / len(own) + 1 / rest))
        found[name] = Leaning(len(own), mean, others, (mean - others) / deviation)
    return found


def by_position(rankings: Iterable[tuple[str, Sequence[int]]], as_shown: bool = False) -> dict[str, Leaning]:
    """The labelers whose ranks follow the order of presentation.

    Two labelers and more without a single exception are left out unless the order is known to be the one `as_shown`:
    their rows come from a source that writes the better completion first.
    """
    found = leanings(rankings)
    z = strict_z(len(found))
    without_exception = [name for name, item in found.items() if abs(item.mean) == 1]
    written = without_exception if len(without_exception) > 1 and not as_shown else []
    return {name: item for name, item in found.items() if name not in written
            and item.rows >= MIN_ROWS and item.follows_order and abs(item.z) >= z}


def doubtful_labelers(rows: Sequence[Comparison]) -> list[str]:
    """A sentence for each labeler whose ranks follow the order of presentation, or who agrees with the others on the
    same completions so much less than they with each other that the ranks may be chance."""
    sentences = [
        f"labeler {name} ranks by position: mean order correlation {item.mean:+.2f} in {item.rows:,} rankings, "
        f"{item.others:+.2f} by the others (z = {item.z:.1f})"
        for name, item in by_position((labeler, ranks) for labeler, _, _, ranks in rows).items()]
    agreed, judged = agreement_by_pair(rows)
    # Two intervals of z / sqrt(2) that do not overlap: where both are as wide, their shares are z apart.
    z = strict_z(len(judged)) / math.sqrt(2)
    sentences += [
        f"labeler {item.name} agrees with the others on {100 * item.own.share:.0f} % of {item.own.pairs:,} pairs, they "
        f"with each other on {100 * item.others.share:.0f} %; 50 % is chance"
        for item in outliers_of(agreed, z, judged, MIN_PAIRS)]
    return sentences
