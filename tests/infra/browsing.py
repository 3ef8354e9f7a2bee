"""A copied checkout with its servers, and a real browser, for the tests of what people see."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows.gate import basic
from tests.flows.checkout import REPOSITORY

BROWSER = [pytest.mark.browser, pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromedriver")]


def copy_checkout(root: Path) -> None:
    """The files that git knows here, and new ones, in a git repository of their own."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True,
                           check=True).stdout.decode().split("\0")
    for name in names:
        if name and (REPOSITORY / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=root, check=True)


@contextmanager
def servers_of(root: Path, first_port: int) -> Iterator[None]:
    """`make ui` there, then `make down`."""
    try:
        control(root, first_port, "up", "--detach")
        yield
    finally:
        control(root, first_port, "down")


def control(root: Path, first_port: int, *command: str) -> str:
    """What `python -m infra.servers` prints in a checkout."""
    environment = {**os.environ, "PREFECT_HOME": str(root / "prefect-home"),
                   **{f"INSTRUCTFLOW_{name}_PORT": str(first_port + 10 * place)
                      for place, name in enumerate(("PREFECT", "MLFLOW", "LABELS"))}}
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "INSTRUCTFLOW_UPLOADER"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-m", "infra.servers", *command], cwd=root, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def open_browser(*more: str) -> Iterator[Any]:
    """Chromium with a profile of its own; `more` are arguments of its command line."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                     "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
                     f"--user-data-dir={tempfile.mkdtemp()}", *more):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait(condition: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except StaleElementReferenceException:
            pass
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds:.0f} s for {what}")


def text_of(browser: Any) -> str:
    """The page's text; empty for the moment in which a page has no body."""
    return "".join(str(body.text) for body in browser.find_elements("css selector", "body"))


def shows(browser: Any, text: str) -> bool:
    return text in text_of(browser)


def button(browser: Any, label: str) -> Any:
    return wait(lambda: shown(browser, label), f"a button {label}")


def shown(browser: Any, label: str) -> Any:
    """The button, link or menu entry with this text; None where none is to be seen."""
    items = browser.find_elements("css selector", "button, a, li")
    return next((item for item in items if item.text.strip() == label and item.is_displayed()), None)


def keep(browser: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        time.sleep(2)  # plots are drawn a moment later
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def post(url: str, body: dict[str, Any] | None, login: str) -> Any:
    """The answer to a JSON request; without a body it is GET."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(),
                                     {"Content-Type": "application/json", "Authorization": basic(login)})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())
