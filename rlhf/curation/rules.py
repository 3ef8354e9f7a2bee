"""InstructGPT's data rules over whole datasets: near duplicates, users, splits, shares [§3.2, App. A, C].

The result depends on the contents of the rows and on the seed, not on their order: if a rule drops some of many rows,
it drops those with the greatest seeded hash of their content.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
    "other_language": "not English, beyond the share allowed",
    "user_in_both_splits": "the source puts the user on the other side of the split elsewhere",
    "personal_data": "personal data in a train row",
    "near_duplicate": "near duplicate of a shorter prompt of the dataset",
    "user_cap": "beyond max_prompts_per_user",
    "leak_into_ppo": "PPO train prompt that is nearly a valid prompt of SFT or RM",
    "leak": "valid prompt that is nearly a train prompt of another dataset",
    "subsample": "beyond the paper's number of rows",
}
STAYS = -1


@dataclass
class Rows:
    """The columns of one dataset that the rules use; `fates`: STAYS or the index of the rule that dropped the row."""

    keys: list[str] = field(default_factory=list)
    users: list[int] = field(default_factory=list)
    orders: list[int] = field(default_factory=list)
    own_ids: list[int] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    foreign: list[bool] = field(default_factory=list)
    personal: list[bool] = field(default_factory=list)
    fates: list[int] = field(default_factory=list)

    def add(self, row: Screened) -> None:
        self.keys.append(row.key)
        self.users.append(row.user)
        self.orders.append(row.order)
        self.own_ids.append(row.own_id)
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
    _repeated_ids(table, joined("own_ids", np.uint64))
    foreign = joined("foreign", np.bool_)
    for number in range(len(names)):
        _share_of_english(table, table.dataset == number, foreign, rules.min_english_share)
    _split_by_user(table, rules.valid_share, seed)
    if rules.personal_data == "drop":
        table.drop("personal_data", table.staying(joined("personal", np.bool_), table.splits == TRAIN))
    index = PrefixIndex([key for rows in datasets.values() for key in rows.keys], rules.near_duplicate_chars,
                        rules.near_duplicate_share)
    for number in range(len(names)):
        table.drop("near_duplicate", index.repeats(table.orders, table.staying(table.dataset == number).tolist()))
        _cap_users(table, table.dataset == number, rules.max_prompts_per_user)
    _leaks(table, index, names)
    if rules.rows == "paper":
        for number, name in enumerate(names):
            _to_paper(table, table.dataset == number, name)
    bounds = np.cumsum([0, *sizes])
    return {name: (table.splits[start:end], table.fates[start:end])
            for name, start, end in zip(names, bounds, bounds[1:], strict=False)}


def _repeated_ids(table: _Table, own_ids: NDArray[np.uint64]) -> None:
    """A prompt_id must be unique in its dataset."""
    rows = table.staying(own_ids != 0)
    rows = rows[np.lexsort((table.orders[rows], own_ids[rows], table.dataset[rows]))]
    same = (own_ids[rows][1:] == own_ids[rows][:-1]) & (table.dataset[rows][1:] == table.dataset[rows][:-1])
    table.drop("repeated_id", rows[1:][same])


def _share_of_english(table: _Table, mine: NDArray[np.bool_], foreign: NDArray[np.bool_], share: float) -> None:
    if share == 0:
        return
    english = len(table.staying(mine, ~foreign))
    others = table.staying(mine, foreign)
    allowed = int(english * (1 - share) / share + 1e-9)
    table.drop("other_language", others[np.argsort(table.orders[others], kind="stable")][allowed:])


def _split_by_user(table: _Table, valid_share: float, seed: int) -> None:
    """Puts each user on one side in all datasets: the source's (train if it names both), else by a seeded hash."""
    users, place = np.unique(table.users, return_inverse=True)
    drawn = np.array([hashed(str(user), seed + 1) for user in users.tolist()], np.uint64)
    side = (drawn.astype(np.float64) / 2.0**64 < valid_share).astype(np.int8)
    live = table.fates == STAYS
    side[place[live & (table.splits == VALID)]] = VALID
    side[place[live & (table.splits == TRAIN)]] = TRAIN
    wanted = side[place]
    table.drop("user_in_both_splits", table.staying((table.splits != UNDECIDED) & (table.splits != wanted)))
    table.splits[table.splits == UNDECIDED] = wanted[table.splits == UNDECIDED]


def _cap_users(table: _Table, mine: NDArray[np.bool_], most: int) -> None:
    rows = table.staying(mine)
    rows = rows[np.lexsort((table.orders[rows], table.users[rows]))]
    users = table.users[rows]
    starts = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]])) if len(rows) else np.zeros(0, np.int64)
    position = np.arange(len(rows)) - np.repeat(starts, np.diff([*starts, len(rows)]))
    table.drop("user_cap", rows[position >= most])


def _leaks(table: _Table, index: PrefixIndex, names: list[str]) -> None:
    train, valid = table.splits == TRAIN, table.splits == VALID
    if "ppo" in names:
        ppo = table.dataset == names.index("ppo")
        table.drop("leak_into_ppo", index.crossing(table.staying(valid, ~ppo).tolist(),
                                                   table.staying(train, ppo).tolist()))
    table.drop("leak", index.crossing(table.staying(train).tolist(), table.staying(valid).tolist()))


def _to_paper(table: _Table, mine: NDArray[np.bool_], name: str) -> None:
    for split, word in enumerate(SPLITS):
        most = sum(count for (side, _), count in PAPER_ROWS[name].items() if side == word)
        rows = table.staying(mine, table.splits == split)
        table.drop("subsample", rows[np.argsort(table.orders[rows], kind="stable")][most:])
