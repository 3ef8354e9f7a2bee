"""Every parameter of a profile: its value, default, limits, meaning and source.

    python -m mlops.tools.params [SECTION | SECTION.NAME] [--profile NAME]
    python -m mlops.tools.params --write            docs/parameters.md, which has all of them
"""

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Any, get_type_hints

from rich.table import Table

from mlops import program
from mlops.config.loader import PROFILES_DIR, allowed, load_params, load_profile
from mlops.printing import show_table, terminal, whole
from rlhf.curation.sources.spec import Entry, RulesParams
from rlhf.errors import UserError, one_line
from rlhf.files import write_atomic
from rlhf.params import Profile


def sections() -> dict[str, type]:
    """The sections of a profile that have parameters of their own."""
    return {name: kind for name, kind in get_type_hints(Profile).items() if name != "arms"}


def default_of(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if callable(item.default_factory) else item.default


def shown(value: Any) -> str:
    """A value as it stands in a profile."""
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else str(value)


def table_of(section: str, kind: type, values: Any, only: str = "") -> Table:
    """A section's parameters; `values` is what the profile says."""
    table = Table(f"{section}.", "value", "default", "allowed", "meaning [source]", show_edge=False)
    for item in dataclasses.fields(kind):
        if only and item.name != only:
            continue
        default, value = default_of(item), getattr(values, item.name)
        text = "" if value == default else shown(value)
        table.add_row(item.name, whole(text) if isinstance(value, str) else text, shown(default),
                      allowed(kind, item.name), item.metadata["help"])
    return table


def show_arms(profile: Profile) -> None:
    """The policies that the profile trains, each with what differs from section ppo."""
    table = Table("arm", "differs from section ppo", show_edge=False)
    for arm, values in profile.arms.items():
        own = [f"{item.name} = {shown(getattr(values, item.name))}" for item in dataclasses.fields(values)
               if getattr(values, item.name) != getattr(profile.ppo, item.name)]
        table.add_row(arm + (" (promoted)" if arm == profile.promoted else ""), ", ".join(own) or "nothing")
    show_table(table, terminal())
    print("\nAn arm may change any parameter of section ppo: in profiles/, or with --set arms.NAME.PARAMETER=VALUE; "
          "`instructflow params ppo` lists them.")


PAGE = Path("docs/parameters.md")
HEAD = """# Every parameter

Made by `python -m mlops.tools.params --write` from `rlhf/params.py` and `rlhf/curation/sources/spec.py`;
`tests/test_docs.py` checks that it is current. `instructflow params SECTION` shows the same with the values of your
profile. Sources in brackets are sections of the papers: [InstructGPT](https://arxiv.org/abs/2203.02155), Ziegler et al.
([1909.08593](https://arxiv.org/abs/1909.08593)), and others where they are named.
"""
ARMS = """### `arms`

Name: what this policy changes of section `ppo`, any of its parameters. Default: `ppo: {}`.
"""
DESCRIPTIONS = """## Source descriptions: `profiles/sources/NAME.yaml`

[sources.md](sources.md) explains them with examples.
"""


def page() -> str:
    """docs/parameters.md: the sections of a profile, then the keys of a source description."""
    parts = [HEAD, "## Profiles: `profiles/NAME.yaml`\n"]
    parts += [_markdown(f"`{section}`", kind) for section, kind in sections().items()]
    parts += [ARMS, DESCRIPTIONS, _markdown("An entry of `sft`, `rm`, `ppo` or `corpus`", Entry),
              _markdown("`rules`", RulesParams)]
    return "\n".join(parts)


def _markdown(title: str, kind: type) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    rows = [f"| `{item.name}` | {cell(f'`{shown(default_of(item))}`')} | {cell(allowed(kind, item.name))} | "
            f"{cell(item.metadata['help'])} |" for item in dataclasses.fields(kind)]
    return "\n".join([f"### {title}\n", "| parameter | default | allowed | meaning |", "|---|---|---|---|", *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.tools.params"), description=(
        "Every parameter: the profile's value where it differs, default, limits, meaning and source."))
    parser.add_argument("section", nargs="?", help=(
        f"one of {', '.join(sections())}, arms, or SECTION.NAME; without: all"))
    parser.add_argument("--profile", help="the profile whose values are shown (default: that of params.yaml)")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    options = parser.parse_args()
    if options.write:
        write_atomic(PAGE, page().encode())
        print(PAGE)
        return
    with one_line("params"):
        path = Path(PROFILES_DIR) / f"{options.profile}.yaml"
        profile = load_profile(path) if options.profile else load_params().stages
        section, _, name = (options.section or "").partition(".")
        if section == "arms":
            show_arms(profile)
            return
        if section and section not in sections():
            close = difflib.get_close_matches(section, sections(), n=1)
            raise UserError(f"{section}: no such section; " + (f"did you mean {close[0]}?" if close else
                                                               f"sections: {', '.join(sections())}"))
        for each, kind in sections().items():
            if section and each != section:
                continue
            names = [item.name for item in dataclasses.fields(kind)]
            if name and name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                raise UserError(f"{section}.{name}: no such parameter; " + (
                    f"did you mean {close[0]}?" if close else f"parameters: {', '.join(names)}"))
            show_table(table_of(each, kind, getattr(profile, each), name), terminal())
            print()
        print("Change one: in profiles/, or for a run of its own `instructflow run --set SECTION.NAME=VALUE`.")


if __name__ == "__main__":
    main()
