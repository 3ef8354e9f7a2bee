"""A page of another origin, in a browser that is logged in everywhere, gets nothing and changes nothing.

    pytest -m browser tests/infra/test_strangers.py     needs chromium and chromedriver; and Label Studio, if installed
"""

import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from infra.serve_local import link
from infra.servers import Links, Servers
from tests.infra.browsing import BROWSER, copy_checkout, open_browser, post, servers_of, text_of, wait
from tests.infra.test_labels import ENVIRONMENT, ask

pytestmark = BROWSER
TRIES = """
const [prefect, mlflow, labels, done] = arguments, got = {}, create = mlflow + "/api/2.0/mlflow/experiments/create";
const json = {method: "POST", headers: {"Content-Type": "application/json"}};
const text = {method: "POST", mode: "no-cors", headers: {"Content-Type": "text/plain"}};
async function read(name, url, options) {
  try { got[name] = (await fetch(url, {credentials: "include", ...options})).status; } catch { got[name] = "blocked"; }
}
function load(name, kind, url) {
  return new Promise(end => {
    const item = document.createElement(kind);
    item.onload = () => { got[name] = "loaded"; end(); };
    item.onerror = () => { got[name] = "blocked"; end(); };
    item.src = url; document.body.append(item);
  });
}
function open_socket(name, url) {
  return new Promise(end => {
    const socket = new WebSocket(url.replace("http", "ws"), "prefect");
    socket.onopen = () => { got[name] = "open"; end(); };
    socket.onclose = () => { got[name] ||= "blocked"; end(); };
  });
}
function send(url) {   // a form, whose answer goes to a frame
  const [frame, form, field] = ["iframe", "form", "input"].map(name => document.createElement(name));
  frame.name = "frame" + Math.random(); form.target = frame.name; form.action = url; form.method = "POST";
  form.enctype = "text/plain"; field.name = '{"name": "by a form", "title": "by a form", "x": "'; field.value = '"}';
  form.append(field); document.body.append(frame, form); form.submit();
}
(async () => {
  await read("prefect health", prefect + "/api/health");
  await read("prefect", prefect + "/api/admin/version");
  await read("prefect flow", prefect + "/api/flows/", {...json, body: '{"name": "by a page"}'});
  await read("prefect settings", prefect + "/ui-settings");
  await read("mlflow", mlflow + "/api/2.0/mlflow/experiments/search?max_results=9");
  await read("mlflow experiment", create, {...json, body: '{"name": "by a page"}'});
  for (const url of [prefect + "/api/flows/", create])
    await fetch(url, {...text, credentials: "include", body: '{"name": "by text"}'}).catch(() => {});
  await load("prefect picture", "img", prefect + "/ico/favicon-32x32.png");
  await load("mlflow picture", "img", mlflow + "/static-files/favicon.ico");
  await load("mlflow script", "script", mlflow + "/api/2.0/mlflow/experiments/search?max_results=9");
  await open_socket("events in", prefect + "/api/events/in");
  await open_socket("events out", prefect + "/api/events/out");
  await open_socket("logs", prefect + "/api/logs/out");
  send(prefect + "/api/flows/");
  send(create);
  if (labels) {
    await read("labels", labels + "/api/projects/");
    await read("label project", labels + "/api/projects/", {...json, body: '{"title": "by a page"}'});
    send(labels + "/api/projects/");
  }
  setTimeout(() => done(got), 3000);   // for the forms
})();
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("checkout")
    copy_checkout(root)
    if (ENVIRONMENT / ".installed").exists():
        (root / ".venv-labels").symlink_to(ENVIRONMENT)
    # A login in the remote's address must not reach Prefect.
    url = "https://ada:git-token-1@git.example/a.git"
    subprocess.run(["git", "remote", "add", "origin", url], cwd=root, check=True)
    with servers_of(root, 4860):
        yield root


@pytest.fixture(scope="module")
def links(checkout: Path) -> Links:
    return Servers(checkout).links()


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of another server on this machine; its page is empty."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><body>hello</body>")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def enter(browser: Any, checkout: Path, links: Links) -> None:
    """Logs in everywhere, as a person does."""
    servers = Servers(checkout)
    browser.get(link(links.prefect, servers.login()))
    wait(lambda: "nightly" in text_of(browser), "Prefect's deployments")
    browser.get(link(links.mlflow, servers.login()))
    wait(lambda: "Experiments" in text_of(browser), "MLflow's first page")
    if links.labels:
        browser.get(f"{links.labels}/user/login/")
        wait(lambda: browser.find_elements("name", "email"), "Label Studio's login")
        browser.find_element("name", "email").send_keys(servers.account()["email"])
        browser.find_element("name", "password").send_keys(f"{servers.account()['password']}\n")
        wait(lambda: "login" not in browser.current_url, "Label Studio")


def state_of(checkout: Path, links: Links) -> dict[str, list[str]]:
    """What the servers have."""
    servers = Servers(checkout)
    experiments = post(f"{links.mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 100}, servers.login())
    state = {"flows": [item["name"] for item in post(f"{links.prefect}/api/flows/filter", {}, servers.login())],
             "experiments": [item["name"] for item in experiments["experiments"]]}
    if links.labels:
        found = ask(f"{links.labels}/api/projects/", servers.account()["key"])["results"]
        state["projects"] = [item["title"] for item in found]
    return state


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_of_another_port_gets_nothing(checkout: Path, links: Links, elsewhere: int, name: str) -> None:
    before = state_of(checkout, links)
    with open_browser() as browser:
        enter(browser, checkout, links)
        browser.set_script_timeout(120)
        browser.get(f"http://{name}:{elsewhere}/")
        got = browser.execute_async_script(TRIES, links.prefect, links.mlflow, links.labels)
        assert len(got) == (14 if links.labels else 12)
        assert set(got.values()) == {"blocked"}, got
        for url in (links.prefect, links.mlflow, *filter(None, [links.labels])):
            browser.get(f"http://{name}:{elsewhere}/")
            browser.execute_script("document.body.innerHTML = `<iframe src='${arguments[0]}'></iframe>`", url)
            browser.switch_to.frame(browser.find_element("tag name", "iframe"))
            wait(lambda: browser.execute_script("return document.readyState") == "complete", "the frame")
            shown = text_of(browser)
            assert not any(word in shown for word in ("Flow", "MLflow", "Label Studio", "Log")), shown
            browser.switch_to.default_content()
        assert state_of(checkout, links) == before
        browser.get(links.prefect)  # the person is still logged in everywhere
        wait(lambda: "Deployments" in text_of(browser), "Prefect")
        browser.get(links.mlflow)
        wait(lambda: "Experiments" in text_of(browser), "MLflow")


def test_another_name_of_the_machine_gets_nothing(checkout: Path, links: Links) -> None:
    with open_browser("--host-resolver-rules=MAP evil.example 127.0.0.1") as browser:
        enter(browser, checkout, links)
        for url in filter(None, (links.prefect, links.mlflow, links.labels)):
            port = url.rpartition(":")[2]
            for path in ("/", "/api/health", "/health", "/enter"):
                browser.get(f"http://evil.example:{port}{path}")
                assert text_of(browser) == "this server has another name", f"{url}{path}"


def test_without_the_link_there_is_a_login(links: Links) -> None:
    with open_browser() as browser:
        browser.get(f"{links.prefect}/deployments")
        wait(lambda: "/login" in browser.current_url, "Prefect's login")
        assert "nightly" not in text_of(browser)
        browser.get(f"{links.prefect}/enter#instructflow:wrong")
        wait(lambda: "not valid" in text_of(browser), "the answer to a wrong link")


def test_no_login_is_in_logs_or_in_what_the_servers_keep(checkout: Path, links: Links) -> None:
    servers = Servers(checkout)
    secrets = [servers.login().split(":")[1].encode(), b"git-token-1"]
    held = {path.relative_to(checkout).as_posix() for folder in ("scratch", "prefect-home", "mlflow.db")
            for path in [checkout / folder, *(checkout / folder).rglob("*")]
            if path.is_file() and any(secret in path.read_bytes() for secret in secrets)}
    assert held == {"scratch/servers/login", "scratch/servers/supervisord.conf"}
    kept = post(f"{links.prefect}/api/deployments/filter", {}, servers.login())
    assert kept
    assert not [item for item in kept if "git-token" in str(item)]
