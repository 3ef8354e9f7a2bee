"""What programs expect of the account that runs them, where it has no name (`--user 12345`) or no home of its own."""

import os
import pwd
from collections.abc import MutableMapping
from pathlib import Path

HOME = Path("scratch/home")  # of the folder where a flow or server starts


def complete_account(environment: MutableMapping[str, str], here: Path) -> None:
    """Gives the environment a user name and folders that can be written, where the account has none.

    DVC asks for the name, Prefect, Hugging Face and matplotlib for folders in the home. A home that exists and cannot
    be written stays the home: git and ssh read their settings there.
    """
    try:
        entry = pwd.getpwuid(os.getuid())
        name, home = entry.pw_name, entry.pw_dir
    except KeyError:
        name, home = f"uid{os.getuid()}", ""
        if not any(environment.get(variable) for variable in ("LOGNAME", "USER")):
            environment["USER"] = name
    home = environment.get("HOME") or home
    if home and (os.access(home, os.W_OK | os.X_OK) or can_make(Path(home))):
        return
    own = (here / HOME).resolve()
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # flows/preflight.py says that the checkout cannot be written
    if not home or not Path(home).is_dir():
        environment["HOME"] = str(own)
        return
    hub = Path(home) / ".cache" / "huggingface"
    if hub.is_dir() and "XDG_CACHE_HOME" not in environment:
        environment.setdefault("HF_HOME", str(hub))
    for variable, folder in {"PREFECT_HOME": ".prefect", "XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config",
                             "MPLCONFIGDIR": ".config/matplotlib"}.items():
        environment.setdefault(variable, str(own / folder))


def can_make(folder: Path) -> bool:
    """Whether a folder that is not there can be made."""
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return above != folder.absolute() and above.is_dir() and os.access(above, os.W_OK | os.X_OK)
