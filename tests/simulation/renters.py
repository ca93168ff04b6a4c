"""Renters: they submit, watch, sign what adds up (by the SDK's rules), and change their mind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sublet.cosign import cosign
from sublet.log_head import head_of, proven_growth
from sublet_broker.service.errors import Refusal
from sublet_broker.service.renters.accounts import Accounts
from sublet_broker.service.renters.jobs import Jobs
from sublet_contracts.digests import digest_of
from sublet_contracts.documents import (
    Amendment,
    Deposit,
    Job,
    KeyDocument,
    Resources,
    Signed,
    sign_document,
)
from sublet_contracts.envelope import Envelope
from sublet_contracts.export import verify_export
from tests.simulation.broker import TROUBLES, BrokerAway
from tests.simulation.engine import BEGIN_MS
from tests.simulation.jobs import Program, state_at
from tests.simulation.models import Violation
from tests.simulation.registry import IMAGES, NOWHERE
from tests.simulation.saved_folders import FOLDERS, NEVER_SAVED, can_end
from tests.simulation.store import UNKEPT

if TYPE_CHECKING:
    from tests.simulation.market import Market

LOOK_MS = 60_000
MAX_PRICE = 2_500_000
FUTURE = "in the future"
ENDED = ("succeeded", "failed", "cancelled")
BAD_ENDINGS = (
    *("fail", "returns", "yield", "deaf", "suicide", "hangs", "hangs"),
    *("polite",) * 6,  # as the world's trainers are
)


SAVES = ("", "", "", "torch", "raw")
"""How jobs save: most by the protocol, some into a folder that they name."""


class RenterHost:
    """One renter and its client."""

    def __init__(self, market: Market, number: int) -> None:
        from tests.simulation.market import key_named

        self.market = market
        self.engine = market.engine
        self.name = f"renter-{number}"
        self.key = key_named(self.name)
        self.party = self.key.party
        market.names[self.party] = self.name
        self.mute = "renter-mute" in market.plan.faults and self.engine.happens(0.3)
        self.kills = "self-kill" in market.plan.faults and self.engine.happens(0.08)
        """All its jobs kill themselves: it would compute for nothing."""
        self.jobs: dict[str, Signed[Job]] = {}
        self.documents: list[Signed[Job]] = []
        share = market.plan.jobs // market.plan.renters
        rest = market.plan.jobs % market.plan.renters
        self.to_send = share + (1 if number < rest else 0)
        self.generous = False
        self.unsent = self.to_send
        self.head: Envelope | None = None
        """The newest head of the broker's log that it has seen."""

    @property
    def all_sent(self) -> bool:
        return self.unsent == 0

    def now_ms(self) -> int:
        """The renter's clock."""
        return BEGIN_MS + self.engine.now_ms

    def begin(self) -> None:
        """Introduce itself, be funded, and submit its jobs, all at odd times."""
        self.engine.after(self.engine.draw_ms(0, 5 * 60_000), self._introduce)

    def _introduce(self) -> None:
        introduction = KeyDocument(
            party=self.party,
            broker=self.market.broker_key.party,
            name=self.name,
            issued_ms=self.now_ms(),
        )
        signed = sign_document(introduction, self.key).envelope
        self._insist(Accounts.register_key, signed, then=self._introduced)

    def _introduced(self, answer: Any) -> None:
        if isinstance(answer, Refusal):
            self._sign_anew(self._introduce)
            return
        self.fund(self.engine.random.choice((3_000_000, 8_000_000, 30_000_000)))
        hours = self.market.plan.hours
        for number in range(self.to_send):
            at_ms = self.engine.draw_ms(5_000, int(hours * 3_600_000 * 0.6))
            self.engine.after(at_ms, lambda n=number: self._submit(n))  # type: ignore[misc]
        self.engine.after(LOOK_MS + self.engine.draw_ms(0, LOOK_MS), self._look)

    def fund(self, amount_ucr: int) -> None:
        """The operator credits this renter."""
        deposit = Deposit(
            broker=self.market.broker_key.party,
            party=self.party,
            amount_ucr=amount_ucr,
            memo="fund",
            nonce=self.engine.random.randbytes(16).hex(),
            issued_ms=self.now_ms(),
        )
        envelope = sign_document(deposit, self.market.broker_key).envelope
        operator = self.market.broker_key.party

        def answered(answer: Any) -> None:
            if isinstance(answer, Refusal):
                self._sign_anew(partial(self.fund, amount_ucr))

        self._insist(Accounts.deposit, operator, envelope, then=answered)

    def _sign_anew(self, act: Callable[[], None]) -> None:
        """What the broker's clock calls signed in the future is signed again, a little later."""
        self.engine.after(self.engine.draw_ms(20_000, 120_000), act)

    def _insist(
        self,
        act: Callable[..., Any],
        *what: Any,
        then: Callable[[Any], None] | None = None,
        **named: Any,
    ) -> None:
        """Ask until there is an answer; the answer itself may get lost too."""

        def again() -> None:
            later = partial(self._insist, act, *what, then=then, **named)
            self.engine.after(self.engine.draw_ms(500, 5_000), later)

        try:
            answer = self._ask(act, *what, **named)
            if self.engine.happens(0.05):
                raise BrokerAway
        except (BrokerAway, *UNKEPT):
            again()
            return
        except Refusal as refusal:
            if refusal.code in TROUBLES:
                again()
                return
            self.engine.say(f"{self.name} is told: {refusal}")
            answer = refusal
        if then is not None:
            then(answer)

    def _ask(self, act: Callable[..., Any], *what: Any, **named: Any) -> Any:
        """Let the broker that is up now do one of its intake's use-cases."""
        host = self.market.broker
        room = getattr(host.broker, act.__qualname__.partition(".")[0].lower())  # jobs or accounts
        return host.call(act, room, *what, **named)

    # -- jobs ---------------------------------------------------------------------------------

    def _submit(self, number: int) -> None:
        draw = self.engine.random
        odd = "bad-jobs" in self.market.plan.faults and draw.random() < 0.36
        program = Program(
            # Most jobs are short, so that many markets fit into an hour; some outlive machines.
            steps=draw.randint(20, 40) if draw.random() < 0.2 else draw.randint(3, 12),
            step_ms=draw.choice((2_000, 7_001, 15_000, 40_000)),
            every=draw.randint(1, 8),
            save_ms=draw.choice((100, 1_000, 8_000)),
            saves=draw.choice(NEVER_SAVED) if odd and draw.random() < 0.2 else draw.choice(SAVES),
            ending="suicide" if self.kills else draw.choice(BAD_ENDINGS) if odd else "done",
        )
        program = can_end(program)
        hours = program.steps * program.step_ms / 3_600_000
        least = -(-MAX_PRICE // 60)
        budget = max(least, int(hours * MAX_PRICE * draw.choice((0.4, 1.3, 4.0))))
        accept = draw.choice((budget, budget, max(least, budget // 3)))
        devices = draw.choice((1, 1, 1, 1, 2))
        stalls = (60_000, 60_000, 300_000) if program.ending == "hangs" else (0, 0, 90_000, 600_000)
        if program.saves:
            stalls = (0,)  # it tells of no steps but those of its snapshots
        job = Job(
            renter=self.party,
            broker=self.market.broker_key.party,
            nonce=draw.randbytes(16).hex(),
            name=f"job-{self.name[-1]}-{number}",
            image=NOWHERE if odd and draw.random() < 0.1 else draw.choice(IMAGES),
            command=program.command(),
            env={},
            resources=Resources(
                devices=devices,
                device_kind="gpu",
                cpu_millis=draw.choice((0, 0, 1000)),
                memory_bytes=10**9,
                disk_bytes=10**9,
                region=draw.choice(("", "", self._some_region(devices))),
                # There is but one: who asks for it is not yet held to it by what is durable.
                hardware_class="rtx4090" if number % 2 else "",
            ),
            max_price_ucr_per_device_hour=MAX_PRICE,
            budget_ucr=budget,
            checkpoint_interval_ms=draw.choice((30_000, 120_000, 0)),
            patience_ms=draw.choice((10_000, 20_000, 60_000)),
            stop_grace_ms=draw.choice((5_000, 5_000, 30_000, 30_000, 600_000)),
            stall_ms=draw.choice(stalls),
            inputs=(),
            outputs=draw.choice(("", "/out")),
            checkpoints=FOLDERS if program.saves else (),
            accept_receipts_up_to_ucr=accept,
            issued_ms=self.now_ms(),
            expires_ms=self.now_ms() + 86_400_000,
        )
        signed = sign_document(job, self.key)
        self.documents.append(signed)
        self.market.names[signed.id] = job.name
        self._send(signed, number)

    def _some_region(self, devices: int) -> str:
        """Return one where such a job can be served."""
        machines = (agent.terms for agent in self.market.agents)
        suit = sorted({terms.region for terms in machines if len(terms.devices) >= devices})
        return self.engine.random.choice(suit)

    def _send(self, signed: Signed[Job], number: int = 0, *, first: bool = True) -> None:
        def sent(answer: Any) -> None:
            if first and isinstance(answer, Refusal) and FUTURE in answer.detail:
                self.documents.remove(signed)
                self._sign_anew(partial(self._submit, number))
                return
            if first:
                self.unsent -= 1
            if not isinstance(answer, Refusal):
                self.jobs[signed.id] = signed

        self._insist(Jobs.submit, self.party, signed.envelope, wait_for_offer=True, then=sent)

    def repeat(self) -> None:
        """Send a job again, as a client does that has lost the answer."""
        if self.documents:
            self._send(self.engine.random.choice(self.documents), first=False)

    def drain(self) -> None:
        """Send two jobs at once, either of which takes most of what is there; and change its mind
        about what was taken."""
        host = self.market.broker
        if not self.documents:
            return
        try:
            view = host.call(host.broker.money.balance, self.party)
        except (BrokerAway, *UNKEPT):
            return
        budget = view.available_ucr * 3 // 4
        like = self.engine.random.choice(self.documents).document
        if budget < like.budget_ucr:
            return
        for twin in ("a", "b"):
            changed = {
                "nonce": self.engine.random.randbytes(16).hex(),
                "name": f"{like.name}-{twin}",
                "budget_ucr": budget,
                "accept_receipts_up_to_ucr": budget,
                "issued_ms": self.now_ms(),
                "expires_ms": self.now_ms() + 86_400_000,
            }
            signed = sign_document(Job.model_validate(like.model_dump() | changed), self.key)
            self.market.names[signed.id] = signed.document.name
            self._send(signed, first=False)
            self.engine.after(
                self.engine.draw_ms(500, 60_000), partial(self._think_better, signed.id)
            )

    def _think_better(self, job: str) -> None:
        if job in self.jobs:
            self._once(Jobs.cancel, job)

    def act(self) -> None:
        """Change its mind about one of its jobs."""
        if not self.jobs:
            return
        draw = self.engine.random
        job = draw.choice(sorted(self.jobs))
        match draw.choice(("cancel", "pause", "pause", "resume", "resume", "raise")):
            case "cancel":
                self._once(Jobs.cancel, job)
            case "pause":
                self._once(Jobs.pause, job)
            case "resume":
                self._once(Jobs.resume, job)
            case "raise":
                self._raise(job, draw.randint(1, 400_000))

    def _once(self, act: Callable[..., Any], *what: Any) -> None:
        try:
            self._ask(act, self.party, *what)
        except (BrokerAway, Refusal, *UNKEPT):
            return

    def _raise(self, job: str, added_ucr: int) -> None:
        model = self.market.auditor.jobs.get(job)
        if model is None or model.state in ENDED:
            return
        budget = model.budget_ucr + added_ucr
        accept = min(budget, model.accept_ucr + added_ucr)
        amendment = Amendment(
            renter=self.party,
            broker=self.market.broker_key.party,
            job=job,
            budget_ucr=budget,
            accept_receipts_up_to_ucr=accept,
            issued_ms=self.now_ms(),
        )
        envelope = sign_document(amendment, self.key).envelope
        self._once(Jobs.resume, job, envelope)

    # -- watching -----------------------------------------------------------------------------

    def _look(self) -> None:
        for job, signed in self.jobs.items():
            model = self.market.auditor.jobs[job]
            if not self.mute and (model.state not in ENDED or self.engine.happens(0.05)):
                self._cosign(job, signed)
            if model.state == "paused" and (self.generous or self.engine.happens(0.1)):
                if self.generous or self.engine.happens(0.5):
                    self._raise(job, self.engine.draw_ms(50_000, 2_000_000))
                else:
                    self._once(Jobs.resume, job)
        if self.engine.happens(0.1) and self.market.honest:
            self.check_log()
        self.engine.after(LOOK_MS, self._look)

    def check_log(self) -> None:
        """As the SDK does before it signs. Raises LogRewritten."""
        broker = self.market.broker_key.party
        size = head_of(self.head, broker).size if self.head else 0
        try:
            view = self.market.broker.call(self.market.broker.broker.views.log, size)
        except (BrokerAway, *UNKEPT):
            return
        self.head = proven_growth(view, self.head, broker) if self.head else view.tree_head

    def _cosign(self, job: str, signed: Signed[Job]) -> None:
        host = self.market.broker
        try:
            page = host.call(host.broker.views.receipts, self.party, job, unsigned=True)
            if not page.receipts:
                return
            result = cosign(page, self.key, self.market.broker_key.party, signed.envelope)
            for envelope in result.signed:
                host.call(host.broker.countersigning.countersign, self.party, envelope.id, envelope)
        except (BrokerAway, Refusal, *UNKEPT):
            return

    def verify(self) -> None:
        """At the end: results are what the job computes undisturbed; the evidence verifies."""
        broker = self.market.broker
        views = broker.broker.views
        killed = {job for job, _, _ in self.market.auditor.charges.free_kills} & self.jobs.keys()
        some = killed if killed and self.engine.happens(0.5) else self.jobs.keys()
        chosen = self.engine.random.choice(sorted(some)) if some else ""
        for job, signed in self.jobs.items():
            view = views.job(self.party, job)
            if str(view.state) == "succeeded" and signed.document.outputs:
                self._check_outputs(view.outputs_index_digest, signed.document)
            if job != chosen:
                continue
            data = views.export(self.party, job).model_dump_json().encode()
            verdict = verify_export(data, broker=self.market.broker_key.party)
            if verdict.problems:
                raise Violation(f"the export of {signed.document.name}: {verdict.problems[0]}")
            if verdict.charged_ucr != self.market.auditor.jobs[job].charged_ucr:
                raise Violation(f"the export of {signed.document.name} says another charge")
            if verdict.lost_work_charged_ucr:
                raise Violation(f"{signed.document.name} paid for lost work")

    def _check_outputs(self, index_digest: str | None, document: Job) -> None:
        broker = self.market.broker
        if index_digest is None:
            raise Violation(f"{document.name} succeeded and its outputs aren't there")
        if index_digest in broker.blobs.damaged:
            return  # What can't be read any more keeps nothing: its files went with the index.
        right = state_at(document.nonce, Program.of(document).steps).encode()
        digest = digest_of(right)
        if broker.blobs.whole(digest) is None and digest not in broker.blobs.damaged:
            raise Violation(f"{document.name}: its outputs aren't those of an undisturbed run")
