"""Every parameter of the profile with its value, defaults filled in: build/parameters.yaml, which DVC compares.

A profile lists only what differs. A stage is up to date as long as its sections of this file stay the same; `source` is
the description of the data that the profile names, for ingest.
"""

from pathlib import Path

from mlops.config.loader import load_params, write_resolved
from rlhf.errors import one_line


def main() -> None:
    root = Path.cwd()
    with one_line("parameters"):
        write_resolved(load_params(root).stages, root)


if __name__ == "__main__":
    main()
