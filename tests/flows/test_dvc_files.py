"""dvc.lock and data.dvc that a kill has cut off: DVC writes them in place."""

import time
from pathlib import Path

import pytest

from flows.dvc_files import keep, mend, whole
from flows.summary import Summary
from rlhf.errors import UserError
from tests.flows.checkout import Checkout

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["dvc.lock", "data.dvc"])
def test_a_file_cut_anywhere_is_as_it_was_kept_or_one_that_dvc_takes(tmp_path: Path, name: str,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert whole(name, text)
    mended = 0
    for end in [0, *range(1, len(text), max(1, len(text) // 60))]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        keep(tmp_path)
        (tmp_path / name).write_text(text[:end], encoding="utf-8")
        caplog.clear()
        mend(tmp_path)
        now = (tmp_path / name).read_text(encoding="utf-8")
        assert whole(name, now)
        assert now in (text, text[:end])
        assert name == "dvc.lock" or now == text or len(text) - end < 60  # without the sum of itself, its last line
        mended += now == text
        assert (f"{tmp_path / name} was cut off by a kill" in caplog.text) == (now == text)
    assert mended > 40


def test_without_what_was_kept_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text("")
    with pytest.raises(UserError, match=r"dvc.lock: is cut off or damaged.*git checkout dvc.lock"):
        mend(tmp_path)
    (tmp_path / "dvc.lock").unlink()
    mend(tmp_path)  # a checkout in which nothing has run has none


def test_a_run_goes_on_with_a_dvc_lock_that_a_kill_has_emptied(checkout: Checkout) -> None:
    """The last stage's record is lost: it runs again; the others have nothing to do."""
    assert isinstance(checkout.run(), Summary)
    lock = checkout.root / "dvc.lock"
    before = lock.read_text(encoding="utf-8")
    lock.write_text("")
    assert isinstance(checkout.run(), Summary)
    assert lock.read_text(encoding="utf-8") == before


def test_looking_at_them_takes_no_time(tmp_path: Path) -> None:
    """Before each stage: what is kept already is only compared."""
    for name in ("dvc.lock", "data.dvc"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    keep(tmp_path)
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / ".dvc/tmp/kept").iterdir())]
    time.sleep(0.01)
    keep(tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / ".dvc/tmp/kept").iterdir())] == stamps
