import errno
import signal

import pytest

from grug_native.host.fault_injection import ENV_NAME, InjectedFaultError, fault_point


def test_nothing_happens_when_the_environment_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_NAME, raising=False)
    assert fault_point("step", 3) is None


@pytest.mark.parametrize(
    ("fault", "strikes"),
    [
        ("nan@step:3", True),
        ("nan@step:*", True),
        ("nan@step", True),
        ("nan@step:3:1", True),
        ("nan@data:1,nan@step:3", True),
        ("nan@step:4", False),
        ("nan@data:3", False),
        ("nan@step:3:0", False),
    ],
)
def test_a_fault_strikes_only_where_it_is_meant_to(fault: str, strikes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_NAME, fault)
    assert (fault_point("step", 3, process=1) == "nan") is strikes


def test_kinds_that_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_NAME, "raise@pre_save:1,enospc@mid_write:1,memory@eval:1")
    with pytest.raises(InjectedFaultError, match="raise@pre_save:1"):
        fault_point("pre_save", 1)
    with pytest.raises(OSError, match="mid_write") as full:
        fault_point("mid_write", 1)
    assert full.value.errno == errno.ENOSPC
    with pytest.raises(MemoryError):
        fault_point("eval", 1)


def test_a_signal_reaches_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        monkeypatch.setenv(ENV_NAME, "term@log:2")
        fault_point("log", 1)
        assert not received
        fault_point("log", 2)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("fault", ["explode@step:1", "kill@nowhere:1", "kill", ""])
def test_an_unknown_fault_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_NAME, fault)
    with pytest.raises(ValueError, match="must be kind@point:step"):
        fault_point("step", 1)
