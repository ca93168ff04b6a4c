"""The ledger audits itself while the broker runs, and /metrics says what came of it.

An audit reads all that was ever written, so the next one waits in proportion to the last one's
length: it never takes more than a hundredth of a core.
"""

import logging
import time

from sublet_broker.adapters.http.metrics import LEDGER_AUDITS, LEDGER_BREACHES
from sublet_broker.service.broker import Broker
from sublet_broker.service.unit_of_work.metrics import Sample

log = logging.getLogger("sublet.audit")

LEAST_PAUSE_S = 5.0
SHARE = 100


class Audits:
    """Audits again and again. `work` is for one thread; `samples` for any."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._due_s = 0.0
        self._done = 0
        self._breaches = 0

    def work(self) -> None:
        """Audit, if it is time to."""
        began_s = time.monotonic()
        if began_s < self._due_s:
            return
        breaches = self._broker.ledger_audit.breaches()
        for breach in breaches:
            log.error("the ledger is wrong: %s", breach)
        took_s = time.monotonic() - began_s
        self._breaches, self._done = len(breaches), self._done + 1
        self._due_s = time.monotonic() + max(LEAST_PAUSE_S, SHARE * took_s)

    def samples(self) -> list[Sample]:
        """Return what /metrics shows."""
        return [Sample(LEDGER_AUDITS, self._done), Sample(LEDGER_BREACHES, self._breaches)]
