"""The arms of PPO in params.yaml, where dvc.yaml reads which policies there are: those of the profile.

    python -m mlops.config.arms [--profile NAME]     # another profile, its arms and the one that is promoted

A profile's section `arms` names the policies and what each changes of section `ppo`; DVC unrolls a list of params.yaml
only. What arms that are gone have made is removed: stage evaluate depends on the folders of all arms. DVC's cache and
git keep it.
"""

import argparse
import re
import shutil
from pathlib import Path

from mlops.config.loader import PARAMS_FILE, PROFILES_DIR, as_yaml, load_params, load_profile, read_yaml
from mlops.config.paths import POLICIES, POLICY_METRICS
from mlops.config.record import recorded
from rlhf.errors import UserError, one_line
from rlhf.files import write_atomic


def write_arms(root: Path, profile: str | None = None) -> None:
    """Rewrites the lines `profile`, `arms` and `promoted` of params.yaml, and only them, where they are not as wanted;
    removes what other arms have made. Raises UserError."""
    path = root / PARAMS_FILE
    text = path.read_text(encoding="utf-8")
    if profile is not None:
        text, count = re.subn(r"(?m)^(profile:[ \t]*)[^\s#]+", rf"\g<1>{profile}", text)
        if count != 1:
            raise UserError(f"{path}: expected one line `profile: NAME`, found {count}")
    found = load_profile(root / PROFILES_DIR / f"{profile or read_yaml(path)['profile']}.yaml")
    for name, value in (("promoted", found.promoted), ("arms", list(found.arms))):
        if read_yaml(path).get(name) != value:
            text = _with_line(text, name, f"{name}: {as_yaml(value)}\n")
    if text != path.read_text(encoding="utf-8"):
        write_atomic(path, text.encode())
    remove_leftovers(root, list(found.arms))


def _with_line(text: str, name: str, line: str) -> str:
    """The text with this line in the place of the key's present value, else after the profile's line."""
    present = rf"(?ms)^{name}:[^\n]*\n?(?:[ \t-][^\n]*\n?)*"
    if re.search(present, text):
        return re.sub(present, line, text, count=1)
    return re.sub(r"(?m)^profile:.*$\n?", lambda found: found[0].rstrip("\n") + "\n" + line, text, count=1)


def leftovers(root: Path, arms: list[str]) -> list[Path]:
    """What lies in the arms' folders and is no arm's."""
    return [path for folder in (POLICIES, POLICY_METRICS) for path in sorted((root / folder).glob("*"))
            if (path.name if folder == POLICIES else path.stem) not in arms]


def refuse_leftovers(root: Path, arms: list[str]) -> None:
    """Raises UserError where the arms' folders hold what no arm has made."""
    for path in leftovers(root, arms):
        raise UserError(f"{path.relative_to(root)}: is of no arm of the profile ({', '.join(arms)}); "
                        "`python -m mlops.config.arms` removes what earlier arms have made")


def remove_leftovers(root: Path, arms: list[str]) -> None:
    """Removes what earlier arms have made, as dvc.lock records it. Raises UserError for anything else: it is
    somebody's, and stays."""
    found = leftovers(root, arms)
    known = recorded(root) if found else {}
    for path in found:
        if path.relative_to(root).as_posix() not in known and path.suffix != ".partial":
            raise UserError(f"{path.relative_to(root)}: is of no arm ({', '.join(arms)}) and not in dvc.lock; move it")
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlops.config.arms", description=(
        "Writes the profile's arms, and with --profile its name, into params.yaml."))
    parser.add_argument("--profile", metavar="NAME", help="the file of profiles/ to use from now on")
    options = parser.parse_args()
    with one_line("arms"):
        write_arms(Path(), options.profile)
        params = load_params()
    print(f"profile: {params.profile}\narms: {as_yaml(list(params.stages.arms))}\npromoted: {params.stages.promoted}")


if __name__ == "__main__":
    main()
