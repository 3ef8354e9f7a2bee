"""InstructGPT's data rules over whole datasets: near duplicates, users, splits, shares [§3.2, App. A, C].

The result depends on the contents of the rows and on the seed, not on their order: if a rule drops some of many rows,
it drops those with the greatest seeded hash of their content.
"""

from array import array
from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from rlhf.curation.near_duplicates import PrefixIndex
from rlhf.curation.screen import UNDECIDED, Screened, hashed
from rlhf.curation.sources.spec import RulesParams
from rlhf.data.schema import PAPER_ROWS, SPLITS

TRAIN, VALID = SPLITS.index("train"), SPLITS.index("valid")
# In the order in which they are applied; a row counts for the first rule that drops it.
RULES = {
    "long_prompt": "prompt longer than max_prompt_tokens or max_prompt_chars",
    "long_completion": "a completion longer than max_completion_tokens or max_completion_chars",
    "repeated_id": "prompt_id that another row has",
    "repeated_comparison": "the same prompt, completions, ranks and labeler as another row",
    "other_language": "wholly in another language, beyond the share allowed",
    "user_in_both_splits": "the source puts the user (without users: the prompt) on the other side elsewhere",
    "personal_data": "personal data or a secret in a train row",
    "near_duplicate": "near duplicate of another prompt of the dataset",
    "user_cap": "beyond max_prompts_per_user",
    "leak_into_ppo": "PPO train prompt that is nearly a valid one of SFT or RM",
    "leak": "nearly a prompt on the other side of the split",
    "subsample": "beyond the paper's number of rows",
    "merged": "in another ranking of its prompt now",
}
NO_LOSS = ("subsample", "merged")  # rules that take nothing which the source's owner did not ask for
STAYS = -1
PROMPT_RULES = ("sft", "ppo")  # near duplicates are dropped of these; a comparison is a label, whatever its prompt
MAX_BRANCHES = 4  # conversations without a user that open alike and go on in more ways are not one user's
MAX_LINKED_USERS = 20  # a prompt that more users ask does not tie them to one side of the split


def _hashes() -> "array[int]":
    return array("Q")


@dataclass
class Rows:
    """The columns of one dataset that the rules use; `fates`: STAYS or the index of the rule that dropped the row.

    The others are those of `Screened`.
    """

    keys: list[str] = field(default_factory=list)
    users: MutableSequence[int] = field(default_factory=_hashes)
    orders: MutableSequence[int] = field(default_factory=_hashes)
    own_ids: MutableSequence[int] = field(default_factory=_hashes)
    openings: MutableSequence[int] = field(default_factory=_hashes)
    branches: MutableSequence[int] = field(default_factory=_hashes)
    comparisons: MutableSequence[int] = field(default_factory=_hashes)
    rankers: MutableSequence[int] = field(default_factory=_hashes)
    splits: list[int] = field(default_factory=list)
    foreign: list[bool] = field(default_factory=list)
    personal: list[bool] = field(default_factory=list)
    fates: list[int] = field(default_factory=list)

    def add(self, row: Screened) -> None:
        self.keys.append(row.key)
        self.users.append(row.user)
        self.orders.append(row.order)
        self.own_ids.append(row.own_id)
        self.openings.append(row.opening)
        self.branches.append(row.branch)
        self.comparisons.append(row.comparison)
        self.rankers.append(row.ranker)
        self.splits.append(row.split)
        self.foreign.append(row.foreign)
        self.personal.append(row.personal)
        self.fates.append(list(RULES).index(row.too_long) if row.too_long else STAYS)


@dataclass
class _Table:
    """All datasets concatenated, as arrays."""

    dataset: NDArray[np.int8]
    users: NDArray[np.uint64]
    orders: NDArray[np.uint64]
    splits: NDArray[np.int8]
    fates: NDArray[np.int8]

    def staying(self, *conditions: NDArray[np.bool_]) -> NDArray[np.int64]:
        mask = self.fates == STAYS
        for condition in conditions:
            mask &= condition
        return np.flatnonzero(mask)

    def drop(self, rule: str, rows: "NDArray[np.int64] | list[int]") -> None:
        self.fates[rows] = list(RULES).index(rule)


def apply_rules(datasets: Mapping[str, Rows], rules: RulesParams, seed: int
                ) -> dict[str, tuple[NDArray[np.int8], NDArray[np.int8]]]:
    """(split, fate) of every row, by dataset: split 0 train, 1 valid; fate STAYS or an index into RULES."""
    names = list(datasets)
    sizes = [len(rows.keys) for rows in datasets.values()]

    def joined(column: str, kind: type) -> NDArray:
        return np.concatenate([np.array(getattr(rows, column), kind) for rows in datasets.values()]) if names else \
            np.zeros(0, kind)

    table = _Table(np.repeat(np.arange(len(names), dtype=np.int8), sizes), joined("users", np.uint64),
                   joined("orders", np.uint64), joined("splits", np.int8), joined("fates", np.int8))
    prompts = np.isin(table.dataset, [names.index(name) for name in PROMPT_RULES if name in names])
    _repeated("repeated_id", table, joined("own_ids", np.uint64), prompts)
    _repeated("repeated_comparison", table, joined("comparisons", np.uint64), ~prompts)
    foreign = joined("foreign", np.bool_)
    for number in range(len(names)):
        _share_of_language(table, table.dataset == number, foreign, rules.min_language_share)
    index = PrefixIndex([key for rows in datasets.values() for key in rows.keys], rules.near_duplicate_chars,
                        rules.near_duplicate_share)
    groups = _groups(table, joined("openings", np.uint64), joined("branches", np.uint64))
    _split(table, groups, _linked(table, groups, index), rules.valid_share, seed)
    if rules.personal_data == "drop":
        table.drop("personal_data", table.staying(joined("personal", np.bool_), table.splits == TRAIN))
    for number, name in enumerate(names):
        mine = table.dataset == number
        if name in PROMPT_RULES and rules.near_duplicates == "drop":
            table.drop("near_duplicate", index.repeats(table.orders, table.staying(mine)))
        elif name in PROMPT_RULES:
            _repeated("near_duplicate", table, table.orders, mine)
        _cap_users(table, mine, index.group, rules.max_prompts_per_user)
    _leaks(table, index, names)
    if rules.rows == "paper":
        for number, name in enumerate(names):
            _to_paper(table, table.dataset == number, name)
    bounds = np.cumsum([0, *sizes])
    return {name: (table.splits[start:end], table.fates[start:end])
            for name, start, end in zip(names, bounds, bounds[1:], strict=False)}


def _repeated(rule: str, table: _Table, values: NDArray[np.uint64], mine: NDArray[np.bool_]) -> None:
    """Of rows of a dataset with the same value (other than 0) the one with the least hash stays."""
    rows = table.staying(values != 0, mine)
    rows = rows[np.lexsort((table.orders[rows], values[rows], table.dataset[rows]))]
    same = (values[rows][1:] == values[rows][:-1]) & (table.dataset[rows][1:] == table.dataset[rows][:-1])
    table.drop(rule, rows[1:][same])


def _share_of_language(table: _Table, mine: NDArray[np.bool_], foreign: NDArray[np.bool_], share: float) -> None:
    if share == 0:
        return
    own = len(table.staying(mine, ~foreign))
    others = table.staying(mine, foreign)
    allowed = int(own * (1 - share) / share + 1e-9)
    table.drop("other_language", others[np.argsort(table.orders[others], kind="stable")][allowed:])


def _groups(table: _Table, openings: NDArray[np.uint64], branches: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash for each row whose rows are one person's: of the user, or without one of how the conversation begins.

    That is the system turn and the human's first message, and also the second where more than MAX_BRANCHES
    conversations begin alike: "Hi" says nothing of who wrote it.
    """
    unnamed = table.users == 0
    longer = unnamed & (branches != openings)
    pairs = np.unique(np.stack([openings[longer], branches[longer]]), axis=1)
    first, count = np.unique(pairs[0], return_counts=True)
    common = np.isin(openings, first[count > MAX_BRANCHES])
    return np.where(unnamed, np.where(common, branches, openings), table.users)


def _linked(table: _Table, groups: NDArray[np.uint64], index: PrefixIndex) -> NDArray[np.int64]:
    """The number of each group's component, by np.unique(groups): groups that share prompts are on one side.

    Prompts are shared if they are equal or near duplicates. One that more than MAX_LINKED_USERS groups have links none.
    """
    _, place = np.unique(groups, return_inverse=True)
    near = [(number, other) for number, others in index.near.items() for other in others]
    edges = np.array(near, np.int64).reshape(-1, 2)
    _, cluster = connected_components(coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])),
                                                 shape=(index.groups, index.groups)), directed=False)
    live = table.staying()
    pairs = np.unique(cluster[index.group[live]].astype(np.int64) * (place.max(initial=0) + 1) + place[live])
    prompt, group = np.divmod(pairs, place.max(initial=0) + 1)
    _, count = np.unique(prompt, return_counts=True)
    few = np.repeat(count <= MAX_LINKED_USERS, count)
    next_to = few[1:] & (prompt[1:] == prompt[:-1])
    size = place.max(initial=-1) + 1
    _, component = connected_components(coo_matrix((np.ones(int(next_to.sum())), (group[:-1][next_to],
                                                                                group[1:][next_to])),
                                                   shape=(size, size)), directed=False)
    return component.astype(np.int64)


def _split(table: _Table, groups: NDArray[np.uint64], component: NDArray[np.int64], valid_share: float, seed: int
           ) -> None:
    """Puts each group on one side in all datasets: the source's (train if it names both), else by a seeded hash.

    Groups of one component are drawn together. One that has more rows than valid should have is put into train.
    """
    names, place = np.unique(groups, return_inverse=True)
    live = table.fates == STAYS
    least = np.full(component.max(initial=-1) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, component, names)
    drawn = np.array([hashed(str(name), seed + 1) for name in least.tolist()], np.uint64)
    side = (drawn.astype(np.float64) / 2.0**64 < valid_share).astype(np.int8)
    rows = np.bincount(component[place[live]], minlength=len(least))
    side[(rows > valid_share * live.sum()) & (rows > 1)] = TRAIN
    own = np.full(len(names), UNDECIDED, np.int8)  # what the source says of a group
    own[place[live & (table.splits == VALID)]] = VALID
    own[place[live & (table.splits == TRAIN)]] = TRAIN
    side[component[own == VALID]] = VALID
    side[component[own == TRAIN]] = TRAIN
    wanted = np.where(own == UNDECIDED, side[component], own)[place]
    table.drop("user_in_both_splits", table.staying((table.splits != UNDECIDED) & (table.splits != wanted)))
    table.splits[table.splits == UNDECIDED] = wanted[table.splits == UNDECIDED]


def _cap_users(table: _Table, mine: NDArray[np.bool_], prompts: NDArray[np.int64], most: int) -> None:
    """Drops all rows of a named user's prompts beyond `most`; a prompt may have many rows."""
    rows = table.staying(mine, table.users != 0)
    rows = rows[np.lexsort((table.orders[rows], prompts[rows], table.users[rows]))]
    users = table.users[rows]
    new_prompt = _begins(users, prompts[rows])
    run = np.cumsum(new_prompt) - 1  # the number of each row's (user, prompt)
    first = rows[new_prompt]
    by_user = np.lexsort((table.orders[first], table.users[first]))
    starts = np.flatnonzero(_begins(table.users[first][by_user]))
    position = np.empty(len(first), np.int64)
    position[by_user] = np.arange(len(first)) - np.repeat(starts, np.diff([*starts, len(first)]))
    table.drop("user_cap", rows[position[run] >= most])


def _begins(*columns: NDArray) -> NDArray[np.bool_]:
    """Where a row differs from the one before it in any of the columns."""
    begins = np.ones(len(columns[0]), bool)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return begins


def _leaks(table: _Table, index: PrefixIndex, names: list[str]) -> None:
    """Drops prompts that are nearly one on the other side of the split.

    Between datasets the row that cost less is dropped, on whichever side it is: a PPO prompt before a demonstration,
    that before a comparison. Within a dataset it is the valid row.
    """
    sides = [table.splits == TRAIN, table.splits == VALID]
    number = {name: table.dataset == place for place, name in enumerate(names)}
    none = np.zeros(len(table.dataset), np.bool_)
    sft, rm, ppo = (number.get(name, none) for name in ("sft", "rm", "ppo"))
    for rule, others, mine in (("leak_into_ppo", sft | rm, ppo), ("leak", rm, sft)):
        table.drop(rule, index.crossing(table.staying(sides[VALID], others), table.staying(sides[TRAIN], mine)))
        table.drop("leak", index.crossing(table.staying(sides[TRAIN], others), table.staying(sides[VALID], mine)))
    for mine in number.values():
        table.drop("leak", index.crossing(table.staying(sides[TRAIN], mine), table.staying(sides[VALID], mine)))


def _to_paper(table: _Table, mine: NDArray[np.bool_], name: str) -> None:
    for split, word in enumerate(SPLITS):
        most = sum(count for (side, _), count in PAPER_ROWS[name].items() if side == word)
        rows = table.staying(mine, table.splits == split)
        table.drop("subsample", rows[np.argsort(table.orders[rows], kind="stable")][most:])
