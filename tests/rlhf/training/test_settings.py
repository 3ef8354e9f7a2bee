"""Settings from the environment are checked when they are read."""

import pytest

from rlhf.errors import UserError
from rlhf.training.settings import fast_enabled, number


def test_a_number_is_read_from_the_environment_and_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INSTRUCTFLOW_EXAMPLE", raising=False)
    assert number("INSTRUCTFLOW_EXAMPLE", 30.0, 0) == 30.0
    monkeypatch.setenv("INSTRUCTFLOW_EXAMPLE", "")
    assert number("INSTRUCTFLOW_EXAMPLE", 30.0, 0) == 30.0
    monkeypatch.setenv("INSTRUCTFLOW_EXAMPLE", "0.5")
    assert number("INSTRUCTFLOW_EXAMPLE", 30.0, 0) == 0.5


@pytest.mark.parametrize("text", ["often", "nan", "0.5"])
def test_what_is_no_number_or_too_small_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_EXAMPLE", text)
    with pytest.raises(UserError) as refused:
        number("INSTRUCTFLOW_EXAMPLE", 2, 1)
    assert str(refused.value) == f"INSTRUCTFLOW_EXAMPLE = '{text}' in the environment: must be a number >= 1"


@pytest.mark.parametrize(("text", "enabled"), [(None, True), ("", True), ("on", True), ("off", False)])
def test_the_fast_code_is_on_unless_it_is_switched_off(monkeypatch: pytest.MonkeyPatch, text: str | None,
                                                       enabled: bool) -> None:
    if text is None:
        monkeypatch.delenv("INSTRUCTFLOW_FAST", raising=False)
    else:
        monkeypatch.setenv("INSTRUCTFLOW_FAST", text)
    assert fast_enabled() is enabled


def test_a_switch_that_is_neither_on_nor_off_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTFLOW_FAST", "x")
    with pytest.raises(UserError) as refused:
        fast_enabled()
    assert str(refused.value) == "INSTRUCTFLOW_FAST = 'x' in the environment: must be on or off"
