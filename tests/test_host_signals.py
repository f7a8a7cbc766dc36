import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import copy_context

import pytest

from grug_native.host.signals import ExitCode, StopSignal


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_first_signal_is_a_question_at_the_next_step(number: signal.Signals, code: int) -> None:
    given = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Under nohup it would be ignored.
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.should_stop() and stop.exit_code is None
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.should_stop())
        assert stop.exit_code == code
    assert signal.getsignal(number) is before
    signal.signal(signal.SIGHUP, given)


def test_the_main_thread_knows_at_once_however_busy_the_machine_is() -> None:
    ended = threading.Event()

    def compute() -> None:
        while not ended.is_set():
            sum(range(1000))

    busy = [threading.Thread(target=compute) for _ in range(8)]
    for thread in busy:
        thread.start()
    try:
        for _ in range(20):
            with StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.should_stop() and stop.exit_code == 143
    finally:
        ended.set()
        for thread in busy:
            thread.join()


def test_a_signal_at_the_last_moment_counts() -> None:
    for _ in range(50):
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == 143


def test_under_nohup_a_closed_terminal_is_no_signal() -> None:
    given = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        assert not stop.should_stop()
    signal.signal(signal.SIGHUP, given)


def test_handlers_come_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with pytest.raises(RuntimeError, match="a step failed"), StopSignal():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        raise RuntimeError("a step failed")
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before
    assert "grug-signals" not in [thread.name for thread in threading.enumerate()]


def test_other_signals_are_left_alone() -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: len(seen) == 2)
            assert not stop.should_stop()
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_off_the_main_thread_it_does_nothing() -> None:
    before, asked = signal.getsignal(signal.SIGTERM), list[bool]()

    def run() -> None:
        with StopSignal() as stop:
            asked.append(stop.should_stop() or signal.getsignal(signal.SIGTERM) is not before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]


@contextmanager
def in_native_code(setting: str = "pass") -> Generator[subprocess.Popen[str]]:
    code = f"""
import ctypes, signal
from grug_native.host.signals import StopSignal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with StopSignal() as stop:
    {setting}
    print("ready", flush=True)
    sleep = ctypes.CDLL(None).usleep
    for _ in range(60):
        while sleep(999_999):
            pass
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        try:
            yield child
        finally:
            child.kill()


def test_the_second_signal_ends_the_process_even_while_the_main_thread_is_in_native_code() -> None:
    with in_native_code() as child:
        child.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        assert child.poll() is None
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=10) == 128 + signal.SIGTERM


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGHUP), (signal.SIGHUP, signal.SIGTERM)])
def test_a_terminal_that_closes_is_nobody_in_a_hurry(numbers: tuple[signal.Signals, ...]) -> None:
    with in_native_code() as child:
        for number in numbers:
            child.send_signal(number)
            time.sleep(1.2)
        assert child.poll() is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_with_nothing_to_lose_the_first_signal_ends_native_code_too(number: signal.Signals, code: int) -> None:
    with in_native_code("stop.nothing_to_lose = True") as child:
        child.send_signal(number)
        assert child.wait(timeout=10) == code


def test_a_signal_is_heard_while_nobody_reads_what_is_said() -> None:
    code = """
import logging, os
from grug_native.host.signals import StopSignal
logging.basicConfig()
with StopSignal() as stop:
    stop.nothing_to_lose = True
    print("ready", flush=True)
    while True:
        logging.warning("x" * 10_000)  # The pipe is full soon, and the lock of the log is held for ever.
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        try:
            assert child.wait(timeout=10) == 130
        finally:
            child.kill()


def test_a_signal_that_arrives_twice_at_once_is_one() -> None:
    """As under `uv run`, which passes on to its child what the whole process group has been sent."""
    with in_native_code() as child:
        for _ in range(3):
            child.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert child.poll() is None


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, "143"), (signal.SIGINT, "130")])
def test_with_a_coordinator_jax_agrees_on_the_step(number: signal.Signals, codes: str) -> None:
    code = """
import socket, sys, time
import jax
from grug_native.host.signals import StopSignal
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)
with StopSignal() as stop:
    assert not stop.should_stop()
    print("ready", flush=True)
    for step in range(1, 2000):
        time.sleep(0.01)
        assert stop.exit_code is None
        if stop.should_stop():
            print(stop.exit_code)
            sys.exit()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.stdout.read().split() == [codes]
        assert child.wait(timeout=20) == 0


def test_exit_codes_are_documented_numbers() -> None:
    assert [int(code) for code in ExitCode] == [0, 1, 2, 3, 4]


def test_in_a_thread_with_the_main_threads_context_it_passes_on_what_the_main_thread_is_told() -> None:
    codes = list[int | None]()

    def run() -> None:
        with StopSignal() as stop:
            wait_until(lambda: stop.should_stop())
            codes.append(stop.exit_code)

    with StopSignal():
        thread = threading.Thread(target=copy_context().run, args=(run,))
        thread.start()
        os.kill(os.getpid(), signal.SIGTERM)
        thread.join()
    assert codes == [143]
