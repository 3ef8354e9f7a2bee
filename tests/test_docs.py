"""What the documentation points at exists: code, tests, files."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mlops.tools.params import page as params_page

REPO = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"`((?:rlhf|mlops|tasks|flows|infra|tests|bench)/[\w/]+\.py)(?::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


PAGES = [*sorted((REPO / "docs").rglob("*.md")), *sorted(REPO.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_place_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, name in PLACE.findall(text):
        code = REPO / file
        assert code.is_file(), file
        if name:
            assert re.search(rf"(def|class) {name}\b|^\s*{name}:", code.read_text(), re.MULTILINE), f"{file}:{name}"
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), target


def test_the_table_of_faults_names_a_test_in_each_row() -> None:
    text = (REPO / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text[text.index("| fault |"):].splitlines()[2:] if line.startswith("| ")]
    faults = [row for row in rows if not row.startswith("| **")]
    assert len(faults) >= 50
    for row in faults:
        test = re.search(r"`([\w/]+\.py)::(test_\w+)`", row)
        if test is None:
            assert "the same" in row, row
            continue
        code = (REPO / "tests" / test[1]).read_text(encoding="utf-8")
        assert re.search(rf"^def {test[2]}\b", code, re.MULTILINE), row


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_and_variable_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:infra|flows|tasks|mlops)[.\w]*[a-z])", text):
        assert (REPO / f"{module.replace('.', '/')}.py").is_file(), module
    for script in re.findall(r"(?:python |`)(bench/[\w/]+)", text):
        assert (REPO / script).exists() or (REPO / f"{script}.py").is_file(), script
    folders = ("infra", "flows", "tasks", "mlops", "rlhf", "tests/rlhf")
    code = "".join(file.read_text(encoding="utf-8") for folder in folders for file in (REPO / folder).rglob("*.py"))
    for variable in re.findall(r"INSTRUCTFLOW_[A-Z_]+[A-Z]", text):
        assert re.search(f"[\"']{variable}[\"']", code), variable
        assert not re.search("MIRROR|_LINE$", variable), f"{variable}: an old name"


def test_the_table_of_details_names_code_and_a_test_in_each_row() -> None:
    rows = [line for line in (REPO / "docs" / "details.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 12
    for row in rows:
        places = [file for file, _ in PLACE.findall(row)]
        assert any(file.startswith("rlhf/") for file in places), row
        assert any(file.startswith("tests/") for file in places), row


@pytest.mark.parametrize("package", ["infra", "flows", "tasks", "mlops", "rlhf", "bench"])
def test_the_readme_tree_shows_each_python_file_and_no_other(package: str) -> None:
    """A line without indentation names a folder, an indented one names files or folders in it."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("## The tree"):].split("```")[1]
    shown, folder = set(), ""
    for line in filter(None, tree.splitlines()):
        if not line.startswith(" "):
            folder = line.split()[0]
        shown |= {f"{folder}{name}" for name in re.split(r" {4,}", line.strip())[0].split() if name.endswith(".py")}
    files = {file.relative_to(REPO).as_posix() for file in (REPO / package).rglob("*.py")
             if file.name != "__init__.py" and "versus" not in file.parts}
    assert {file for file in shown if file.startswith(f"{package}/")} == files


def test_the_table_of_rules_says_what_the_suites_check() -> None:
    from mlops.validation.suites import RULES, WARNINGS, cross_rules, model_rules, name_of
    from rlhf.params import ValidateParams

    limits = ValidateParams()
    rules = [item for some in (replace(limits, counts="none"), limits) for name in ("ppo", "rm", "sft")
             for item in RULES[name](1.0, some)]
    rows = {name_of(item): item for item in [*rules, *cross_rules(limits), *model_rules(2048)]}
    text = (REPO / "docs" / "validation.md").read_text(encoding="utf-8")
    table = {}
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 5 and cells[0].startswith("`"):
            table[cells[0].strip("`")] = cells[2:]
    assert table.keys() == rows.keys()
    for name, item in rows.items():
        assert item.description is not None
        assert item.meta is not None
        _, sentence = item.description.split(": ", 1)
        severity = "warn" if name in WARNINGS else "stop"
        assert table[name] == [sentence, severity, item.meta["fix"]], name


FORMULAS = {
    "PPO loss": "rlhf/ppo/trainer.py:policy_loss", "GAE": "rlhf/ppo/trainer.py:advantages_and_returns",
    "K-way loss": "rlhf/losses.py:ranking_loss", "β rule": "rlhf/ppo/kl_controller.py:StepBeta",
    "ptx": "rlhf/ppo/trainer.py:add_ptx", "EMA": "rlhf/ppo/trainer.py:update_average",
    "stop rule of sampling": "rlhf/model/sampling.py:finished",
    "alignment tax": "rlhf/evaluation/metrics.py:tax_metrics"}


@pytest.mark.parametrize(("formula", "place"), FORMULAS.items())
def test_the_design_page_leads_to_each_formula_in_one_hop(formula: str, place: str) -> None:
    text = (REPO / "docs" / "design.md").read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if line.startswith(f"| {formula}")]
    assert f"`{place}`" in row


def test_ppo_is_read_in_one_sitting() -> None:
    """The file reads from rewards to losses to one step, and no function of the project is longer than 70 lines."""
    text = (REPO / "rlhf" / "ppo" / "trainer.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    order = ["def token_rewards", "def advantages_and_returns", "def policy_loss", "def value_loss", "def step"]
    places = [text.index(name) for name in order]
    assert places == sorted(places)


@pytest.mark.parametrize("package", ["rlhf", "mlops", "tasks", "flows", "infra"])
def test_no_function_is_longer_than_seventy_lines(package: str) -> None:
    for file in sorted((REPO / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 70, f"{file.relative_to(REPO)}:{node.name}"


def test_the_page_of_parameters_is_current() -> None:
    assert (REPO / "docs" / "parameters.md").read_text(encoding="utf-8") == params_page()


def test_every_error_line_of_the_troubleshooting_page_is_in_the_code() -> None:
    folders = ("infra", "flows", "tasks", "mlops", "rlhf")
    code = "\n".join(file.read_text(encoding="utf-8") for folder in folders for file in (REPO / folder).rglob("*.py"))
    joined = re.sub(r"\"\s*\n?\s*f?\"", "", code)  # a message may be written over several lines
    text = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([^`]+)`", text.partition("## Results")[0], re.MULTILINE)
    assert len(lines) >= 35
    for line in lines:
        for part in (item.strip() for item in re.split("…|NAME", line)):
            assert len(part) < 4 or part in joined, f"{line}: no error says {part!r}"


@pytest.mark.parametrize("name", ["README.md", "tutorial.md"])
def test_the_japanese_pages_have_the_commands_of_the_english_ones(name: str) -> None:
    english = REPO / ("README.md" if name == "README.md" else f"docs/{name}")
    blocks = [re.findall(r"^```\w*\n.*?^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
              for page in (REPO / "docs" / "ja" / name, english)]
    assert blocks[0]
    assert blocks[0] == blocks[1][:len(blocks[0])]


# What this project once called things that have a name in the field, which is what readers of docs and logs know.
PRIVATE_WORDS = re.compile(r"\b(mirror(s|ed|ing)?|kept_passes|roll_out|lay_out|leftover|turned together|asked where|"
                           r"looked at its rollouts|line of the run|the line's (stages|parameters))\b", re.IGNORECASE)


def test_docs_logs_and_errors_have_the_fields_words() -> None:
    """docs/operations.md keeps a table of old names, README's tree says that tests mirror it."""
    for page in [REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8").partition("## Modules and names that have moved")[0]
        found = [item[0] for item in PRIVATE_WORDS.finditer(text.replace("mirrors the tree", ""))]
        assert not found, f"{page.relative_to(REPO)}: {found}"
    for folder in ("infra", "flows", "tasks", "mlops", "rlhf"):
        for file in sorted((REPO / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                    assert not PRIVATE_WORDS.search(node.value), f"{file.relative_to(REPO)}: {node.value}"
