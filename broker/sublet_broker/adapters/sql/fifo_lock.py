"""A lock that is had in the order in which it was asked for."""

import threading
from collections import deque


class FifoLock:
    """Mutual exclusion, first come first served.

    threading.Lock promises no order: whoever releases it and asks again at once tends to get it,
    and where submissions come fast, the scheduler's commit waits behind them for many seconds. Here
    whoever releases it hands it to the one that has waited longest.
    """

    def __init__(self) -> None:
        self._inner = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._inner:
            if not self._held:
                self._held = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until it is handed over

    def __exit__(self, *_: object) -> None:
        with self._inner:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
