"""Merges rankings of one prompt by one labeler into one ranking, where their orders agree."""

from collections.abc import Sequence

from rlhf.curation.sources.records import dense_ranks
from rlhf.data.schema import MAX_K

Ranking = tuple[Sequence[str], Sequence[int]]  # completions, their ranks; 1 is best


def merged_ranking(rankings: Sequence[Ranking]) -> tuple[list[str], list[int]] | None:
    """One ranking that says what all `rankings` say and nothing else; None if there is none.

    There is none where two of them contradict each other, where two completions are neither compared nor ordered
    through others, and where more than MAX_K completions would be ranked. Completions are sorted by rank, then text.
    """
    texts = sorted({text for completions, _ in rankings for text in completions})
    if len(texts) > MAX_K:
        return None
    number = {text: place for place, text in enumerate(texts)}
    count = len(texts)
    # At least as good as: the reflexive and transitive closure of all that the rankings say.
    as_good = [[one == other for other in range(count)] for one in range(count)]
    better = set()
    for completions, ranks in rankings:
        ranked = [(number[text], rank) for text, rank in zip(completions, ranks, strict=True)]
        for one, rank in ranked:
            for other, other_rank in ranked:
                as_good[one][other] |= rank <= other_rank
                if rank < other_rank:
                    better.add((one, other))
    for middle in range(count):
        for one in range(count):
            if as_good[one][middle]:
                for other in range(count):
                    as_good[one][other] |= as_good[middle][other]
    if any(as_good[other][one] for one, other in better):
        return None
    if not all(as_good[one][other] or as_good[other][one] for one in range(count) for other in range(one)):
        return None
    beaten = [sum(as_good[other][one] for other in range(count)) for one in range(count)]
    order = sorted(range(count), key=lambda one: (beaten[one], texts[one]))
    return [texts[one] for one in order], list(dense_ranks([beaten[one] for one in order]))
