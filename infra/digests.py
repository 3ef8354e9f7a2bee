"""Pins the images that Dockerfile, compose file and manifests name to what a registry has now.

    python -m infra.digests            writes `NAME:TAG@sha256:…`; needs docker with buildx, and reaches the registries
    python -m infra.digests --check    names the images that have no digest; exit code 1 where there are some

A tag can be moved to another image, a digest cannot. Your own image, built from infra/Dockerfile, has one once it is
pushed; write its name into infra/kubernetes/kustomization.yaml and the gpu-*.yaml first.
"""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OWN = ("instructflow:cpu", "instructflow:cuda")  # what compose builds, and kustomization.yaml replaces
EXAMPLE = "registry.example.com/"
NAMED = re.compile(r"(?m)^(?P<before>FROM |\s*(?:- )?image: )(?P<tag>[\w./-]+:[\w.-]+)"
                   r"(?P<digest>@sha256:[0-9a-f]{64})?")


def files(folder: Path) -> list[Path]:
    return [folder / "Dockerfile", folder / "compose.yaml", *sorted(folder.glob("kubernetes*/*.yaml"))]


def images(folder: Path) -> dict[str, bool]:
    """Every image of a registry that the files name, and whether all places have its digest."""
    found: dict[str, bool] = {}
    for path in files(folder):
        for match in NAMED.finditer(path.read_text()):
            if match["tag"] not in OWN:
                found[match["tag"]] = found.get(match["tag"], True) and bool(match["digest"])
    return found


def digest(tag: str) -> str:
    """The digest of what the registry has under this tag now. Raises SystemExit with one line where nobody says."""
    command = ["docker", "buildx", "imagetools", "inspect", tag, "--format", "{{.Manifest.Digest}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit("digests: the program docker is missing") from None
    said = done.stdout.strip()
    if done.returncode or not re.fullmatch(r"sha256:[0-9a-f]{64}", said):
        lines = (done.stderr or said).strip().splitlines()
        raise SystemExit(f"digests: {tag}: {lines[-1] if lines else 'no answer'}")
    return said


def write(folder: Path, digests: dict[str, str]) -> None:
    def pinned(match: re.Match[str]) -> str:
        known = digests.get(match["tag"])
        return f"{match['before']}{match['tag']}@{known}" if known else match[0]

    for path in files(folder):
        text = path.read_text()
        if (new := NAMED.sub(pinned, text)) != text:
            path.write_text(new)


def main(folder: Path = FOLDER) -> None:
    found = images(folder)
    own = sorted(tag for tag in found if tag.startswith(EXAMPLE))
    if sys.argv[1:] == ["--check"]:
        missing = sorted(tag for tag, pinned in found.items() if not pinned)
        if missing:
            raise SystemExit(f"digests: without a digest: {', '.join(missing)}")
        return
    digests = {tag: digest(tag) for tag in sorted(found) if tag not in own}
    write(folder, digests)
    for tag, known in digests.items():
        print(f"{tag}@{known}")
    for tag in own:
        print(f"digests: {tag} is an example: push your own image and write its name there", file=sys.stderr)


if __name__ == "__main__":
    main()
