"""A real browser starts the smoke line from its form, watches it, opens what it left, compares two lines in MLflow.

    pytest -m browser tests/infra        needs chromium and chromedriver; SCREENSHOTS=DIR keeps the pictures
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infra.servers import Servers
from tests.flows.checkout import REPOSITORY

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromedriver")]
LINE_SECONDS = 420  # two cores, nothing beside it: 90


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of this checkout in its own git repository, with servers and a worker."""
    root = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True,
                           check=True).stdout.decode().split("\0")
    for name in names:
        if name and (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    environment = {**os.environ, "PREFECT_HOME": str(root / "prefect-home"), "INSTRUCTFLOW_PREFECT_PORT": "4800",
                   "INSTRUCTFLOW_MLFLOW_PORT": "5800"}
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "INSTRUCTFLOW_MIRROR"):
        environment.pop(name, None)

    def servers(*command: str) -> None:
        done = subprocess.run([sys.executable, "-m", "infra.servers", *command], cwd=root, env=environment, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        servers("up", "--detach")
        yield root
    finally:
        servers("down")


@pytest.fixture
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                     "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
                     f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def wait(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except StaleElementReferenceException:
            pass
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def text_of(browser: Any) -> str:
    return str(browser.find_element("css selector", "body").text)


def shows(browser: Any, text: str) -> bool:
    return text in text_of(browser)


def button(browser: Any, label: str) -> Any:
    def find() -> Any:
        found = browser.find_elements("css selector", "button, a, li")
        return next((item for item in found if item.text.strip() == label and item.is_displayed()), None)

    return wait(find, f"a button {label}")


def keep(browser: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        time.sleep(2)  # plots are drawn a moment later
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def watch(browser: Any, prefect: str, run: str) -> None:
    """Looks at the run's page until it is completed there, without being loaded again."""
    browser.get(f"{prefect}/runs/flow-run/{run}")

    def ended() -> str:
        with urllib.request.urlopen(f"{prefect}/api/flow_runs/{run}", timeout=30) as answer:
            name = str(json.loads(answer.read())["state_name"])
        return name if name in ("Completed", "Failed", "Crashed", "Cancelled", "Not promoted") else ""

    assert wait(ended, "the line's end", LINE_SECONDS) == "Completed"
    wait(lambda: text_of(browser).split("Flow\n")[0].count("Completed"), "its state in the page")


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def test_a_line_from_its_form_to_the_comparison(checkout: Path, browser: Any) -> None:
    links = Servers(checkout).links()

    # the form
    browser.get(f"{links.prefect}/deployments")
    button(browser, "smoke").click()
    wait(lambda: "/deployment/" in browser.current_url, "the deployment's page")
    browser.get(browser.current_url.split("?")[0] + "/run")
    wait(lambda: "How beta follows the KL." in text_of(browser), "the form with its help")
    keep(browser, "form")
    browser.execute_script("arguments[0].click()", button(browser, "Submit"))

    # the run
    api = f"{links.prefect}/api"
    first = wait(lambda: post(f"{api}/flow_runs/filter", {"flow_runs": {}}), "the run")[0]["id"]
    watch(browser, links.prefect, first)
    keep(browser, "run")
    button(browser, "Artifacts").click()
    for key in ("pipeline-summary", "metrics", "curves", "data-findings"):
        wait(partial(shows, browser, key), f"artifact {key}")
    keep(browser, "artifacts")
    progress = post(f"{api}/artifacts/filter", {"artifacts": {"key": {"any_": ["ppo-progress"]}}})
    assert float(progress[0]["data"]) == 100
    curves = post(f"{api}/artifacts/filter", {"artifacts": {"key": {"any_": ["curves"]}}})[0]
    browser.get(f"{links.prefect}/artifacts/artifact/{curves['id']}")
    picture = wait(lambda: browser.find_elements("css selector", "img[src^='data:image/png']"), "the curves")[0]
    wait(lambda: browser.execute_script("return arguments[0].naturalWidth", picture) > 500, "the picture")
    keep(browser, "curves")

    # another KL goal, and both in MLflow
    deployment = post(f"{api}/deployments/filter", {"deployments": {"name": {"any_": ["smoke"]}}})[0]["id"]
    second = post(f"{api}/deployments/{deployment}/create_flow_run",
                  {"parameters": {"profile": "smoke", "own_copy": True, "kl_goal": 0.5}})["id"]
    watch(browser, links.prefect, second)
    mlflow = f"{links.mlflow}/api/2.0/mlflow"
    with urllib.request.urlopen(f"{mlflow}/experiments/get-by-name?experiment_name=instructflow", timeout=30) as answer:
        experiment = json.loads(answer.read())["experiment"]["experiment_id"]

    def lines() -> list[dict[str, Any]]:
        found = post(f"{mlflow}/runs/search", {"experiment_ids": [experiment], "max_results": 100}).get("runs", [])
        return [run for run in found if run["info"]["status"] == "FINISHED"
                and run["info"]["run_name"].startswith("smoke")]

    both = wait(lambda: lines() if len(lines()) == 2 else None, "both lines in MLflow", 120)
    assert {next(item["value"] for item in run["data"]["params"] if item["key"] == "ppo.kl_goal") for run in both} == {
        "0.5", "2.0"}
    query = urllib.parse.quote(json.dumps([run["info"]["run_id"] for run in both]))
    browser.get(f"{links.mlflow}/#/compare-runs?runs={query}&experiments={urllib.parse.quote(json.dumps([experiment]))}")
    wait(lambda: "Comparing 2 Runs" in text_of(browser), "the comparison")
    wait(lambda: all(run["info"]["run_name"] in text_of(browser) for run in both), "both names")
    keep(browser, "mlflow-compare")
