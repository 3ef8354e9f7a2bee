"""A real browser starts the smoke run from its form, watches it, opens what it left, compares two runs in MLflow.

    pytest -m browser tests/infra        needs chromium and chromedriver; SCREENSHOTS=DIR keeps the pictures
"""

import json
import urllib.parse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline import pipeline
from infra.serve_local import link
from infra.servers import Servers
from tests.infra.browsing import (
    BROWSER,
    button,
    copy_checkout,
    keep,
    open_browser,
    post,
    servers_of,
    shows,
    text_of,
    wait,
)

pytestmark = BROWSER
RUN_SECONDS = 420  # two cores, nothing beside it: 90
HELP = next(line for line in (pipeline.__doc__ or "").splitlines() if "beta_rule:" in line).split(":", 1)[1].strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("checkout")
    copy_checkout(root)
    with servers_of(root, 4800):
        yield root


@pytest.fixture
def browser() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


def watch(browser: Any, prefect: str, run: str, login: str) -> None:
    """Looks at the run's page until it is completed there, without being loaded again."""
    browser.get(f"{prefect}/runs/flow-run/{run}")

    def ended() -> str:
        name = str(post(f"{prefect}/api/flow_runs/{run}", None, login)["state_name"])
        return name if name in ("Completed", "Failed", "Crashed", "Cancelled", "Not promoted") else ""

    assert wait(ended, "the run's end", RUN_SECONDS) == "Completed"
    wait(lambda: text_of(browser).split("Flow\n")[0].count("Completed"), "its state in the page")


def test_a_run_from_its_form_to_the_comparison(checkout: Path, browser: Any) -> None:
    links, login = Servers(checkout).links(), Servers(checkout).login()

    # the form, by the link that `make ui` prints
    browser.get(link(links.prefect, login))
    button(browser, "smoke").click()
    wait(lambda: "/deployment/" in browser.current_url, "the deployment's page")
    browser.get(browser.current_url.split("?")[0] + "/run")
    wait(lambda: HELP in text_of(browser), f"the form with its help: {HELP}")
    keep(browser, "form")
    browser.execute_script("arguments[0].click()", button(browser, "Submit"))

    # the run
    api = f"{links.prefect}/api"
    of_smoke = {"deployments": {"name": {"any_": ["smoke"]}}}  # others have runs by their schedules
    first = wait(lambda: post(f"{api}/flow_runs/filter", of_smoke, login), "the run")[0]["id"]
    watch(browser, links.prefect, first, login)
    keep(browser, "run")
    button(browser, "Artifacts").click()
    for key in ("pipeline-summary", "metrics", "curves", "data-findings"):
        wait(partial(shows, browser, key), f"artifact {key}")
    keep(browser, "artifacts")
    progress = post(f"{api}/artifacts/filter", {"artifacts": {"key": {"any_": ["ppo-ppo-progress"]}}}, login)
    assert float(progress[0]["data"]) == 100
    curves = post(f"{api}/artifacts/filter", {"artifacts": {"key": {"any_": ["curves"]}}}, login)[0]
    browser.get(f"{links.prefect}/artifacts/artifact/{curves['id']}")
    picture = wait(lambda: browser.find_elements("css selector", "img[src^='data:image/png']"), "the curves")[0]
    wait(lambda: browser.execute_script("return arguments[0].naturalWidth", picture) > 500, "the picture")
    keep(browser, "curves")

    # another KL goal, and both in MLflow
    deployment = post(f"{api}/deployments/filter", {"deployments": {"name": {"any_": ["smoke"]}}}, login)[0]["id"]
    second = post(f"{api}/deployments/{deployment}/create_flow_run",
                  {"parameters": {"profile": "smoke", "own_copy": True, "kl_goal": 0.5}}, login)["id"]
    watch(browser, links.prefect, second, login)
    mlflow = f"{links.mlflow}/api/2.0/mlflow"
    found = post(f"{mlflow}/experiments/get-by-name?experiment_name=instructflow", None, login)
    experiment = found["experiment"]["experiment_id"]

    def finished() -> list[dict[str, Any]]:
        runs = post(f"{mlflow}/runs/search", {"experiment_ids": [experiment], "max_results": 100},
                    login).get("runs", [])
        return [run for run in runs if run["info"]["status"] == "FINISHED"
                and run["info"]["run_name"].startswith("smoke")]

    both = wait(lambda: finished() if len(finished()) == 2 else None, "both runs in MLflow")
    assert {next(item["value"] for item in run["data"]["params"] if item["key"] == "ppo.kl_goal") for run in both} == {
        "0.5", "2.0"}
    query = urllib.parse.quote(json.dumps([run["info"]["run_id"] for run in both]))
    browser.get(link(links.mlflow, login))
    wait(lambda: "Experiments" in text_of(browser), "MLflow's first page")
    browser.get(f"{links.mlflow}/#/compare-runs?runs={query}&experiments={urllib.parse.quote(json.dumps([experiment]))}")
    wait(lambda: "Comparing 2 Runs" in text_of(browser), "the comparison")
    wait(lambda: all(run["info"]["run_name"] in text_of(browser) for run in both), "both names")
    keep(browser, "mlflow-compare")
