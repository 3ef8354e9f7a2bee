"""What lies outside the checkout is linked, file by file, where a stage's record can hold it."""

import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from mlops.config import inputs, versions
from mlops.config.inputs import link_all, link_fetched, link_inputs
from mlops.config.loader import load_params
from rlhf.errors import UserError
from tests.closure import REPO


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "profiles" / "sources").mkdir(parents=True)
    (folder / "params.yaml").write_text("seed: 1\nprofile: mine\n")
    shutil.copytree(REPO / "inputs", folder / "inputs", ignore=lambda *_: set(), symlinks=True)
    return folder


def use(root: Path, **sections: Any) -> None:
    (root / "profiles" / "mine.yaml").write_text(yaml.safe_dump(sections or {"ppo": {}}))


def links(root: Path) -> dict[str, str]:
    """Path below inputs/: what the link leads to, by content."""
    return {str(path.relative_to(root / "inputs")): path.read_text() for path in sorted((root / "inputs").rglob("*"))
            if path.is_symlink()}


def model(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_profile_that_names_nothing_outside_has_no_links(root: Path) -> None:
    use(root)
    assert link_all(load_params(root), root) == []
    assert links(root) == {}
    folders = sorted(path.name for path in (root / "inputs").iterdir())
    assert folders == ["evaluate", "ingest", "pretrain", "sft", "validate"]


def test_each_file_of_a_model_is_linked_and_links_follow_the_profile(root: Path, tmp_path: Path) -> None:
    one = model(tmp_path / "one", weights="1", config="1")
    (one / "__pycache__").mkdir()
    (one / "__pycache__" / "code.pyc").write_text("no")
    use(root, pretrain={"base_model": str(one)})
    link_all(load_params(root), root)
    linked = {f"{stage}/pretrain.base_model/{name}": "1" for stage in ("pretrain", "validate")
              for name in ("weights", "config")}
    assert links(root) == linked
    (one / "weights").write_text("2")  # read through the link
    (one / "added").write_text("2")
    (one / "config").unlink()
    link_all(load_params(root), root)
    assert links(root) == {f"{stage}/pretrain.base_model/{name}": "2" for stage in ("pretrain", "validate")
                           for name in ("weights", "added")}
    other = model(tmp_path / "other", weights="3")
    use(root, pretrain={"base_model": f"../{other.name}"})  # relative to the checkout
    link_inputs("pretrain", load_params(root), root)
    assert links(root)["pretrain/pretrain.base_model/weights"] == "3"
    assert "pretrain/pretrain.base_model/added" not in links(root)
    assert link_inputs("round_ppo@r1", load_params(root), root) == []


def test_judges_further_models_and_task_rows_are_linked_by_their_names(root: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("rows")
    use(root, sft={"reward_model": str(model(tmp_path / "rm", weights="rm"))}, evaluate={
        "judge": "reward_model", "judge_model": str(model(tmp_path / "judge", weights="judge")),
        "others": {"earlier": str(model(tmp_path / "earlier", weights="earlier"))}, "task_data": {"squad": str(rows)}})
    link_all(load_params(root), root)
    assert links(root) == {
        "sft/sft.reward_model/weights": "rm", "evaluate/evaluate.judge_model/weights": "judge",
        "evaluate/evaluate.others.earlier/weights": "earlier", "evaluate/evaluate.task_data.squad/rows.jsonl": "rows"}


def test_a_sources_files_are_linked_unless_dvc_yaml_declares_their_folder(root: Path, tmp_path: Path) -> None:
    (root / "raw").mkdir()
    (root / "raw" / "own.jsonl").write_text("own")
    (tmp_path / "theirs.jsonl").write_text("theirs")
    (root / "profiles" / "sources" / "team.yaml").write_text(yaml.safe_dump({
        "sft": [{"files": "../../raw/*.jsonl"}, {"files": str(tmp_path / "*.jsonl")}]}))
    use(root, ingest={"source": "files", "spec": "team"}, pretrain={"base_model": "gpt2"})
    link_all(load_params(root), root)
    assert links(root) == {"ingest/sft[2].files/theirs.jsonl": "theirs"}


def test_files_of_one_name_in_several_folders_are_all_linked(root: Path, tmp_path: Path) -> None:
    for shard in ("x", "y"):
        model(tmp_path / "shards" / shard, **{"a.jsonl": shard})
    (root / "profiles" / "sources" / "team.yaml").write_text(yaml.safe_dump({
        "ppo": [{"files": str(tmp_path / "shards" / "*" / "a.jsonl")}]}))
    use(root, ingest={"source": "files", "spec": "team"}, pretrain={"base_model": "gpt2"})
    link_all(load_params(root), root)
    assert links(root) == {"ingest/ppo[1].files/x/a.jsonl": "x", "ingest/ppo[1].files/y/a.jsonl": "y"}


def test_a_model_in_raw_is_linked_for_the_stages_that_do_not_declare_raw(root: Path) -> None:
    model(root / "raw" / "base", weights="1")
    use(root, pretrain={"base_model": "raw/base"}, sft={"reward_model": "raw/base"},
        evaluate={"others": {"old": "raw/base"}})
    link_all(load_params(root), root)
    assert set(links(root)) == {"pretrain/pretrain.base_model/weights", "validate/pretrain.base_model/weights",
                                "sft/sft.reward_model/weights", "evaluate/evaluate.others.old/weights"}


def test_what_is_no_link_of_ours_is_never_removed(root: Path, tmp_path: Path) -> None:
    use(root)
    victim = model(tmp_path / "victim", weights="1")
    own = root / "inputs" / "evaluate" / "mine.txt"
    own.write_text("mine")
    with pytest.raises(UserError, match=r"inputs/evaluate/mine\.txt: is no link of mlops\.config\.inputs"):
        link_all(load_params(root), root)
    assert own.read_text() == "mine"
    own.unlink()
    link = root / "inputs" / "evaluate" / "mylink"
    link.symlink_to(victim)
    with pytest.raises(UserError, match="inputs/evaluate/mylink: is no link"):
        link_all(load_params(root), root)
    assert link.is_symlink()
    link.unlink()
    shutil.rmtree(root / "inputs" / "pretrain")
    (root / "inputs" / "pretrain").symlink_to(victim)
    with pytest.raises(UserError, match="inputs/pretrain: is a link, not a folder"):
        link_all(load_params(root), root)
    assert (victim / "weights").read_text() == "1"


def test_a_name_cannot_leave_the_folder(root: Path, tmp_path: Path) -> None:
    kept = model(root / "models" / "keep", weights="kept")
    other = model(tmp_path / "other", weights="other")
    use(root, evaluate={"others": {"a/../../../models/keep": str(other)}})
    link_all(load_params(root), root)
    assert (kept / "weights").read_text() == "kept"
    assert not (kept / "weights").is_symlink()
    assert list(links(root)) == ["evaluate/evaluate.others.a%2F..%2F..%2F..%2Fmodels%2Fkeep/weights"]


def test_a_folder_that_was_removed_is_made_again_as_git_knows_it(root: Path) -> None:
    use(root)
    shutil.rmtree(root / "inputs")
    link_all(load_params(root), root)
    for stage in ("ingest", "evaluate"):
        path = Path("inputs") / stage / ".gitignore"
        assert (root / path).read_text() == (REPO / path).read_text()


@pytest.mark.parametrize("path", ["models/nope", "models/x/nope", "./nope", "~/nope"])
def test_a_mistyped_path_is_not_taken_for_a_model_of_the_hub(root: Path, path: str) -> None:
    (root / "models").mkdir()
    use(root, pretrain={"base_model": path})
    said = "no such file or folder" + (r" \(~ is not expanded\)" if "~" in path else "$")
    with pytest.raises(UserError, match=said):
        link_all(load_params(root), root)


def test_a_path_that_does_not_exist_is_one_line(root: Path) -> None:
    use(root, pretrain={"base_model": "/nowhere/model"})
    with pytest.raises(UserError, match=r"pretrain\.base_model = '/nowhere/model': no such file or folder"):
        link_all(load_params(root), root)


def test_a_hub_models_commit_is_the_input(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    refs = model(tmp_path / "hub" / "models--org--name" / "refs", main="0" * 40)
    use(root, pretrain={"base_model": "org/name"})
    link_inputs("pretrain", load_params(root), root)
    assert links(root) == {"pretrain/pretrain.base_model/commit": "0" * 40}
    (refs / "main").write_text("1" * 40)  # the name stands for another commit now
    assert links(root) == {"pretrain/pretrain.base_model/commit": "1" * 40}


def test_a_hub_model_that_is_not_cached_is_said_and_nothing_is_fetched(
        root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "argv", ["inputs"])
    monkeypatch.chdir(root)
    use(root, pretrain={"base_model": "org/name"})
    inputs.main()
    said = capsys.readouterr().out
    assert said.startswith("pretrain.base_model = 'org/name': no such path; taken for a model of the hub")


def test_after_its_work_a_stage_only_adds_the_commit_of_what_it_fetched(
        root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    use(root, pretrain={"base_model": "org/name"})
    link_inputs("pretrain", load_params(root), root)
    link_fetched("pretrain", load_params(root), root)
    assert links(root) == {}
    model(tmp_path / "hub" / "models--org--name" / "refs", main="0" * 40)
    link_fetched("pretrain", load_params(root), root)
    link_fetched("pretrain", load_params(root), root)
    assert links(root) == {"pretrain/pretrain.base_model/commit": "0" * 40}
    assert link_inputs("pretrain", load_params(root), root)  # the same link
    use(root, sft={"reward_model": "/gone/meanwhile"})
    link_fetched("sft", load_params(root), root)  # says nothing: the next start does


def test_other_versions_than_those_that_made_a_model_are_found(tmp_path: Path) -> None:
    assert versions.other_versions(tmp_path) == []
    current = versions.installed()
    assert set(current) == {"torch", "transformers", "tokenizers"}
    record = tmp_path / versions.RECORD
    record.write_text("[]")
    assert versions.other_versions(tmp_path) == ["unknown versions (versions.json is damaged)"]
    record.write_text('{"torch": "1.0", "transformers": "' + current["transformers"] + '"}')
    assert versions.other_versions(tmp_path) == [f"torch 1.0 (installed: {current['torch']})"]
