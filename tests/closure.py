"""What a module imports, directly or not: read from the code, so that imports inside functions count too."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "tasks", "mlops", "rlhf")


def file_of(module: str, root: Path = REPO) -> Path | None:
    """The file of a module of this project; None for anything else."""
    path = root.joinpath(*module.split("."))
    if module.split(".")[0] not in PACKAGES:
        return None
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _names(file: Path) -> Iterator[str]:
    """Every module that a file's import statements may mean, whatever function they stand in, but for those that only
    a type checker reads."""
    typing_only = {id(inner) for node in ast.walk(parsed(file)) if isinstance(node, ast.If)
                   and ast.unparse(node.test).endswith("TYPE_CHECKING") for part in node.body
                   for inner in ast.walk(part)}
    for node in ast.walk(parsed(file)):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # the name may be a module


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _templates(file: Path) -> Iterator[Path]:
    """Files beside a module that it names in a text: Jinja templates."""
    for node in ast.walk(parsed(file)):
        named = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if named.endswith(".j2") and (file.parent / named).is_file():
            yield file.parent / named


def closure(module: str, root: Path = REPO, leave_out: tuple[str, ...] = ()) -> set[str]:
    """The files of all that `module` imports and of itself, relative to the checkout, packages' own files included.

    What begins with a path of `leave_out` is left out, and so is what only it imports.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        parts = waiting.pop().split(".")
        for count in range(1, len(parts) + 1):
            file = file_of(".".join(parts[:count]), root)
            name = "" if file is None else str(file.relative_to(root))
            if file is None or name in found or name.startswith(leave_out):
                continue
            found.add(name)
            waiting += _names(file)
            found |= {str(path.relative_to(root)) for path in _templates(file)}
    return found
