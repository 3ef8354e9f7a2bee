"""Data as people bring it: each case of cases/cases.yaml, whose head explains every word of what is expected.

The commands run in this process. WANTED names the cases that are not right yet; one that has become right fails, so
that the list only shrinks.
"""

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.data.prompts import prompt_text

FOLDER = Path(__file__).parent / "cases"
CASES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "cases.yaml").read_text(encoding="utf-8"))["cases"]
MOVED = {"tasks.labels": "mlops.labeling.to_rows"}
WANTED: set[str] = set()


def run_command(words: list[str], capture: Callable[[], str]) -> tuple[int, str]:
    """(exit code, all that was printed) of `python -m MODULE ARGUMENTS`."""
    module = importlib.import_module(MOVED.get(words[2], words[2]))
    capture()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [words[2], *words[3:]])
        try:
            module.main(words[3:]) if words[2] not in MOVED else module.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return code, capture()


def rows_of(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def holds_one(text: str, words: list[Any]) -> bool:
    return any(str(word).casefold() in text.casefold() for word in words)


class Check:
    """What commands have done, against one `expect`."""

    def __init__(self, folder: Path, out: Path, codes: list[int], printed: list[str]) -> None:
        self.folder, self.out, self.codes, self.printed = folder, out, codes, printed

    def rows(self, role: str) -> list[dict[str, Any]]:
        return rows_of(self.out / "data" / f"{role}.jsonl")

    @property
    def report(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
        return found

    def faults(self, expect: dict[str, Any]) -> Iterator[str]:
        """A sentence for each thing that is not as expected."""
        said = "\n".join(self.printed)
        if "Traceback" in said:
            yield "a traceback"
        for code, wanted in zip(self.codes, expect.get("exit", []), strict=False):  # a first one that must fail: 1 code
            if (code == 0) if wanted == "not 0" else (code != wanted):
                yield f"exit codes {self.codes}, expected {expect['exit']}: {said}"
        for words in expect.get("says", ()):
            if not holds_one(said, words):
                yield f"says none of {words}: {said}"
        if expect.get("one_line") and len([line for line in self.printed[-1].splitlines() if line.strip()]) != 1:
            yield f"not one line: {self.printed[-1]}"
        for name in sorted(expect.keys() - {"exit", "says", "one_line", "others", "either"}):
            yield from getattr(self, name)(expect)
        if "either" in expect:
            tried = [self.of_option(option) for option in expect["either"]]
            if all(tried):
                yield " | ".join(map(str, tried))

    def of_option(self, expect: dict[str, Any]) -> list[str]:
        """The faults by one of several options, which may look at a file that another one does not have."""
        try:
            return list(self.faults(expect))
        except OSError as error:
            return [str(error)]

    def kept(self, expect: dict[str, Any]) -> Iterator[str]:
        for role, count in expect["kept"].items():
            if len(self.rows(role)) != count:
                lost = rows_of(self.out / "data" / "quarantine.jsonl") + rows_of(self.out / "data" / "dropped.jsonl")
                yield f"{role}: {len(self.rows(role))} rows, expected {count}; lost: {lost[:5]}; {self.printed}"

    def texts(self, expect: dict[str, Any]) -> Iterator[str]:
        for role, fields in expect["texts"].items():
            for name, values in fields.items():
                there = {row[name] for row in self.rows(role)}
                yield from (f"{role}.{name}: no {value!r}" for value in values if value not in there)

    def contains(self, expect: dict[str, Any]) -> Iterator[str]:
        for item in expect["contains"]:
            prompts = [text for text in (prompt_text(row["prompt"]) for row in self.rows(item["role"]))
                       if item["row_with"] in text]
            if not prompts:
                yield f"no prompt with {item['row_with']!r}"
            for prompt in prompts:
                yield from (f"no {text!r} in {prompt!r}" for text in item.get("has", ()) if text not in prompt)
                yield from (f"{text!r} in {prompt!r}" for text in item.get("has_not", ()) if text in prompt)
                yield from (f"{text!r} not once in {prompt!r}" for text in item.get("once", ())
                            if prompt.count(text) != 1)

    def rankings(self, expect: dict[str, Any]) -> Iterator[str]:
        found = [(row["prompt"], dict(zip(row["completions"], row["ranks"], strict=True))) for row in self.rows("rm")]
        for item in expect["rankings"]:
            if (item["prompt"], item["ranks"]) not in found:
                yield f"no {item} in {[ranks for prompt, ranks in found if prompt == item['prompt']]}"

    def one_side(self, expect: dict[str, Any]) -> Iterator[str]:
        for item in expect["one_side"]:
            sides: dict[str, set[str]] = {}
            for role in item["roles"]:
                for row in self.rows(role):
                    sides.setdefault(plain(row[item["by"]]), set()).add(row["split"])
            yield from (f"{value!r} is on both sides" for value, own in sides.items() if len(own) > 1)

    def both_sides(self, expect: dict[str, Any]) -> Iterator[str]:
        for role in expect["both_sides"]:
            if {row["split"] for row in self.rows(role)} != {"train", "valid"}:
                yield f"{role} is not on both sides"

    def nothing_lost(self, expect: dict[str, Any]) -> Iterator[str]:
        for name in ("quarantine", "dropped"):
            if lost := rows_of(self.out / "data" / f"{name}.jsonl"):
                yield f"{name}: {lost[:5]}"

    def quarantined(self, expect: dict[str, Any]) -> Iterator[str]:
        lost = rows_of(self.out / "data" / "quarantine.jsonl")
        for item in expect["quarantined"]:
            count = sum(row["dataset"] == item["role"] and holds_one(row["reason"], item["reason"]) for row in lost)
            if count < item.get("rows", 1):
                yield f"{item} in quarantine {count} times: {lost[:5]}"

    def dropped(self, expect: dict[str, Any]) -> Iterator[str]:
        lost = rows_of(self.out / "data" / "dropped.jsonl")
        for item in expect["dropped"]:
            count = sum(row["dataset"] == item["role"] and holds_one(row["rule"], item["rule"]) for row in lost)
            if count != item["rows"]:
                yield f"{item} dropped {count} times: {lost[:5]}"

    def found(self, expect: dict[str, Any]) -> Iterator[str]:
        report, allowed = self.report, set()
        for item in expect["found"]:
            rows = item["row"] if isinstance(item.get("row"), list) else [item.get("row")]
            matching = [entry for entry in report if item["dataset"] in ("any", entry["dataset"])
                        and (rows == [None] or entry["row"] in rows)
                        and holds_one(f"{entry['rule']} {entry['message']}", item["rule"])
                        and holds_one(entry["message"], item.get("names", [""]))]
            if not matching:
                yield f"not found: {item}; {report[:8]}"
            allowed |= {(item["dataset"], row) for row in rows}
        if expect.get("others") == "clean":
            yield from (f"found too: {entry}" for entry in report if (entry["dataset"], entry["row"]) not in allowed)

    def clean(self, expect: dict[str, Any]) -> Iterator[str]:
        if self.report:
            yield f"not clean: {self.report[:8]}"

    def json(self, expect: dict[str, Any]) -> Iterator[str]:
        for item in expect["json"]:
            value = json.loads((self.folder / item["file"]).read_text(encoding="utf-8"))[item["key"]]
            if value != item["equals"]:
                yield f"{item['key']} is {value}, expected {item['equals']}"


def faults_of(case: dict[str, Any], work: Path, capture: Callable[[], str]) -> list[str]:
    """Runs a case's commands on copies in `work`; what is not as expected."""
    folder, out = work / case["name"], work / "out"
    shutil.copytree(FOLDER / case["name"], folder)
    shutil.copytree(FOLDER / "fill", work / "fill")
    out.mkdir()
    ran = []
    with contextlib.chdir(folder if case.get("cwd") == "case" else work):
        for command in case["commands"]:
            words = [word.replace("CASE", str(folder)).replace("OUT", str(out)) for word in command.split()]
            ran.append(run_command(words, capture))
    check = Check(folder, out, [code for code, _ in ran], [said for _, said in ran])
    return list(check.faults(case["expect"]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_case(case: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str],
              monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INSTRUCTFLOW_UPLOADER", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    try:
        found = faults_of(case, tmp_path, lambda: "".join(capfd.readouterr()))
    except Exception as error:  # a wanted case may end in any way
        found = [f"{type(error).__name__}: {error}"]
    if case["name"] in WANTED:
        assert found, "this case is right now: take it out of WANTED"
        pytest.xfail(found[0][:200])
    assert not found, "\n".join(found)


def test_wanted_cases_exist() -> None:
    assert {case["name"] for case in CASES} >= WANTED
