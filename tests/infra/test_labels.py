"""People label in Label Studio: two of them in a real browser, the round that waited for them resumes and finishes;
and nothing that the server has confirmed is lost, whoever is killed.

    pytest -m browser tests/infra/test_labels.py     needs `make labels`, chromium and chromedriver
    pytest -m drill tests/infra/test_labels.py       50 kills, about ten minutes
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.servers import Servers
from infra.setup import SILENT_SECONDS
from mlops.config.stage_graph import unrolled
from mlops.labeling.batch import Assignment, Item, assign, item_id, read_batch, write_batch
from mlops.labeling.store import LABELS, Batch, LabelStore
from rlhf.data.schema import read_rows
from tests.flows.checkout import REPOSITORY
from tests.infra.browsing import copy_checkout, keep, open_browser, post, servers_of, text_of, wait

ENVIRONMENT = REPOSITORY / ".venv-labels"
pytestmark = pytest.mark.skipif(not (ENVIRONMENT / ".installed").exists(), reason="needs `make labels`")
ROUND_SECONDS = 300  # two cores, nothing beside it: 70 to the labels, 50 after them


def ask(url: str, key: str, body: Any = None, method: str = "") -> Any:
    """An answer of Label Studio's API."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(),
                                     {"Authorization": f"Token {key}", "Content-Type": "application/json"},
                                     method=method or ("GET" if body is None else "POST"))
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


# --- two people, one browser each -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout whose smoke profile has two people label the same three prompts in one round."""
    root = tmp_path_factory.mktemp("checkout")
    copy_checkout(root)
    (root / ".venv-labels").symlink_to(ENVIRONMENT)
    path = root / "profiles" / "smoke.yaml"
    profile = yaml.safe_load(path.read_text())
    profile["rounds"] = {"prompts": 3, "labelers": ["ada", "bob"], "overlap": 1, "episodes": 64}
    path.write_text(yaml.safe_dump(profile))
    with servers_of(root, 4830):
        yield root


def state_of(prefect: str, run: str, login: str) -> str:
    return str(post(f"{prefect}/api/flow_runs/{run}", None, login)["state_name"])


def states_of(prefect: str, run: str, login: str) -> list[str]:
    """The names of all states that the run has had."""
    return [str(state["name"]) for state in post(f"{prefect}/api/flow_run_states/?flow_run_id={run}", None, login)]


def suspended(prefect: str, run: str, times: int, login: str) -> bool:
    return states_of(prefect, run, login).count("Suspended") == times


def label_as(name: str, place: Path, labels: str, key: str, by_keys: bool) -> int:
    """Signs up by the invitation, labels every task of the labeler's projects; returns how many."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    done = 0
    with open_browser() as browser:
        browser.get(labels + ask(f"{labels}/api/invite", key)["invite_url"])
        wait(lambda: browser.find_elements("name", "email"), "the form")
        browser.find_element("name", "email").send_keys(f"{name}@localhost.localdomain")
        browser.find_element("name", "password").send_keys(f"secret-{name}-1\n")
        wait(lambda: "signup" not in browser.current_url, "the account")
        mine = [item for item in ask(f"{labels}/api/projects/?page_size=100", key)["results"]
                if item["title"].endswith(f" {name}")]
        for project in sorted(mine, key=lambda item: int(item["id"])):
            for _ in range(project["task_number"]):
                browser.get(f"{labels}/projects/{project['id']}/data?labeling=1")
                wait(lambda: "Truthful and harmless go before helpful" in text_of(browser), "a task")
                for found in browser.find_elements("css selector", "[aria-label='Close modal'], .ant-modal-close"):
                    browser.execute_script("arguments[0].click()", found)
                time.sleep(1)
                radios = browser.find_elements("css selector", "input[type=radio]")
                width = round(len(radios) ** 0.5)
                if by_keys:
                    for rank, keys in enumerate(("1234", "qwer", "asdf", "zxcv")[:width]):
                        ActionChains(browser).send_keys(keys[rank]).perform()
                else:
                    for answer in range(width):  # the last as shown is the best
                        browser.execute_script("arguments[0].click()", radios[answer * width + width - 1 - answer])
                    stars = browser.find_elements("css selector", "[role=radio], .ant-rate-star")
                    if stars:
                        browser.execute_script("arguments[0].click()", stars[-1])
                time.sleep(0.5)
                if done == 0:
                    keep(browser, f"labels-{name}")
                before = done
                if by_keys:
                    ActionChains(browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
                else:
                    browser.find_element("css selector", "button[aria-label='Submit current annotation']").click()
                wanted = done + 1
                wait(lambda wanted=wanted: annotated(labels, key, mine) >= wanted, "the annotation")  # type: ignore[misc]
                done = before + 1
    return done


def annotated(labels: str, key: str, projects: list[dict[str, Any]]) -> int:
    """Annotations in the projects."""
    return sum(int(ask(f"{labels}/api/projects/{item['id']}/", key)["total_annotations_number"]) for item in projects)


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromedriver")
def test_two_people_label_and_the_round_goes_on(checkout: Path) -> None:
    servers = Servers(checkout)
    links, key, login = servers.links(), servers.account()["key"], servers.login()
    api = f"{links.prefect}/api"
    deployments = {item["name"]: item["id"] for item in post(f"{api}/deployments/filter", {}, login)}
    run = post(f"{api}/deployments/{deployments['rounds']}/create_flow_run",
               {"parameters": {"count": 1, "labelers": "people", "profile": "smoke"}}, login)["id"]

    state = partial(state_of, links.prefect, run, login)
    wait(lambda: state() in ("Suspended", "Failed", "Crashed"), "the round to wait", ROUND_SECONDS)
    assert state() == "Suspended"
    batch = Batch(checkout / "feedback" / "r1")
    assert len(batch.missing()) == batch.assigned() == 6
    for times in (2, 3):  # resumed too early, twice, it waits again
        post(f"{api}/flow_runs/{run}/resume", {}, login)
        wait(partial(suspended, links.prefect, run, times, login), "the round to wait again")

    waiting_since = time.monotonic()
    assert label_as("ada", checkout, links.labels, key, by_keys=False) == 3
    post(f"{api}/deployments/{deployments['wake']}/create_flow_run", {}, login)
    wait(lambda: len(batch.missing()) == 3, "ada's labels")
    assert state() == "Suspended"  # bob has not labeled yet

    time.sleep(max(0.0, SILENT_SECONDS + 45 - (time.monotonic() - waiting_since)))
    assert label_as("bob", checkout, links.labels, key, by_keys=True) == 3
    post(f"{api}/deployments/{deployments['wake']}/create_flow_run", {}, login)
    wait(lambda: state() in ("Completed", "Failed", "Crashed"), "the round's end", ROUND_SECONDS)
    assert state() == "Completed"
    names = states_of(links.prefect, run, login)  # its silence while people label was not taken for a death
    assert names.count("Running") == names.count("Suspended") + 1 == 4
    assert "Taken up again" not in names

    items, assignments = read_batch(batch.folder)
    current = LabelStore(batch.folder / LABELS).current()
    orders = {(item.item_id, item.labeler_id): item.order for item in assignments}
    for (name, labeler), label in current.items():
        shown = [label.ranks[place] for place in orders[name, labeler]]
        width = len(items[name].completions)
        assert shown == list(range(width, 0, -1) if labeler == "ada" else range(1, width + 1))
    rows = [row for row in read_rows(batch.folder / "rm.jsonl") if row["split"] == "train"]
    assert {row["labeler_id"] for row in rows} == {"ada", "bob"}
    assert (checkout / "models" / "rounds" / "r1" / "ppo" / "model.safetensors").exists()
    assert yaml.safe_load((checkout / "params.yaml").read_text())["rounds"] == unrolled(1)
    assert (batch.folder / "labels.jsonl.dvc").exists()


# --- kills ------------------------------------------------------------------------------------------------------------


class LabelServer:
    """Label Studio as `make ui` starts it, killed and started at will."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.url, self.key = root, f"http://127.0.0.1:{port}", "0" * 40
        self.environment = {**os.environ, "LABEL_STUDIO_BASE_DATA_DIR": str(root / "data"),
                            "LABEL_STUDIO_USERNAME": "admin@localhost.localdomain", "LABEL_STUDIO_PASSWORD": "secret-1",
                            "LABEL_STUDIO_USER_TOKEN": self.key, "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
                            "COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "SENTRY_DSN": "",
                            "LABEL_STUDIO_URL": self.url, "LABEL_STUDIO_API_KEY": self.key,
                            "PYTHONPATH": str(REPOSITORY), "DJANGO_SETTINGS_MODULE": "infra.label_studio_settings",
                            "LABEL_STUDIO_HOST": self.url}
        self.port = port
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [str(ENVIRONMENT / "bin" / "label-studio"), "start", "--no-browser", "--internal-host", "127.0.0.1",
             "--port", str(self.port)], env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        wait(self.healthy, "Label Studio")

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def command(self, what: str, *options: str) -> "subprocess.Popen[str]":
        python = str(ENVIRONMENT / "bin" / "python")
        return subprocess.Popen([python, "-W", "ignore", "-m", "mlops.labeling.label_studio", what, "feedback/r1",
                                 *options], cwd=self.root, env=self.environment, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ranking_of(assignment: Assignment, turn: int) -> list[int]:
    """What the labeler says at that turn, in the order shown: each annotation another one."""
    ranks = list(range(1, len(assignment.order) + 1))
    random.Random(f"{assignment.item_id} {turn}").shuffle(ranks)
    return ranks


@pytest.mark.drill
def test_a_choice_and_its_correction(tmp_path: Path) -> None:
    """Best of four on the real server: taken over once, corrected there, taken over as the last word."""
    row = {"prompt_id": "p1", "user_id": "u", "source": "customer", "split": "train", "use_case": "chat", "prompt": "?"}
    texts = ("one", "two", "three", "four")
    item = Item(item_id(row, texts), row, texts, ("secret-model",) * 4)
    batch = Batch(tmp_path / "feedback" / "r1")
    write_batch(batch.folder, [item], [Assignment(item.item_id, "ada", (2, 0, 3, 1))])
    server = LabelServer(tmp_path, 8872)
    try:
        assert "1 tasks created" in server.command("publish", "--choose").communicate(timeout=120)[0]
        assert "0 tasks created" in server.command("publish", "--choose").communicate(timeout=120)[0]
        project = ask(f"{server.url}/api/projects/", server.key)["results"][0]["id"]
        task = ask(f"{server.url}/api/tasks?project={project}&fields=all", server.key)["tasks"][0]
        assert "secret-model" not in json.dumps(task)
        result = [{"from_name": "best", "to_name": "prompt", "type": "choices", "value": {"choices": ["A"]}}]
        made = ask(f"{server.url}/api/tasks/{task['id']}/annotations/", server.key, {"result": result})
        assert "1 labels pulled, 0 missing" in server.command("pull").communicate(timeout=120)[0]
        assert [label.ranks for label in batch.store.current().values()] == [(2, 2, 1, 2)]
        result[0]["value"] = {"choices": ["D"]}
        ask(f"{server.url}/api/annotations/{made['id']}/", server.key, {"result": result}, "PATCH")
        assert "1 labels pulled, 0 missing" in server.command("pull").communicate(timeout=120)[0]
        assert [label.ranks for label in batch.store.current().values()] == [(2, 1, 2, 2)]
        assert len(batch.store.all()) == 2
    finally:
        server.kill()


@pytest.mark.drill
def test_no_label_is_lost_in_50_kills(tmp_path: Path) -> None:
    """The server is killed while people submit, the takeover while it writes: what was confirmed is there."""
    row = {"user_id": "u", "source": "customer", "split": "train", "use_case": "chat"}
    texts = ("one", "two", "three", "four")
    rows = [{"prompt_id": f"p{number}", **row, "prompt": f"Why {number}?"} for number in range(200)]
    items = [Item(item_id(each, texts), each, texts, ("m",) * 4) for each in rows]
    assignments = assign(items, ["ada", "bob"], 0.2, 2, 1)
    write_batch(tmp_path / "feedback" / "r1", items, assignments)
    server = LabelServer(tmp_path, 8871)
    rng = random.Random(7)
    confirmed: dict[tuple[str, str], tuple[int, ...]] = {}
    try:
        made = server.command("publish")
        assert "240 tasks created" in made.communicate(timeout=120)[0]
        tasks = []
        for project in ask(f"{server.url}/api/projects/", server.key)["results"]:
            name = project["title"].split()[-1]
            found = ask(f"{server.url}/api/tasks?project={project['id']}&page_size=1000&fields=all", server.key)
            tasks += [(task["id"], task["data"]["item_id"], name) for task in found["tasks"]]
        orders = {(item.item_id, item.labeler_id): item for item in assignments}
        assert len(tasks) == len(assignments) == 240
        queue = iter(sorted(tasks))
        kills = 0
        while kills < 50:
            pulling = server.command("pull")
            stop = time.monotonic() + rng.uniform(0.3, 3.5)
            at_server = kills % 5 == 0  # each fifth kill hits the server, which takes ten seconds to come back
            while time.monotonic() < stop:
                submit(server, next(queue, None), orders, confirmed)
            if at_server:
                os.killpg(server.process.pid, signal.SIGKILL)
            else:
                os.killpg(pulling.pid, signal.SIGKILL)
            kills += 1
            if at_server:
                pulling.communicate(timeout=120)
                server.kill()
                server.start()
            else:
                pulling.communicate()
        last = server.command("pull")
        out, err = last.communicate(timeout=120)
        assert last.returncode == 0, err
        assert "labels pulled" in out
        current = LabelStore(tmp_path / "feedback" / "r1" / LABELS).current()
        assert len(confirmed) > 100
        lost = {found for found, ranks in confirmed.items() if found not in current or current[found].ranks != ranks}
        assert not lost
        again = server.command("pull")
        assert "0 labels pulled" in again.communicate(timeout=120)[0]  # nothing twice
    finally:
        server.kill()


def submit(server: LabelServer, task: tuple[int, str, str] | None, orders: dict[tuple[str, str], Assignment],
           confirmed: dict[tuple[str, str], tuple[int, ...]]) -> None:
    """One annotation; kept in `confirmed` when the server has said that it has it."""
    if task is None:
        time.sleep(0.1)
        return
    number, name, labeler = task
    assignment = orders[name, labeler]
    shown = ranking_of(assignment, 1)
    result = [{"from_name": f"rank_{letter}", "to_name": letter, "type": "choices", "value": {"choices": [str(rank)]}}
              for letter, rank in zip("abcd", shown, strict=True)]
    ranks = [0] * 4
    for place, rank in zip(assignment.order, shown, strict=True):
        ranks[place] = rank
    try:
        ask(f"{server.url}/api/tasks/{number}/annotations/", server.key, {"result": result})
    except OSError:
        return
    confirmed[name, labeler] = tuple(ranks)
