"""Every parameter of a profile: its value, default, limits, meaning and source.

    python -m mlops.tools.params [SECTION | SECTION.NAME] [--profile NAME]
"""

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table

from mlops import program
from mlops.config.loader import PROFILES_DIR, allowed, load_params, load_profile
from rlhf.errors import UserError, one_line
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
        table.add_row(item.name, "" if value == default else shown(value), shown(default), allowed(kind, item.name),
                      item.metadata["help"])
    return table


def show_arms(profile: Profile) -> None:
    """The policies that the profile trains, each with what differs from section ppo."""
    table = Table("arm", "differs from section ppo", show_edge=False)
    for arm, values in profile.arms.items():
        own = [f"{item.name} = {shown(getattr(values, item.name))}" for item in dataclasses.fields(values)
               if getattr(values, item.name) != getattr(profile.ppo, item.name)]
        table.add_row(arm + (" (promoted)" if arm == profile.promoted else ""), ", ".join(own) or "nothing")
    Console(highlight=False, markup=False).print(table)
    print("\nAn arm may change any parameter of section ppo: in profiles/, or with --set arms.NAME.PARAMETER=VALUE; "
          "`instructflow params ppo` lists them.")


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("mlops.tools.params"), description=(
        "Every parameter: the profile's value where it differs, default, limits, meaning and source."))
    parser.add_argument("section", nargs="?", help=(
        f"one of {', '.join(sections())}, arms, or SECTION.NAME; without: all"))
    parser.add_argument("--profile", help="the profile whose values are shown (default: that of params.yaml)")
    options = parser.parse_args()
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
            Console(highlight=False, markup=False).print(table_of(each, kind, getattr(profile, each), name))
            print()
        print("Change one: in profiles/, or for a run of its own `instructflow run --set SECTION.NAME=VALUE`.")


if __name__ == "__main__":
    main()
