"""Labels a batch on the terminal, or with the embedded world's simulated labelers.

    python -m mlops.labeling.terminal feedback/first --labeler ada     # resumes where ada stopped
    python -m mlops.labeling.terminal feedback/first --simulate        # all assignments without a label

A ranking is typed as letters, best first, with `=` between ties: `b a=c d`. One letter alone chooses that completion,
the others then share rank 2. `back` corrects the previous ranking. Each ranking is on disk before the next item.
"""

import argparse
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mlops import program
from mlops.config.loader import load_params
from mlops.labeling.batch import Assignment, Item, in_item_order, read_batch
from mlops.labeling.store import LABELS, Label, LabelStore, check
from rlhf.data.prompts import NAMES, Prompt, message_text
from rlhf.errors import UserError, displayed, one_line

SIMULATED = "simulated/"  # prefix of simulated labelers' submission ids; their labels can be made again
GUIDE = ("Helpful: does what the person meant. Truthful: nothing made up or misleading. Harmless: nobody is hurt or "
         "insulted. Truthful and harmless go first, unless one is much more helpful and only slightly worse there, and "
         "little is at stake.")


def read_ranking(text: str, count: int) -> tuple[int, ...]:
    """Dense ranks in the order shown, from the letters that were typed. Raises UserError for an invalid ranking."""
    groups = [group.split("=") for group in re.sub(r"\s*=\s*", "=", text.lower()).split()]
    places = {chr(ord("a") + place): place for place in range(count)}
    ranks: dict[int, int] = {}
    for rank, group in enumerate(groups, start=1):
        for letter in group:
            if letter not in places:
                raise UserError(f"{letter or '='!r}: use letters from a to {chr(ord('a') + count - 1)}, = between ties")
            if places[letter] in ranks:
                raise UserError(f"{letter!r} appears twice")
            ranks[places[letter]] = rank
    if len(groups) == 1 and len(ranks) == 1:  # a choice
        ranks |= {place: 2 for place in range(count) if place not in ranks}
    if missing := [letter for letter, place in places.items() if place not in ranks]:
        raise UserError(f"not ranked: {', '.join(missing)}; `=` joins ties, one letter alone chooses")
    return tuple(ranks[place] for place in range(count))


def label_on_terminal(store: LabelStore, items: Mapping[str, Item], assignments: list[Assignment], console: Console,
                      ask: Callable[[str], str]) -> int:
    """Shows one labeler's assignments without a label, one by one, until an empty answer; returns how many were
    ranked."""
    done = {label.item_id for label in store.all() if label.labeler_id == assignments[0].labeler_id}
    place = next((index for index, item in enumerate(assignments) if item.item_id not in done), len(assignments))
    console.print(Text(GUIDE, style="dim"))
    ranked = 0
    while place < len(assignments):
        assignment = assignments[place]
        item = items[assignment.item_id]
        console.print(f"\n{place + 1} of {len(assignments)}", style="bold")
        show_prompt(item.row["prompt"], console)
        for letter, index in zip("abcdefghi", assignment.order, strict=False):
            show_text(Text(f"  {letter}  {indented(item.completions[index], 5)}"), console)
        answer = ask("ranking (back: previous item, empty: stop): ").strip()
        if not answer:
            break
        if answer == "back":
            place = max(0, place - 1)
            continue
        try:
            ranks = in_item_order(read_ranking(answer, len(assignment.order)), assignment.order)
        except UserError as error:
            console.print(Text(str(error), style="red"))
            continue
        key = (item.item_id, assignment.labeler_id)
        times = sum((label.item_id, label.labeler_id) == key for label in store.all())
        label = Label(f"{assignment.labeler_id}/{item.item_id}/{times + 1}", *key, ranks)
        check(label, items)
        store.add(label)
        ranked += 1
        place += 1
    return ranked


def show_prompt(prompt: Prompt, console: Console) -> None:
    """Prints a prompt; of a conversation who speaks stands alone, so that no text can pass for a turn."""
    if isinstance(prompt, str):
        show_text(Text(displayed(prompt), style="cyan"), console)
        return
    for message in prompt:
        console.print(Text(NAMES[message["role"]], style="bold cyan"))
        show_text(Text("    " + indented(message_text(message), 4), style="cyan"), console)


def show_text(text: Text, console: Console) -> None:
    """Breaks lines between words; where a word is longer than a line, such as a link, the terminal wraps the text."""
    console.print(text, soft_wrap=max(map(cell_len, text.plain.split()), default=0) > console.width)


def indented(text: str, columns: int) -> str:
    """The text as a terminal may show it, its further lines so many columns to the right."""
    return displayed(text).replace("\n", "\n" + " " * columns)


def simulate(store: LabelStore, items: Mapping[str, Item], assignments: list[Assignment], seed: int) -> int:
    """The embedded world's simulated labelers rank all assignments without a label; returns how many."""
    from rlhf.world.gold import gold_labeler
    from rlhf.world.labeler import SimulatedLabeler

    gold = gold_labeler(seed)
    if gold is None:
        raise UserError("--simulate: the data is not from the embedded world, so only people can label it")
    store.forget(lambda label: label.submission_id.startswith(SIMULATED) and label.item_id not in items)
    labeled, labels = store.current(), []
    for assignment in assignments:
        if (assignment.item_id, assignment.labeler_id) in labeled:
            continue
        item = items[assignment.item_id]
        prompt = item.row["prompt"]
        labeler = SimulatedLabeler(gold.world, assignment.labeler_id)
        graded = gold.grades([prompt] * len(item.completions), list(item.completions))
        rng = random.Random(f"{seed} {assignment.item_id} {assignment.labeler_id}")
        ranks = labeler.rank(graded, "high_stakes" in gold.slices(prompt), rng)
        key = (assignment.item_id, assignment.labeler_id)
        labels.append(Label(f"{SIMULATED}{key[1]}/{key[0]}", *key, tuple(ranks)))
    store.add(*labels)
    return len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.labeling.terminal"),
                                     description="Ranks the completions of a batch.")
    parser.add_argument("folder", type=Path, help="the batch")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--labeler", metavar="NAME", help="the labeler whose assignments to show")
    who.add_argument("--simulate", action="store_true", help="label with the embedded world's simulated labelers")
    options = parser.parse_args()
    with one_line("label"):
        items, assignments = read_batch(options.folder)
        store = LabelStore(options.folder / LABELS)
        try:
            if options.simulate:
                ranked = simulate(store, items, assignments, load_params().seed)
            else:
                mine = [item for item in assignments if item.labeler_id == options.labeler]
                if not mine:
                    known = ", ".join(sorted({item.labeler_id for item in assignments}))
                    raise UserError(f"{options.folder}: no assignments for {options.labeler}; labelers: {known}")
                ranked = label_on_terminal(store, items, mine, Console(highlight=False), input)
        except (EOFError, KeyboardInterrupt):
            print("\nstopped; run the same command to resume")
            return
    left = len(assignments) - len(store.current())
    print(f"{ranked} rankings stored, {left} of {len(assignments)} left")


if __name__ == "__main__":
    main()
