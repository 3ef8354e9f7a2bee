"""The machine's clock jumps by a day, forwards and back, in the middle of a line. `make drills`; needs libfaketime."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.site import Site, wait

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
pytestmark = [pytest.mark.drill, pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Servers, worker, flow and stages read a clock that a file moves; what counts seconds is the machine's own."""
    made = Site(tmp_path_factory.mktemp("clock"))
    (made.root / "clock").write_text("+0\n")
    made.environment |= {"LD_PRELOAD": str(LIBRARY), "FAKETIME_TIMESTAMP_FILE": str(made.root / "clock"),
                         "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    try:
        made.control("up", "--detach")
        yield made
    finally:
        made.control("down")


@pytest.mark.parametrize("jump", ["+1d", "-1d"])
def test_the_clock_jumps(site: Site, jump: str) -> None:
    (site.root / "clock").write_text("+0\n")
    site.reset(f"clock {jump}")
    run = site.begin()
    site.pid("sft")
    (site.root / "clock").write_text(f"{jump}\n")
    site.let_go()
    wait(lambda: "ppo ended" in site.order(), "the line's end", 120)
    site.ends(run, "Completed")
    assert site.order() == ["sft began", "sft ended", "ppo began", "ppo ended"]
