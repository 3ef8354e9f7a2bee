"""`instructflow init`: a profile and a description that load, from what people have; mistakes are one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlops.config.loader import load_profile
from mlops.config.sources import load_source
from rlhf.curation.preview import look_at
from rlhf.curation.sources.spec import Source
from tests.flows.checkout import REPOSITORY
from tests.tiny_model import comparisons, write_model, write_pairs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in ("gpt2", "llama")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "checkout"
    (made / "profiles" / "sources").mkdir(parents=True)
    (made / "params.yaml").write_text("seed: 1\nprofile: cpu\n")
    return made


def init(root: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mlops.tools.init", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(root.parent)})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_pairs_alone_give_all_three_roles(root: Path, models: dict[str, Path], kind: str) -> None:
    write_pairs(root.parent / "pairs.csv", 300)
    done = init(root, "team", "--model", models[kind], "--pairs", "../pairs.csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Next: instructflow check --profile team"
    profile = load_profile(root / "profiles" / "team.yaml")
    assert (profile.judge.share, profile.sft.pretrain_mix, profile.validate.counts) == (0.5, 0, "none")
    arm = profile.arms["ppo"]
    assert arm.max_prompt_tokens + arm.max_new_tokens <= (128 if kind == "gpt2" else 256)
    source = load_source(root / "profiles" / "sources" / "team.yaml")
    assert isinstance(source, Source)
    assert source.rm[0].columns == {"prompt": "question", "chosen": "better", "rejected": "worse"}
    for entry in (source.sft[0], source.ppo[0]):
        assert (entry.columns, entry.from_rankings) == (source.rm[0].columns, True)


def test_files_of_their_own_for_each_role(root: Path, models: dict[str, Path]) -> None:
    folder = root.parent
    pairs = [{"input": {"text": "x"}, "prompt": [{"role": "user", "content": question}],
              "chosen": [{"role": "assistant", "content": good}], "rejected": [{"role": "assistant", "content": bad}]}
             for question, good, bad in comparisons(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "shown.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": question}, {"role": "assistant", "content": good}]}) + "\n"
        for question, good, _ in comparisons(60, seed=2)))
    (folder / "asked.csv").write_text("Instruction\n" + "".join(f"{row[0]}\n" for row in comparisons(60, seed=3)))
    (folder / "text.jsonl").write_text('{"text": "The cat lives."}\n' * 50)
    done = init(root, "team", "--model", models["gpt2"], "--pairs", folder / "pairs.jsonl", "--demonstrations",
                folder / "shown.jsonl", "--prompts", folder / "asked.csv", "--text", folder / "text.jsonl")
    assert done.returncode == 0, done.stderr
    content = yaml.safe_load((root / "profiles" / "sources" / "team.yaml").read_text())
    assert content["sft"][0]["columns"] == {"messages": "messages"}
    assert content["ppo"][0]["columns"] == {"prompt": "Instruction"}
    assert content["corpus"][0]["columns"] == {"text": "text"}
    assert load_profile(root / "profiles" / "team.yaml").sft.pretrain_mix == 0.1


def test_whole_transcripts_as_hh_rlhf_has_them(root: Path, models: dict[str, Path]) -> None:
    rows = [{name: f"\n\nHuman: {question}\n\nAssistant: {answer}" for name, answer in (
        ("chosen", good), ("rejected", bad))} for question, good, bad in comparisons(60)]
    (root.parent / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = init(root, "team", "--model", models["gpt2"], "--pairs", "../hh.jsonl")
    assert done.returncode == 0, done.stderr
    content = yaml.safe_load((root / "profiles" / "sources" / "team.yaml").read_text())
    entry = {"files": str(root.parent / "hh.jsonl"), "layout": "hh_rlhf"}
    assert (content["rm"], content["sft"]) == ([entry], [entry | {"from_rankings": True}])
    (root.parent / "shown.jsonl").write_text("".join(json.dumps({"q": row[0], "a": row[1]}) + "\n"
                                                     for row in comparisons(60, seed=2)))
    done = init(root, "team", "--model", models["gpt2"], "--pairs", "../hh.jsonl", "--demonstrations", "../shown.jsonl",
                "--columns", "prompt=q,completion=a", "--force")
    assert done.returncode == 0, done.stderr
    content = yaml.safe_load((root / "profiles" / "sources" / "team.yaml").read_text())
    assert (content["rm"], content["ppo"]) == ([entry], [entry | {"from_rankings": True}])
    assert content["sft"][0]["columns"] == {"prompt": "q", "completion": "a"}


def template(model: Path, folder: Path, text: str) -> Path:
    """The model with a chat template of its own."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(text)
    return folder


def test_rows_that_the_template_refuses_are_taken_out(root: Path, models: dict[str, Path]) -> None:
    """Gemma's template knows no system turn."""
    gemma = template(models["llama"], root.parent / "gemma", (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"))
    rows = [{"system": "Be short." if number % 10 == 0 else "", "prompt": question, "chosen": good, "rejected": bad}
            for number, (question, good, bad) in enumerate(comparisons(200))]
    (root.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = init(root, "team", "--model", gemma, "--pairs", "../pairs.jsonl")
    assert done.returncode == 0, done.stderr
    spec = root / "profiles" / "sources" / "team.yaml"
    source = load_source(spec)
    assert isinstance(source, Source)
    assert source.rules.tokenizer == str(gemma)
    looks = look_at(source, spec.parent, 1)
    assert 0 < len(looks["rm"].kept) < 190
    assert not [row for look in looks.values() for row in look.kept if isinstance(row["prompt"], list)]


def test_rows_beyond_the_models_positions_are_dropped(root: Path, models: dict[str, Path]) -> None:
    rows = [{"prompt": question, "chosen": f"{good} " * (40 if number % 25 == 0 else 1), "rejected": bad}
            for number, (question, good, bad) in enumerate(comparisons(200))]
    (root.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = init(root, "team", "--model", models["gpt2"], "--pairs", "../pairs.jsonl")
    assert done.returncode == 0, done.stderr
    rules = yaml.safe_load((root / "profiles" / "sources" / "team.yaml").read_text())["rules"]
    assert rules["max_prompt_tokens"] + rules["max_completion_tokens"] == 128
    assert rules["tokenizer"] == str(models["gpt2"])


@pytest.mark.parametrize(("arguments", "said"), [
    (["--pairs", "../none.csv"], "none.csv: no such file"),
    (["--pairs", "../other.csv"], "which column is the prompt? Say --columns prompt=NAME; columns: ask, good, bad"),
    (["--pairs", "../pairs.csv", "--columns", "prompt=ask"], "has no column ask for prompt; columns: question, better"),
    (["--pairs", "../pairs.csv", "--columns", "ask"], "--columns ask: must be FIELD=COLUMN"),
    (["--pairs", "../empty.csv"], "empty.csv"),
    ([], "--pairs FILE is needed"),
    (["--pairs", "../pairs.csv", "--model", "../nothing"], "--model ../nothing: no such folder"),
    (["--pairs", "../pairs.csv", "--model", ""], "--model is needed"),
])
def test_a_mistake_is_one_line_and_nothing_is_written(root: Path, models: dict[str, Path], arguments: list[str],
                                                      said: str) -> None:
    write_pairs(root.parent / "pairs.csv", 60)
    write_pairs(root.parent / "other.csv", 60, ("ask", "good", "bad"))
    (root.parent / "empty.csv").write_text("")
    model = [] if "--model" in arguments else ["--model", str(models["gpt2"])]
    done = init(root, "team", *model, *arguments)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((root / "profiles").rglob("*.yaml"))


def test_what_is_there_stays(root: Path, models: dict[str, Path]) -> None:
    write_pairs(root.parent / "pairs.csv", 60)
    (root / "profiles" / "team.yaml").write_text("mine: 1\n")
    done = init(root, "team", "--model", models["gpt2"], "--pairs", "../pairs.csv")
    assert (done.returncode, done.stderr) == (2, "init: profiles/team.yaml: exists already; another name, or --force\n")
    assert (root / "profiles" / "team.yaml").read_text() == "mine: 1\n"
    assert init(root, "team", "--model", models["gpt2"], "--pairs", "../pairs.csv", "--force").returncode == 0


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_separators_of_csv(root: Path, models: dict[str, Path], mark: str) -> None:
    rows = [row for row in comparisons(60) if not any(mark in text for text in row)]
    (root.parent / "pairs.csv").write_text("\ufeffquestion" + mark + "better" + mark + "worse\n" + "".join(
        mark.join(row) + "\n" for row in rows), encoding="utf-8")
    done = init(root, "team", "--model", models["gpt2"], "--pairs", "../pairs.csv")
    assert done.returncode == 0, done.stderr
    source = load_source(root / "profiles" / "sources" / "team.yaml")
    assert isinstance(source, Source)
    assert [entry.delimiter for entry in (*source.sft, *source.rm, *source.ppo)] == [mark] * 3


def test_prompts_in_another_language(root: Path, models: dict[str, Path]) -> None:
    rows = [(f"Wo lebt die Katze mit der Nummer {number}, und was frisst sie am liebsten?", "Im Wald, beim alten Haus.",
             "Nein.") for number in range(100)]
    (root.parent / "pairs.jsonl").write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row,
                                                                         strict=True))) + "\n" for row in rows))
    done = init(root, "team", "--model", models["gpt2"], "--pairs", "../pairs.jsonl")
    assert (done.returncode, "--language de, for instance" in done.stderr) == (2, True)
    done = init(root, "team", "--model", models["gpt2"], "--pairs", "../pairs.jsonl", "--language", "de")
    assert "other_language" not in done.stderr


def test_public_sets(root: Path, models: dict[str, Path]) -> None:
    (root / "profiles" / "sources" / "public.yaml").write_bytes(
        (REPOSITORY / "profiles" / "sources" / "public.yaml").read_bytes())
    done = init(root, "first", "--model", models["llama"], "--public", "--device", "gpu")
    assert done.returncode == 0, done.stderr
    profile = load_profile(root / "profiles" / "first.yaml")
    assert (profile.ingest.source, profile.ingest.spec, profile.ppo.batch_size) == ("hub", "public", 256)
