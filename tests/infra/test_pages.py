"""What people see in Prefect's and MLflow's pages, in a real browser: their own settings after a restart, runs that did
not end well, a sweep side by side.

    pytest -m drill tests/infra/test_pages.py      needs chromium and chromedriver; SCREENSHOTS=DIR keeps the pictures
"""

import os
import re
import shutil
import signal
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from infra.serve_local import link
from infra.servers import Servers
from infra.setup import RESTARTS
from tests.infra.browsing import (
    button,
    control,
    copy_checkout,
    keep,
    open_browser,
    post,
    servers_of,
    shown,
    shows,
    wait,
)
from tests.infra.site import engine_of

pytestmark = [pytest.mark.drill, pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromedriver")]
RUN_SECONDS = 1800  # two cores that others keep busy too; 90 where nothing is beside it
FIRST_PORT = 4900


class Pages:
    """A checkout's servers, and a browser that is logged in at both."""

    def __init__(self, root: Path, browser: Any) -> None:
        self.root, self.browser = root, browser
        self.log_in()

    def log_in(self) -> None:
        self.links, self.login = Servers(self.root).links(), Servers(self.root).login()
        for server, word in ((self.links.mlflow, "Experiments"), (self.links.prefect, "nightly")):
            self.browser.get(link(server, self.login))
            wait(partial(shows, self.browser, word), f"the page after logging in: {word}")

    def prefect(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Prefect's answer; on a busy machine its database is locked now and then (503)."""
        def answer() -> list[Any]:
            try:
                return [post(f"{self.links.prefect}/api{path}", body, self.login)]
            except urllib.error.HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
                return []

        return wait(answer, f"Prefect's answer to {path}")[0]

    def deployment(self, name: str) -> str:
        found = self.prefect("/deployments/filter", {"deployments": {"name": {"any_": [name]}}})
        return str(found[0]["id"])

    def begin(self, name: str, **parameters: Any) -> str:
        path = f"/deployments/{self.deployment(name)}/create_flow_run"
        return str(self.prefect(path, {"parameters": parameters})["id"])

    def state(self, run: str) -> str:
        return str(self.prefect(f"/flow_runs/{run}")["state_name"])

    def mlflow_runs(self, run_name: str) -> list[dict[str, Any]]:
        """A run and its stages."""
        api = f"{self.links.mlflow}/api/2.0/mlflow"
        of = post(f"{api}/experiments/search", {"max_results": 10}, self.login)["experiments"]
        found = post(f"{api}/runs/search", {"experiment_ids": [item["experiment_id"] for item in of],
                                            "max_results": 500}, self.login).get("runs", [])
        tagged = [(run, {tag["key"]: tag["value"] for tag in run["data"]["tags"]}) for run in found]
        return [run for run, tags in tagged if tags.get("instructflow.run_name") == run_name]

    def parent(self, run: str) -> dict[str, Any]:
        """What MLflow has of a flow run as a whole."""
        name = str(self.prefect(f"/flow_runs/{run}")["name"])
        return next((item["info"] for item in self.mlflow_runs(name)
                     if "mlflow.parentRunId" not in {tag["key"] for tag in item["data"]["tags"]}), {})

    def open_in_mlflow(self, run: str) -> None:
        info = self.parent(run)
        self.browser.get(f"{self.links.mlflow}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    root = tmp_path_factory.mktemp("checkout")
    copy_checkout(root)
    with servers_of(root, FIRST_PORT), open_browser() as browser:
        yield Pages(root, browser)


def schedule_is_on(browser: Any) -> bool:
    switch = browser.find_element("css selector", ".deployment-schedule-card [role=switch]")
    return bool(switch.get_attribute("aria-checked") == "true")


def edit_in_menu(browser: Any) -> Any:
    """The menu's entry, once it is open; the page draws itself anew now and then, which closes it."""
    if found := shown(browser, "Edit"):
        return found
    menu = browser.find_element("css selector", ".deployment-schedule-card .p-icon-button-menu button")
    browser.execute_script("arguments[0].click()", menu)
    return None


def test_a_schedule_switched_on_and_changed_is_still_there_after_a_restart(pages: Pages) -> None:
    browser, nightly = pages.browser, pages.deployment("nightly")
    page = f"{pages.links.prefect}/deployments/deployment/{nightly}"
    browser.get(page)
    wait(lambda: shows(browser, "At 02:00 AM every day"), "the schedule")
    assert not schedule_is_on(browser)
    browser.execute_script("arguments[0].click()", wait(partial(edit_in_menu, browser), "Edit in the schedule's menu"))
    when = wait(lambda: next((item for item in browser.find_elements("css selector", ".p-modal input[type=text]")
                              if item.get_property("value") == "0 2 * * *"), None), "the cron field")
    when.clear()
    when.send_keys("30 3 * * 1-5")
    browser.execute_script("arguments[0].click()", browser.find_element("css selector", ".p-modal [role=switch]"))
    browser.execute_script("arguments[0].click()", button(browser, "Save"))
    wait(lambda: shows(browser, "At 03:30 AM, Monday through Friday"), "the new schedule")
    wait(lambda: schedule_is_on(browser), "the schedule switched on")
    keep(browser, "schedule-before")

    control(pages.root, FIRST_PORT, "down")
    said = control(pages.root, FIRST_PORT, "up", "--detach")
    assert re.search(r"nightly stays as it is there: schedules 30 3 \* \* 1-5 UTC \(prefect\.yaml: 0 2 \* \* \* UTC "
                     r"\(off\)\)", said), said
    pages.log_in()
    browser.get(page)
    wait(lambda: shows(browser, "At 03:30 AM, Monday through Friday"), "the schedule after the restart")
    assert schedule_is_on(browser)
    keep(browser, "schedule-after")


def test_the_form_offers_a_profile_that_was_made_a_moment_ago(pages: Pages) -> None:
    browser = pages.browser
    shutil.copy(pages.root / "profiles" / "smoke.yaml", pages.root / "profiles" / "made-today.yaml")
    browser.get(f"{pages.links.prefect}/deployments/deployment/{pages.deployment('nightly')}/run")
    wait(lambda: shows(browser, "Empty: what the profile says of each."), "the form")
    offered = wait(lambda: [item.get_attribute("value") for item in browser.find_elements("css selector", "option")],
                   "the profiles")
    assert {"smoke", "made-today"} <= set(offered)
    (pages.root / "profiles" / "made-today.yaml").unlink()


def trains(pages: Pages, run: str) -> bool:
    return pages.state(run) == "Running" and bool(pages.parent(run))


def ended_in_both(pages: Pages, run: str, state: str, status: str) -> None:
    """Waits until the run has this state in Prefect and this status in MLflow, and until both pages show it."""
    browser = pages.browser
    wait(lambda: pages.state(run) == state, f"{state} in Prefect", RUN_SECONDS)
    browser.get(f"{pages.links.prefect}/runs/flow-run/{run}")
    wait(lambda: shows(browser, state), f"{state} in Prefect's page")
    keep(browser, f"prefect-{state.lower()}")
    wait(lambda: pages.parent(run).get("status") == status, f"{status} in MLflow", RUN_SECONDS)
    pages.open_in_mlflow(run)
    wait(lambda: shows(browser, status.title()), f"{status} in MLflow's page")
    keep(browser, f"mlflow-{state.lower()}")


def test_a_run_that_is_cancelled_in_the_page_says_so_in_both(pages: Pages) -> None:
    browser, run = pages.browser, pages.begin("smoke", profile="smoke", seed=5)
    wait(lambda: trains(pages, run), "a stage's run in MLflow", RUN_SECONDS)
    browser.get(f"{pages.links.prefect}/runs/flow-run/{run}")
    menu = wait(lambda: browser.find_elements("css selector", ".p-icon-button-menu button"), "the run's menu")[0]
    browser.execute_script("arguments[0].click()", menu)
    browser.execute_script("arguments[0].click()", button(browser, "Cancel"))
    browser.execute_script("arguments[0].click()", button(browser, "Confirm"))
    ended_in_both(pages, run, "Cancelled", "KILLED")


def test_a_run_that_is_killed_whenever_it_is_taken_up_says_so_in_both(pages: Pages) -> None:
    run = pages.begin("smoke", profile="smoke", seed=6)

    def killed_for_good() -> bool:
        now = pages.prefect(f"/flow_runs/{run}")
        if trains(pages, run):
            with suppress(StopIteration, ProcessLookupError):
                os.kill(engine_of(run), signal.SIGKILL)
        return bool(now["state_name"] == "Crashed" and now["run_count"] > RESTARTS)

    wait(killed_for_good, "the last start's end", RUN_SECONDS)
    ended_in_both(pages, run, "Crashed", "KILLED")


def test_a_run_whose_stage_fails_says_so_in_both(pages: Pages) -> None:
    run = pages.begin("smoke", profile="smoke", changes={"ppo.kl_limit": 1e-9, "ppo.value_warmup_iterations": 0})
    ended_in_both(pages, run, "Failed", "FAILED")
    assert "beyond ppo.kl_limit" in str(pages.prefect(f"/flow_runs/{run}")["state"]["message"])


def test_a_sweep_is_compared_by_the_link_that_it_leaves(pages: Pages) -> None:
    browser = pages.browser
    sweep = pages.begin("sweep", profile="smoke", kl_goals=[0.5, 2.5])
    wait(lambda: pages.state(sweep) in ("Completed", "Failed", "Crashed"), "the sweep's end", 2 * RUN_SECONDS)
    assert pages.state(sweep) == "Completed"
    [artifact] = pages.prefect("/artifacts/filter", {"artifacts": {"key": {"any_": ["sweep"]}}})
    found = re.search(r"\[Compare them in MLflow\]\((http\S+)\)", artifact["description"])
    assert found, artifact["description"]
    browser.get(found[1])
    wait(lambda: shows(browser, "Comparing 2 Runs"), "the comparison")
    for goal in ("kl_goal=0.5", "kl_goal=2.5"):
        wait(partial(shows, browser, goal), f"the run of {goal}")
    keep(browser, "sweep-compared")
