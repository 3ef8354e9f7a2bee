"""Failure drills on real servers: what dies, and that nothing is lost. `make drills`; docs/reliability.md."""

import time
from collections.abc import Iterator
from uuid import UUID

import pytest
from prefect.states import Scheduled

from flows.execution import TAKEN_UP
from flows.workspaces import FOLDER
from tests.flows.checkout import alive
from tests.infra.site import Site, engine_of, kill, wait
from tests.infra.stores import answer

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.control("up", "--detach")
        yield site
    finally:
        site.control("down")


@pytest.fixture
def site(running: Site, request: pytest.FixtureRequest) -> Iterator[Site]:
    running.reset(request.node.name)
    yield running
    running.finish()


def finished(site: Site) -> bool:
    """Both stages' outputs are those of a run that nothing disturbed."""
    content = (site.root / "content").read_text()
    return all((site.root / "models" / stage).read_text() == f"{stage} {content}\n" for stage in ("sft", "ppo"))


def starts_again_and_completes(site: Site, run: UUID) -> None:
    wait(lambda: site.order().count("sft began") == 2, "a second start")
    site.let_go()
    site.ends(run, "Completed")
    assert finished(site)


def test_started_twice_there_is_one(site: Site) -> None:
    before = site.service("prefect")
    assert "already running" in site.control("up", "--detach")
    assert site.service("prefect") == before


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_killed_stage_is_tried_again(site: Site, stage: str) -> None:
    run = site.begin()
    if stage == "ppo":
        site.pid("sft")
        site.let_go()
        wait(lambda: "sft ended" in site.order(), "sft")
        (site.root / "go").unlink()
    pid = site.pid(stage)
    kill(pid)
    wait(lambda: site.order().count(f"{stage} began") == 2, "a second try")
    site.let_go()
    site.ends(run, "Completed")
    assert finished(site)


def test_a_killed_flow_is_taken_up_again(site: Site) -> None:
    run = site.begin()
    pid = site.pid("sft")
    kill(engine_of(run))
    wait(lambda: site.order().count("sft began") == 2, "a second start")
    assert not alive(pid)  # the first stage ended with its flow: no training runs beside its successor
    site.let_go()
    assert site.ends(run, "Completed").run_count == 2
    assert finished(site)
    assert sorted(site.tasks_of(run)) == [("ppo", "Completed"), ("sft", "Completed"), ("sft", "Crashed")]


def test_a_dead_worker_s_run_is_taken_up_again(site: Site) -> None:
    """Worker and flow die at once, as with their machine: nobody can report it, the silence is noticed."""
    run = site.begin()
    site.pid("sft")
    time.sleep(35)  # the first sign of life
    engine = engine_of(run)
    kill(site.service("worker-cpu"))
    kill(engine)
    starts_again_and_completes(site, run)


def test_prefect_killed_in_the_middle(site: Site) -> None:
    run = site.begin()
    site.pid("sft")
    before = site.service("prefect")
    kill(before)
    wait(lambda: site.service("prefect") not in (0, before), "a new server")
    site.let_go()
    site.ends(run, "Completed")
    assert finished(site)
    assert site.order() == ["sft began", "sft ended", "ppo began", "ppo ended"]


def test_mlflow_killed_in_the_middle(site: Site) -> None:
    run = site.begin()
    site.pid("sft")
    before = site.service("mlflow")
    kill(before)
    site.let_go()
    site.ends(run, "Completed")
    wait(lambda: site.service("mlflow") not in (0, before), "a new server")


def test_a_killed_mlflow_leaves_no_process_beside_its_successor(site: Site) -> None:
    before = site.service("mlflow")
    group = site.group(before)
    kill(before)
    wait(lambda: site.service("mlflow") not in (0, before), "a new server")
    assert not [pid for pid in group if alive(pid)]
    wait(lambda: answer(f"{site.links.mlflow}/health") == 200, "its answer")


def test_stopped_right_after_mlflow_was_killed_nothing_is_left(site: Site) -> None:
    group = site.group(site.service("mlflow"))
    kill(group[0])
    site.control("down")
    left = [pid for pid in group if alive(pid)]
    site.control("up", "--detach")
    assert not left


def test_servers_stopped_in_the_middle(site: Site) -> None:
    run = site.begin()
    pid = site.pid("sft")
    site.control("down")
    assert not alive(pid)
    assert "goes on from its checkpoint" in site.control("up", "--detach")
    starts_again_and_completes(site, run)


def test_cancelling_ends_the_stage(site: Site) -> None:
    run = site.begin()
    pid = site.pid("sft")
    site.cancel(run)
    wait(lambda: not alive(pid), "the stage's end")
    site.ends(run, "Cancelled")
    time.sleep(3)
    assert site.order() == ["sft began"]  # not taken up again


@pytest.mark.parametrize("end", ["Completed", "Cancelled"])
def test_a_run_that_has_ended_is_not_done_again(site: Site, end: str) -> None:
    """On a busy server its last event came after the automation had given it up: it was scheduled again."""
    run = site.begin()
    site.pid("sft")
    if end == "Cancelled":
        site.cancel(run)
    else:
        site.let_go()
    site.ends(run, end)
    before = site.order()
    site.ask(lambda client: client.set_flow_run_state(run, Scheduled(name=TAKEN_UP)))
    wait(lambda: site.run_of(run).run_count == 2 and site.run_of(run).state_name == end, "the same end")
    assert site.order() == before


def test_a_failure_is_told(site: Site) -> None:
    site.write("fail", "")
    run = site.begin()
    ended = site.ends(run, "Failed")
    assert str(ended.state.message if ended.state else "") == "sft: no luck"
    wait(lambda: any("no luck" in item["text"] for item in site.notices.got), "the notice")
    notice = next(item for item in site.notices.got if "no luck" in item["text"])
    assert notice["subject"] == f"pipeline / {ended.name}: Failed"
    assert f"{site.links.prefect}/runs/flow-run/{run}" in notice["text"]


def test_two_runs_in_one_checkout_wait_for_each_other(site: Site) -> None:
    first, second = site.begin(), site.begin()
    site.pid("sft")
    wait(lambda: site.run_of(second).state_name == "Running" and site.run_of(first).state_name == "Running", "both")
    site.let_go()
    site.ends(first, "Completed")
    site.ends(second, "Completed")
    assert site.order() == ["sft began", "sft ended", "ppo began", "ppo ended"]  # the second found all done
    assert finished(site)


def test_one_training_at_a_time_over_all_runs(site: Site) -> None:
    """Two workspaces do not wait for each other's folder, but for the slot."""
    runs = [site.begin(seed=5), site.begin(seed=6)]
    workspaces = [FOLDER / f"small,seed={seed}" for seed in (5, 6)]
    wait(lambda: any((site.root / workspace / "sft.pid").exists() for workspace in workspaces), "one to begin")
    time.sleep(10)
    assert sum((site.root / workspace / "sft.pid").exists() for workspace in workspaces) == 1
    site.let_go()
    for run in runs:
        site.ends(run, "Completed")
