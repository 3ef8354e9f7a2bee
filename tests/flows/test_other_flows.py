"""The sweep, the checks on new data and the champion's evaluation, against checkouts of shell stages."""

import asyncio
import io
import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.flows import Flow
from prefect.states import State
from rich.console import Console

import flows.champion
from flows.champion import evaluate_champion
from flows.check_data import check_data
from flows.sweep import compare_link, show, sweep
from flows.workspaces import FOLDER
from rlhf.data.schema import KEYS, write_rows
from tests.flows.checkout import Checkout
from tests.tiny_model import comparisons

SWEPT = """vars: [params.yaml]
stages:
  sft:
    cmd: echo sft >> ../../../order.log && sh sft.sh
    deps: [sft.sh]
    outs: [models/sft]
  ppo:
    foreach: ${arms}
    do:
      cmd: sh ppo.sh ${item}
      deps: [models/sft, ppo.sh]
      params: [{"profiles/${profile}.yaml": [ppo]}]
      outs: ["models/policies/${item}"]
      metrics: [{"metrics/policies/${item}.json": {cache: false}}]
"""
PPO = """set -e
goal=$(sed -n 's/.*kl_goal: //p' profiles/small.yaml)
echo $1$goal >> ../../../order.log
[ $goal != 9.0 ]
mkdir -p metrics/policies models/policies; echo "{\\"ppo/kl\\": $goal}" > metrics/policies/$1.json
echo 1 > models/policies/$1
"""


def ended(flow: Flow[..., Any], **parameters: Any) -> State[Any]:
    """The state in which the flow ends."""
    async def run() -> State[Any]:
        state: State[Any] = await flow(**parameters, return_state=True)  # type: ignore[misc]
        return state

    return asyncio.run(run())


def artifact(key: str) -> Any:
    """The newest artifact of that key."""
    async def read() -> Any:
        async with get_client() as client:
            versions = [item for item in await client.read_artifacts() if item.key == key]
            return max(versions, key=lambda item: str(item.created)).data

    data = asyncio.run(read())
    return json.loads(data) if isinstance(data, str) else data


def test_a_sweep_trains_what_is_common_once(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.stages.RETRY_DELAYS", [])
    checkout.write("dvc.yaml", SWEPT)
    checkout.write("ppo.sh", PPO)
    checkout.git()
    state = ended(sweep, kl_goals=[0.5, 9.0, 2.0], root=checkout.root)
    assert (state.name, state.message) == ("Failed", "1 of 3 runs failed")
    assert checkout.order() == ["sft", "ppo0.5", "ppo9.0", "ppo2.0"]
    rows = artifact("sweep")
    assert [row.get("KL in training") for row in rows] == ["0.5", None, "2"]
    assert rows[1]["error"] == "ppo@ppo: no message"
    assert sorted(path.name for path in (checkout.root / FOLDER).iterdir())[0] == (
        "small,kl_goal=0.5")


def test_a_sweep_names_workspaces_and_errors_whole_in_a_narrow_terminal() -> None:
    name, error = f"cpu,base_model=_home_{'long_' * 12}", f"/home/someone/{'long/' * 12}pairs.csv: no such file"
    printed = io.StringIO()
    show([{"kl_goal": 0.5, "workspace": name, "KL": "0.4"}, {"kl_goal": 1.5, "error": error}],
         Console(file=printed, width=60))
    lines = printed.getvalue().splitlines()
    assert sum(name in line for line in lines) == 1
    assert lines[-1] == f"kl_goal=1.5: {error}"


def test_a_sweep_links_mlflows_page_that_compares_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:pw@tracker:5000")
    link = compare_link("7", ["a1", "b2"])
    address, _, query = link.partition("/#/compare-runs?")
    assert address == "http://tracker:5000"  # without the login
    assert {name: json.loads(values[0]) for name, values in urllib.parse.parse_qs(query).items()} == {
        "runs": ["a1", "b2"], "experiments": ["7"]}
    assert compare_link("7", ["a1"]) == ""


@pytest.mark.parametrize(("parameters", "message"), [
    ({}, "check-data: name either a folder (data) or a description of a source (source)"),
    ({"data": "a", "source": "b"}, "check-data: name either a folder (data) or a description of a source (source)"),
    ({"data": "nowhere"}, "validate: nowhere: no such folder"),
])
def test_new_data_that_cannot_be_read(tmp_path: Path, parameters: dict[str, str], message: str) -> None:
    state = ended(check_data, root=tmp_path, **parameters)
    assert state.is_failed()
    assert str(state.message).startswith(message)


def test_new_data_s_findings_are_an_artifact(tmp_path: Path) -> None:
    values: dict[str, Any] = {"prompt_id": "p1", "user_id": "u1", "labeler_id": "l1", "source": "labeler",
                              "split": "train", "use_case": "open_qa", "prompt": "Why is the sky blue?",
                              "completion": " ", "completions": ["a", "b", "c", "d"], "ranks": [1, 2, 3, 4]}
    for name in ("sft", "rm", "ppo"):
        write_rows(tmp_path / f"{name}.jsonl", [{key: values[key] for key in KEYS[name]}])
    state = ended(check_data, data=str(tmp_path), root=tmp_path)
    assert state.is_failed()
    assert any(item["rule"] == "filled_completion" and item["row"] == 1 for item in artifact("data-findings"))


def test_new_data_by_the_name_of_their_description(tmp_path: Path) -> None:
    """Pairs, named as a profile names them; the form had no min_k, so every pair broke a rule."""
    rows = [{"prompt": question, "chosen": f"{good} ({number})", "rejected": f"{bad} ({number})"}
            for number, (question, good, bad) in enumerate(comparisons(60))]
    (tmp_path / "profiles" / "sources").mkdir(parents=True)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "profiles" / "sources" / "team.yaml").write_text("rm: [{files: ../../pairs.jsonl}]\n")
    state = ended(check_data, source="team", root=tmp_path)
    assert state.is_completed(), state.message
    state = ended(check_data, source="team", min_k=4, root=tmp_path)
    assert "completion_count 60" in str(state.message)


CHAMPION = """stages:
  evaluate:
    cmd: sh evaluate.sh
    deps: [evaluate.sh]
    params: [{profiles/small.yaml: [evaluate]}]
    metrics: [{metrics/evaluate.json: {cache: false}}]
  promote:
    cmd: touch ../../../promoted
"""


def test_the_champion_is_measured_in_a_workspace(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.write("dvc.yaml", CHAMPION)
    champion = checkout.root / "champion"
    champion.mkdir()
    checkout.write("evaluate.sh", f"mkdir -p metrics\ngrep -q 'champion: {champion}' profiles/small.yaml && "
                   "echo '{\"eval/gold_champion\": 5.5, \"eval/gold_ppo\": 6}' > metrics/evaluate.json\n")
    checkout.git()
    monkeypatch.setattr(flows.champion, "fetch", lambda checkout, params: ("3", champion))
    state = ended(evaluate_champion, root=checkout.root)
    assert state.is_completed(), state
    assert artifact("champion") == [{"metric": "eval/gold_champion", "value": "5.5"}]
    assert not (checkout.root / "promoted").exists()
    assert not (checkout.root / "metrics" / "evaluate.json").exists()


def test_without_a_champion_it_says_so(checkout: Checkout) -> None:
    checkout.git()
    state = ended(evaluate_champion, root=checkout.root)
    assert state.message == "instructflow-policy has no champion yet; a run that passes the gates makes one"
