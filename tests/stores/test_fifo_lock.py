"""Writers get the database in the order in which they came."""

from __future__ import annotations

import threading

from sublet_broker.adapters.sql.fifo_lock import FifoLock


def test_first_come_first_served() -> None:
    lock, order, threads = FifoLock(), [], []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    with lock:
        for number in range(20):
            thread = threading.Thread(target=take, args=(number,))
            thread.start()
            threads.append(thread)
            while len(lock._waiting) <= number:
                thread.join(0.001)
    for thread in threads:
        thread.join(10)
    assert order == list(range(20))


def test_whoever_asks_again_at_once_waits_behind_those_who_wait() -> None:
    lock, order = FifoLock(), []

    def greedy() -> None:
        for _ in range(1_000):
            with lock:
                order.append("greedy")

    def modest() -> None:
        with lock:
            order.append("modest")

    lock.__enter__()
    threads = [threading.Thread(target=act) for act in (greedy, modest)]
    for count, thread in enumerate(threads, 1):
        thread.start()
        while len(lock._waiting) < count:
            thread.join(0.001)
    lock.__exit__()
    for thread in threads:
        thread.join(10)
    assert order[:2] == ["greedy", "modest"]


def test_two_never_hold_it() -> None:
    lock, inside, most = FifoLock(), [], []

    def work() -> None:
        for _ in range(500):
            with lock:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert max(most) == 1
    assert len(most) == 2_000
