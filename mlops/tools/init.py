"""Writes a profile and a source description for one's own model and data.

    python -m mlops.tools.init team --model gpt2 --pairs pairs.csv            # more with --help
    python -m mlops.tools.init team --model gpt2 --public                     # public sets of the hub

It reads the files' columns and a model's configuration, never all of the data; `instructflow check` looks further.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from mlops import program
from mlops.config.loader import PROFILE_NAME, PROFILES_DIR, SOURCES_DIR
from mlops.config.sources import load_source
from mlops.tools.recognize import ROLES, USUAL, has, reading_of, typical
from mlops.tools.row_lengths import accepted, millions, tokens_of
from rlhf.curation.preview import Look, look_at, mapping_of
from rlhf.curation.sources.map_rows import row_of
from rlhf.curation.sources.read import files_of, read_entry
from rlhf.curation.sources.spec import Entry, Source
from rlhf.errors import UserError, first_line, one_line
from rlhf.files import write_atomic

SMALL, LARGE = 80e6, 800e6  # parameters: where the rates change
SHARE_THAT_FITS = 0.95
LOOKED_AT = 50  # rows by which a file is recognized


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user named: the model, files by what they hold, columns by field."""

    name: str
    model: str
    files: Mapping[str, str]
    columns: Mapping[str, str]
    public: bool
    gpu: bool
    language: str = ""


# --- the source description -------------------------------------------------------------------------------------------


def delimiter_of(file: str, folder: Path) -> str:
    """What separates the columns of a CSV file, by its first line; empty: a comma, or no CSV file."""
    path = folder / file
    if path.suffix.lower() != ".csv" or not path.is_file():
        return ""
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline()
    counts = {mark: header.count(mark) for mark in ",;\t|"}
    best = max(counts, key=lambda mark: counts[mark])
    return best if best != "," and counts[","] == 0 and counts[best] else ""


def first_rows(file: str, folder: Path) -> list[dict[str, Any]]:
    """The file's first rows, at most LOOKED_AT. Raises UserError for a file without one."""
    entry = Entry(files=file, delimiter=delimiter_of(file, folder))
    found: list[dict[str, Any]] = []
    for _, _, rows in read_entry(entry, folder):
        for row in rows:
            try:
                content = row_of(row, entry)
            except ValueError as error:
                if not found:
                    raise UserError(f"{file}: its first row: {error}") from None
                continue
            if content is not None:
                found.append({str(name): value for name, value in content.items()})
        if len(found) >= LOOKED_AT:
            break
    if not found:
        raise UserError(f"{file}: has no rows")
    return found[:LOOKED_AT]


def entries_of(given: Given, folder: Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """role → entries of the description, and what to say of the files. Comparisons alone give all three roles: their
    best answers are the demonstrations, their prompts PPO's. Raises UserError."""
    said, first = [], {kind: first_rows(file, folder) for kind, file in given.files.items()}
    for name, column in given.columns.items():
        if not any(has(typical(rows), column) for rows in first.values()):
            there = ", ".join(dict.fromkeys(name for rows in first.values() for name in typical(rows)))
            raise UserError(f"{', '.join(given.files.values())}: has no column {column} for {name}; columns: {there}")

    def entry(kind: str) -> dict[str, Any]:
        file = given.files[kind]
        reading = reading_of(kind, first[kind], given.columns, file)
        if reading.unused:
            said.append(f"  not read of {Path(file).name}: {', '.join(reading.unused)}")
        separated = {"delimiter": mark} if (mark := delimiter_of(file, folder)) else {}
        return {"files": file, **separated, **reading.keys}

    pairs = entry("pairs")
    roles = {"sft": [entry("demonstrations") if "demonstrations" in given.files else pairs | {"from_rankings": True}],
             "rm": [pairs],
             "ppo": [entry("prompts") if "prompts" in given.files else pairs | {"from_rankings": True}]}
    if "text" in given.files:
        roles["corpus"] = [entry("text")]
    return roles, said


def description(given: Given, roles: Mapping[str, list[dict[str, Any]]], limits: Mapping[str, int] | None = None
                ) -> str:
    """The text of profiles/sources/NAME.yaml. `limits`: rules for rows that the model has no positions for."""
    said = {"sft": "demonstrations, for SFT", "rm": "comparisons, for the reward model", "ppo": "prompts, for PPO",
            "corpus": "pretraining text, for the mix of SFT and PPO-ptx"}
    lines = ["# yaml-language-server: $schema=../schemas/source.json",
             "# Where the data come from; docs/sources.md has every key. Look at what becomes of the rows:",
             f"#   python -m tasks.ingest --source profiles/sources/{given.name}.yaml --preview 3"]
    for role, entries in roles.items():
        note = said[role]
        if role == "sft" and "demonstrations" not in given.files:
            note = "demonstrations, for SFT: the best answers of the comparisons, for want of others"
        text = yaml.safe_dump({role: entries}, sort_keys=False, allow_unicode=True, width=110).rstrip("\n")
        lines += [f"{role}:  # {note}", *text.splitlines()[1:]]
    lines += ["rules:", "  valid_share: 0.2  # of the users' (or prompts') rows: held out for every measure"]
    lines += [f"  language: {given.language}"] if given.language else []
    if limits:
        lines += ["  # Together the model's positions; longer rows, and those that its template refuses, are dropped.",
                  f"  tokenizer: {json.dumps(given.model, ensure_ascii=False)}",
                  *(f"  {name}: {value}" for name, value in limits.items())]
    return "\n".join(lines) + "\n"


# --- the profile ------------------------------------------------------------------------------------------------------


def lengths(codec: Any, looks: Mapping[str, Look]) -> dict[str, int]:
    """Tokens that 95 % of the rows do not exceed: prompt, answer, demonstration, whole, rounded up to multiples of 16;
    the longest row's tokens; the rows that the template refuses. Raises UserError where it refuses all of a role."""
    def high(counts: Sequence[int]) -> int:
        value = sorted(counts)[min(len(counts) - 1, int(SHARE_THAT_FITS * len(counts)))]
        return max(16, -(-value // 16) * 16)

    taken = {role: accepted(codec, looks[role].kept)[0] for role in ("sft", "rm", "ppo")}
    for role, rows in taken.items():
        if not rows:
            raise UserError(f"the chat template refuses every row of {role}: {accepted(codec, looks[role].kept)[1][0]}")
    asked = [prompt for prompt, _ in tokens_of(codec, taken["ppo"])]
    ranked = tokens_of(codec, taken["rm"], "completions")
    longest, compared = [answer for _, answer in ranked], [sum(pair) for pair in ranked]
    demonstrated = tokens_of(codec, taken["sft"], "completion")
    trained = [sum(pair) for pair in demonstrated]
    return {"prompt": high(asked), "answer": high(longest), "rm": high(compared), "sft": high(trained),
            "shown": high([answer for _, answer in demonstrated]), "longest": max(*asked, *compared, *trained),
            "refused": sum(len(looks[role].kept) - len(rows) for role, rows in taken.items())}


def row_limits(tokens: Mapping[str, int], context: int, whole: bool) -> dict[str, int]:
    """Rules by which every row fits into `context` positions and the chat template; none where all have been seen to
    fit."""
    if whole and tokens["longest"] <= context and not tokens["refused"]:
        return {}
    answer = min(max(tokens["answer"], tokens["shown"]), context // 2)
    return {"max_prompt_tokens": context - answer, "max_completion_tokens": answer}


def profile(given: Given, size: float, context: int, tokens: Mapping[str, int]) -> str:
    """The text of profiles/NAME.yaml, with the comments that matter. `tokens`: what `lengths` gives."""
    answer = min(tokens["answer"], context // 2)
    prompt = min(tokens["prompt"], context - answer)
    small, large = size < SMALL, size > LARGE
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("profile.yaml.j2").render(
        name=given.name, model=given.model, public=given.public, gpu=given.gpu,
        sft_lr="3.0e-4" if small else "1.0e-5", rm_lr="1.0e-4" if small else "9.0e-6",
        ppo_lr="5.0e-5" if small else "5.0e-7" if large else "1.0e-6", value_lr="1.0e-4" if small else "5.0e-6",
        sft_tokens=min(tokens["sft"], context), rm_tokens=min(tokens["rm"], context), prompt_tokens=prompt,
        answer_tokens=answer)


def base(model: str, root: Path) -> tuple[Any, int, int]:
    """(codec, positions, parameters) of the model. Raises UserError where it cannot be read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf.model.chat_format import codec_with_pad
    from rlhf.model.folders import check_folder

    folder = str(root / model) if (root / model).is_dir() else model
    if model.startswith((".", "/", "~")) and not Path(folder).is_dir():
        raise UserError(f"--model {model}: no such folder")
    try:
        check_folder(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        codec = codec_with_pad(folder)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
    except UserError as error:
        raise UserError(f"--model {model}: {error}") from None
    except Exception as error:  # whatever a foreign configuration makes transformers raise
        raise UserError(f"--model {model}: cannot be loaded: {first_line(error)[:300]}") from None
    context = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
    return codec, context, size


# --- the command ------------------------------------------------------------------------------------------------------


def relative(path: str, folder: Path) -> str:
    """A path as a description in `folder` names it: relative inside the checkout, else absolute."""
    target = Path(os.path.abspath(path))
    inside = target.is_relative_to(folder.parents[1].resolve())
    return os.path.relpath(target, folder) if inside else str(target)


def ask(question: str, default: str, silent: bool) -> str:
    """The user's answer; the default where nobody is there to answer."""
    if silent or not sys.stdin.isatty():
        return default
    shown = f" [{default}]" if default else ""
    return input(f"{question}{shown}: ").strip() or default


def given_by(options: argparse.Namespace, folder: Path) -> Given:
    """What the user said or answers. Raises UserError for what is missing."""
    silent = options.yes
    model = options.model or ask("Base model: a folder or a Hugging Face name", "", silent)
    if not model:
        raise UserError("--model is needed: a folder with a Hugging Face model, or a name of the hub")
    files = {kind: getattr(options, kind) for kind in ROLES if getattr(options, kind)}
    if not options.public and "pairs" not in files:
        pairs = ask("File with comparisons (prompt, chosen, rejected), or `public` for public sets", "", silent)
        if not pairs:
            raise UserError("--pairs FILE is needed (comparisons: prompt, chosen, rejected), or --public")
        options.public = pairs == "public"
        files |= {} if options.public else {"pairs": pairs}
    columns = {}
    for text in options.columns:
        for part in text.split(","):
            field, equals, column = part.partition("=")
            if not equals or field.strip() not in USUAL:
                raise UserError(f"--columns {text}: must be FIELD=COLUMN; fields: {', '.join(USUAL)}")
            columns[field.strip()] = column.strip()
    for kind, file in files.items():
        if not files_of(Entry(files=os.path.abspath(file)), Path("/")):
            raise UserError(f"--{kind} {file}: no such file")
    import torch

    gpu = options.device == "gpu" or (options.device == "auto" and torch.cuda.is_available())
    return Given(options.name, os.path.abspath(model) if Path(model).is_dir() else model,
                 {kind: relative(file, folder) for kind, file in files.items()}, columns, options.public, gpu,
                 options.language)


def looked_at(text: str, given: Given, folder: Path, why: str = "") -> dict[str, Look]:
    """The first rows by a description that is not written yet. Raises UserError where a run would refuse them."""
    probe = folder / f".{given.name}.init.yaml"
    write_atomic(probe, text.encode())
    try:
        source = load_source(probe)
        assert isinstance(source, Source)
        looks = look_at(source, folder, 1)
    except UserError as error:
        raise UserError(str(error).replace(str(probe), "the description")) from None
    finally:
        probe.unlink(missing_ok=True)
    for role, look in looks.items():
        if look.refused:
            hint = "; --language de, for instance, says another language" if "language" in look.refused else why
            raise UserError(f"{getattr(source, role)[0].files}: {look.refused}{hint}")
    return looks


def write(options: argparse.Namespace, root: Path) -> None:
    """Writes both files and says what to do next. Raises UserError."""
    if not PROFILE_NAME.fullmatch(options.name):
        raise UserError(f"{options.name}: a profile's name has letters, digits, _, . and -")
    folder = root / PROFILES_DIR / SOURCES_DIR
    target, spec = root / PROFILES_DIR / f"{options.name}.yaml", folder / f"{options.name}.yaml"
    if not options.force and (taken := [path for path in (target, spec) if path.exists()]):
        raise UserError(f"{taken[0].relative_to(root)}: exists already; another name, or --force")
    given = given_by(options, folder)
    if given.public:
        codec, context, size = base(given.model, root)
        tokens = {"prompt": 512, "answer": 256, "rm": 768, "sft": 768}
    else:
        entries, said = entries_of(given, folder)
        looks = looked_at(description(given, entries), given, folder)
        codec, context, size = base(given.model, root)
        tokens = lengths(codec, looks)
        limits = row_limits(tokens, context, all(look.whole for look in looks.values()))
        text = description(given, entries, limits)
        if limits:
            looks = looked_at(text, given, folder, f" (the model has {context:,} positions)")
        write_atomic(spec, text.encode())
        print(f"{spec.relative_to(root)}:")
        for role, look in looks.items():
            kept = f"{len(look.kept):,} of {'all' if look.whole else 'the first'} {look.read:,} rows"
            print(f"  {role}: {kept}{f' (not kept: {look.lost})' if look.lost else ''}: "
                  + "; ".join(mapping_of(entry) for entry in getattr(load_source(spec), role)))
        print("\n".join(said) + "\n" if said else "", end="")
    write_atomic(target, profile(given, size, context, tokens).encode())
    measured = "its lengths are guesses, for no data were read" if given.public else (
        f"95 % of the prompts have up to {tokens['prompt']} tokens, of the answers up to {tokens['answer']}")
    print(f"{target.relative_to(root)}: {given.model}, {millions(size)} parameters, {context:,} positions; {measured}")
    print(f"Next: instructflow check --profile {options.name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.tools.init"), description=(
        "Writes a profile and a source description for your own model and data."), epilog=(
        "Columns are found by their usual names; --columns prompt=ask,chosen=good says others."))
    parser.add_argument("name", help="of the profile, profiles/NAME.yaml")
    parser.add_argument("--model", help="a folder with a Hugging Face model, or a name of the hub")
    parser.add_argument("--pairs", metavar="FILE", help="comparisons: prompt, chosen, rejected (CSV, JSON Lines, ...)")
    parser.add_argument("--demonstrations", metavar="FILE", help="prompt and completion, for SFT; without: the better "
                                                                 "answers of the pairs")
    parser.add_argument("--prompts", metavar="FILE", help="prompts for PPO; without: those of the pairs")
    parser.add_argument("--text", metavar="FILE", help="pretraining text, for SFT's mix and PPO-ptx")
    parser.add_argument("--public", action="store_true", help="public sets of the Hugging Face hub instead of files")
    parser.add_argument("--columns", action="append", default=[], metavar="FIELD=COLUMN,...",
                        help=f"what your columns are called; fields: {', '.join(USUAL)}")
    parser.add_argument("--language", default="", help="ISO 639-1 code of the prompts' language (default: en)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="what it will run on")
    parser.add_argument("--yes", action="store_true", help="ask nothing: what is missing is an error")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier init")
    options = parser.parse_args()
    with one_line("init"):
        write(options, Path.cwd())


if __name__ == "__main__":
    main()
