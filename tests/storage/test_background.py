"""The writing thread: jobs in order, a queue bounded by bytes, errors on the caller's side."""

from __future__ import annotations

import random
import signal
from threading import Event, Thread, current_thread

import pytest

from metaql.storage.background import Background


def test_jobs_run_in_order_on_one_other_thread():
    done, threads = [], set()

    def job(number):
        done.append(number)
        threads.add(current_thread())

    background = Background(10)
    for number in range(50):
        background.submit(lambda number=number: job(number), 3)
    background.drain()
    background.stop()
    assert done == list(range(50))
    assert len(threads) == 1
    assert current_thread() not in threads


def test_submitting_waits_while_too_much_is_queued():
    gate, submitted = Event(), []
    background = Background(100)
    background.submit(gate.wait, 60)

    def submit():
        background.submit(lambda: None, 60)
        submitted.append(True)

    thread = Thread(target=submit)
    thread.start()
    thread.join(0.1)
    assert not submitted
    gate.set()
    thread.join()
    background.stop()
    assert submitted


def test_one_job_may_be_larger_than_the_limit():
    background = Background(10)
    background.submit(lambda: None, 1000)
    background.submit(lambda: None, 1000)
    background.drain()
    background.stop()


def test_an_error_comes_out_at_every_later_call():
    done = []
    background = Background(10)
    background.submit(lambda: 1 / 0, 1)
    with pytest.raises(ZeroDivisionError):
        background.drain()
    for call in (background.check, background.drain, lambda: background.submit(lambda: done.append(1), 1)):
        with pytest.raises(ZeroDivisionError):
            call()
    background.stop()
    assert not done


def test_stopping_discards_what_has_not_begun():
    gate, begun, done = Event(), Event(), []

    def first():
        begun.set()
        gate.wait()
        done.append("first")

    background = Background(100)
    background.submit(first, 1)
    background.submit(lambda: done.append("second"), 1)
    begun.wait()
    Thread(target=gate.set).start()
    background.stop()
    background.stop()
    assert "first" in done


def test_interrupts_leave_nobody_waiting():
    moments = random.Random(5)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(200):
            background = Background(10)
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come at any of them
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.0001, 0.004))
                while True:
                    for _ in range(5):
                        background.submit(lambda: None, 3)
                    background.drain()
            background.stop()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
