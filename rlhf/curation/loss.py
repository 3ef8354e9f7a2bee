"""Rows that are lost to quarantine and rules: counted, shown by example, and refused where they are too many."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.curation.language import languages
from rlhf.curation.rules import NO_LOSS, RULES
from rlhf.curation.screen import Quarantined, Screened
from rlhf.curation.sources.spec import RulesParams
from rlhf.data.prompts import prompt_problem, prompt_text
from rlhf.errors import UserError

EXAMPLES = 3  # rows shown of each rule
SHOWN_CHARS, DETAIL_CHARS = 70, 30
_NUMBERED = re.compile(r"\A(completion|message) \d+")
ALL_QUARANTINED = "quarantine"  # the name of quarantine in max_lost_shares


def check_rules(rules: RulesParams) -> None:
    """Raises ValueError, "parameter: problem", for an unknown language and for an allowance of no rule or no share."""
    if rules.language != "en" and rules.language not in languages():
        raise ValueError(f"language = {rules.language!r}: must be one of {', '.join(languages())}")
    known = [ALL_QUARANTINED, *(rule for rule in RULES if rule not in NO_LOSS)]
    for name, share in rules.max_lost_shares.items():
        if name not in known:
            raise ValueError(f"max_lost_shares: unknown rule {name!r}; must be one of {', '.join(known)}")
        if not 0 <= share <= 1:
            raise ValueError(f"max_lost_shares.{name} = {share}: must be float >= 0 and <= 1")


def reason_kind(reason: str) -> str:
    """A reason without the details of its row, for counting."""
    return _NUMBERED.sub(r"a \1", reason.split(":")[0])


def detail_of(reason: str) -> str:
    """What a reason says of its row, such as a value that is not known; "" if nothing."""
    return reason.partition(": ")[2]


def lost_rows(report: Mapping[str, Any]) -> int:
    """The rows of a role that quarantine and rules took, by its report."""
    return sum(report["quarantined"].values()) + sum(
        count for rule, count in report["dropped"].items() if rule not in NO_LOSS)


def is_too_much(report: Mapping[str, Any], rules: RulesParams) -> bool:
    """Whether a role has lost more of its rows than the description allows, or all."""
    if not report["kept"]:
        return True
    counts = {ALL_QUARANTINED: sum(report["quarantined"].values()),
              **{rule: count for rule, count in report["dropped"].items() if rule not in NO_LOSS}}
    beyond = sum(max(0.0, count - rules.max_lost_shares.get(rule, 0.0) * report["read"])
                 for rule, count in counts.items())
    return beyond > rules.max_lost_share * report["read"] + 1e-9


@dataclass
class Quarantine:
    """What has been quarantined of each role: counts and first rows by reason, and of files that fit no layout."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    usable: dict[str, Counter[str]] = field(default_factory=dict)
    unusable: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)

    def add(self, role: str, place: str, screened: list[Screened], bad: list[Quarantined]) -> None:
        self.usable.setdefault(role, Counter())[place] += len(screened) + sum(item.fits for item in bad)
        counts, examples = self.counts.setdefault(role, Counter()), self.examples.setdefault(role, {})
        for item in bad:
            kind = reason_kind(item.reason)
            counts[kind] += 1
            if not item.fits:
                self.unusable.setdefault(role, {}).setdefault(place, Counter())[kind] += 1
            shown = examples.setdefault(f"quarantined: {kind}", [])
            if len(shown) < EXAMPLES:
                shown.append(example(place, item.number, _shown(item.row), detail_of(item.reason)))

    def check_files(self, role: str, rules: RulesParams) -> None:
        """Raises UserError for a file of which no row fits its layout, unless the description allows the loss."""
        if rules.max_lost_shares.get(ALL_QUARANTINED, rules.max_lost_share) >= 1:
            return
        for place, reasons in self.unusable.get(role, {}).items():
            if not self.usable[role][place]:
                kind, _ = reasons.most_common(1)[0]
                shown = self.examples[role][f"quarantined: {kind}"]
                lines = [f"{place}: no usable row for {role} in {sum(reasons.values()):,}; most rows: {kind}",
                         *(f"  {line}" for line in shown if line.startswith(f"{place}:"))]
                raise UserError("\n".join(lines))


def _shown(row: Any) -> str:
    """The prompt of a row that has one, else the row."""
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    return str(row) if prompt is None else str(prompt) if prompt_problem(prompt) else prompt_text(prompt)


def example(place: str, number: int, text: str, detail: str = "") -> str:
    """A line that shows a lost row; `detail`: of the reason."""
    detail = f"({_short(detail, DETAIL_CHARS)}) " if detail else ""
    return f"{place}: row {number}: {detail}{_short(text, SHOWN_CHARS)}"


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " ..."


def check_loss(report: Mapping[str, Any], rules: RulesParams, examples: Mapping[str, Mapping[str, Iterable[str]]]
               ) -> None:
    """Raises UserError with a table of what was lost to which rule where a role has lost too much.

    `report`: by role, read, quarantined, dropped and kept. `examples`: by role and rule, lines that show rows.
    """
    said = []
    for role, counts in report.items():
        if not is_too_much(counts, rules):
            continue
        lost, read = lost_rows(counts), counts["read"]
        what = f"{role}: {lost:,} of {read:,} rows are lost ({lost / max(read, 1):.0%})" if counts["kept"] else \
            f"{role}: no row is left of {read:,}"
        said.append(f"{what}, more than the rules allow (max_lost_share = {rules.max_lost_share:g})")
        named = {f"quarantined: {reason}": count for reason, count in counts["quarantined"].items()}
        named |= {rule: count for rule, count in counts["dropped"].items() if count}
        wide = max(map(len, named), default=0)
        for name, count in sorted(named.items(), key=lambda item: (-item[1], item[0])):
            said.append(f"  {name.ljust(wide)}  {count:>9,}  {RULES.get(name, '')}".rstrip())
            said += [f"      {line}" for line in examples.get(role, {}).get(name, ())]
    if said:
        said.append("Nothing is replaced. Correct the data or the description, or allow the loss: rules: "
                    "{max_lost_share: 0.5}, or of one rule {max_lost_shares: {near_duplicate: 0.5}}")
        raise UserError("\n".join(said))
