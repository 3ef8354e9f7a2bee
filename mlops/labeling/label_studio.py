"""Publishes a batch to Label Studio, one project per labeler, and pulls the labels from there.

    .venv-labels/bin/python -m mlops.labeling.label_studio publish feedback/r1    # repeatable: adds missing tasks
    .venv-labels/bin/python -m mlops.labeling.label_studio pull feedback/r1       # repeatable: adds new labels

Runs in Label Studio's own environment (`make labels`), since its SDK needs other versions than training. Reads
LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY. Each labeler sees the completions in their own order, without model names.
An annotation that is changed later, or a second one for the same task, is a correction: the latest counts.
"""

import argparse
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from mlops.labeling.batch import Assignment, Item, in_item_order, read_batch
from mlops.labeling.guide import FLAG_QUESTIONS, GUIDE_HTML, REMINDER
from mlops.labeling.store import LABELS, Batch, Label, LabelStore, check
from mlops.tracking.proxies import ask_loopback_directly
from rlhf.data.prompts import NAMES, message_text, prompt_text
from rlhf.errors import UserError, one_line

LETTERS = "abcdefghi"
KEYS = ("1234", "qwer", "asdf", "zxcv")  # rank keys of the first four completions; with more, the mouse
TITLE_CHARS = 50  # Label Studio's limit


def config(count: int, choose: bool, turns: bool = False) -> str:
    """Label Studio's labeling configuration for `count` completions: choose the best, or rank with ties.

    `turns`: prompts are shown as conversations, turn by turn.
    """
    prompt = '<Text name="prompt" value="$prompt"/>'
    if turns:
        prompt = '<Paragraphs name="prompt" value="$turns" layout="dialogue" nameKey="role" textKey="text"/>'
    parts = ['<View>', f'<Header value={quoteattr(REMINDER)} size="5"/>', '<Header value="Prompt / 依頼" size="4"/>',
             prompt]
    if choose:
        choices = "".join(f'<Choice value="{letter.upper()}" hotkey="{place}"/>'
                          for place, letter in enumerate(LETTERS[:count], start=1))
        parts.append('<Header value="The best / 最も良いもの" size="4"/><Choices name="best" toName="prompt" '
                     f'required="true" choice="single-radio" showInline="true">{choices}</Choices>')
    for place, letter in enumerate(LETTERS[:count]):
        parts.append(f'<View style="border-top: 2px solid #ccc; margin-top: 1em"><Header value="{letter.upper()}" '
                     f'size="4"/><Text name="{letter}" value="${letter}"/>')
        if not choose:
            parts.append(f'<Choices name="rank_{letter}" toName="{letter}" choice="single-radio" showInline="true" '
                         f'required="true" requiredMessage="{letter.upper()} has no rank / 順位がありません">')
            for rank in range(1, count + 1):
                hotkey = f' hotkey="{KEYS[place][rank - 1]}"' if count <= len(KEYS) else ""
                parts.append(f'<Choice value="{rank}"{hotkey}/>')
            parts.append('</Choices>')
        parts.append('<Header value="Overall, 1 to 7 / 総合評価 1〜7" size="6"/>'
                     f'<Rating name="overall_{letter}" toName="{letter}" maxRating="7"/>')
        flags = "".join(f'<Choice value={quoteattr(text)} alias="{flag}"/>' for flag, text in FLAG_QUESTIONS.items())
        parts.append(f'<Choices name="flags_{letter}" toName="{letter}" choice="multiple" showInline="true">{flags}'
                     '</Choices></View>')
    return "\n".join([*parts, "</View>"])


def task_data(item: Item, order: Sequence[int]) -> dict[str, Any]:
    """What the labeler is shown: no model names. `turns`: the prompt's, for projects that show conversations."""
    prompt = item.row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"item_id": item.item_id, "prompt": prompt_text(prompt),
            "turns": [{"role": NAMES[message["role"]], "text": message_text(message)} for message in messages],
            **{letter: item.completions[place] for letter, place in zip(LETTERS, order, strict=False)}}


def read_result(result: Sequence[Mapping[str, Any]], count: int
                ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[str, ...], ...]]:
    """(ranks, overall, flags) in the order shown. Ranks become dense; the chosen one has rank 1, all others 2.

    Raises UserError where a rank is missing: the form requires it, an imported annotation may lack it.
    """
    values = {str(part["from_name"]): part["value"] for part in result}
    if "best" in values:
        ranks = [1 if letter.upper() in values["best"]["choices"] else 2 for letter in LETTERS[:count]]
    else:
        chosen = [values.get(f"rank_{letter}", {}).get("choices") for letter in LETTERS[:count]]
        if missing := [letter.upper() for letter, rank in zip(LETTERS, chosen, strict=False) if not rank]:
            raise UserError(f"no rank for {', '.join(missing)}")
        steps = sorted({int(rank[0]) for rank in chosen})
        ranks = [steps.index(int(rank[0])) + 1 for rank in chosen]
    rated = [values.get(f"overall_{letter}", {}).get("rating") for letter in LETTERS[:count]]
    flags = tuple(tuple(sorted(values.get(f"flags_{letter}", {}).get("choices", []))) for letter in LETTERS[:count])
    return tuple(ranks), tuple(rated) if all(rated) else (), flags if any(flags) else ()


def label_of(submission_id: str, item: Item, assignment: Assignment, result: Sequence[Mapping[str, Any]]) -> Label:
    """An annotation as a label, in the item's own order."""
    ranks, overall, flags = read_result(result, len(assignment.order))
    shown_at = [assignment.order.index(index) for index in range(len(assignment.order))]
    return Label(submission_id, item.item_id, assignment.labeler_id, in_item_order(ranks, assignment.order),
                 tuple(overall[place] for place in shown_at) if overall else (),
                 tuple(flags[place] for place in shown_at) if flags else ())


# --- the server -------------------------------------------------------------------------------------------------


def connect() -> Any:
    """A client of the server that the environment names. Raises UserError."""
    url, key = os.environ.get("LABEL_STUDIO_URL"), os.environ.get("LABEL_STUDIO_API_KEY")
    if not url or not key:
        raise UserError("LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY must be set (docs/feedback.md)")
    try:
        from label_studio_sdk.client import LabelStudio  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError("this environment lacks Label Studio's SDK; use .venv-labels/bin/python, which `make labels` "
                        "installs") from None
    ask_loopback_directly(os.environ)
    return LabelStudio(base_url=url, api_key=key, timeout=60)


Group = tuple[str, int]  # of one project: its labeler and the number of completions per item


def groups_of(assignments: Sequence[Assignment]) -> dict[Group, list[Assignment]]:
    """Assignments by project."""
    groups: dict[Group, list[Assignment]] = {}
    for item in assignments:
        groups.setdefault((item.labeler_id, len(item.order)), []).append(item)
    return dict(sorted(groups.items()))


def title_of(folder: Path, group: Group) -> str:
    """A project's title, the same for the same batch, labeler and number of completions."""
    batch = hashlib.sha256((folder / "items.jsonl").read_bytes()).hexdigest()[:6]
    return f"{folder.name} {batch} {group[1]} {group[0]}"[:TITLE_CHARS]


def projects_of(client: Any, folder: Path, groups: Iterable[Group]) -> dict[Group, int]:
    """Ids of the projects that exist."""
    by_title = {title_of(folder, group): group for group in groups}
    return {by_title[project.title]: project.id for project in client.projects.list() if project.title in by_title}


def publish(client: Any, folder: Path, choose: bool) -> int:
    """Creates missing projects and tasks; returns the number of tasks created."""
    items, assignments = read_batch(folder)
    groups = groups_of(assignments)
    projects, created = projects_of(client, folder, groups), 0
    for group, own in groups.items():
        if group not in projects:
            turns = any(not isinstance(items[item.item_id].row["prompt"], str) for item in own)
            projects[group] = client.projects.create(
                title=title_of(folder, group), label_config=config(group[1], choose, turns),
                expert_instruction=GUIDE_HTML, show_instruction=True, show_skip_button=False, maximum_annotations=1).id
        known = {task.data["item_id"] for task in client.tasks.list(project=projects[group])}
        tasks = [{"data": task_data(items[item.item_id], item.order)} for item in own if item.item_id not in known]
        if tasks:
            client.projects.import_tasks(id=projects[group], request=tasks)
        created += len(tasks)
    return created


def pull(client: Any, folder: Path) -> int:
    """Adds new annotations to the batch's labels; returns how many."""
    items, assignments = read_batch(folder)
    by_key = {(item.labeler_id, item.item_id): item for item in assignments}
    new = []
    for group, project in sorted(projects_of(client, folder, groups_of(assignments)).items()):
        for task in client.tasks.list(project=project, fields="all"):
            assignment = by_key.get((group[0], task.data["item_id"]))
            if assignment is None:
                continue
            for annotation in sorted(task.annotations or [], key=lambda one: (one["updated_at"], one["id"])):
                if annotation.get("was_cancelled"):
                    continue
                try:
                    label = label_of(f"label-studio/{project}/{annotation['id']}/{annotation['updated_at']}",
                                     items[assignment.item_id], assignment, annotation["result"])
                    check(label, items)
                except UserError as error:
                    raise UserError(f"Label Studio: project {project}, task {task.id}, annotation {annotation['id']}: "
                                    f"{error}; correct it in Label Studio") from None
                new.append((annotation["updated_at"], label))
    return LabelStore(folder / LABELS).add(*(label for _, label in sorted(new, key=lambda pair: pair[0])))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.labeling.label_studio",
                                     description="Publishes a batch to Label Studio, or pulls its labels.")
    parser.add_argument("what", choices=("publish", "pull"))
    parser.add_argument("folder", type=Path, help="the batch")
    parser.add_argument("--choose", action="store_true", help="labelers choose the best instead of ranking all")
    options = parser.parse_args()
    with one_line("label_studio"):
        client = connect()
        try:
            if options.what == "publish":
                message = f"{publish(client, options.folder, options.choose)} tasks created"
            else:
                batch = Batch(options.folder)
                message = f"{pull(client, options.folder)} labels pulled, {len(batch.missing())} missing"
        except (UserError, OSError):
            raise
        except Exception as error:  # the SDK raises what httpx raises, and classes of its own
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"Label Studio at {os.environ['LABEL_STUDIO_URL']}: {reason}") from None
    print(f"{options.folder}: {message}")


if __name__ == "__main__":
    main()
