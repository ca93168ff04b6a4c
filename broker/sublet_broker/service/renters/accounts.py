"""Parties introduce themselves, and the operator credits their accounts."""

from sublet_broker.market import ledger
from sublet_broker.market.accepted import accepted
from sublet_broker.market.facts import (
    DepositFact,
    PartyFact,
)
from sublet_broker.service.errors import Refusal
from sublet_broker.service.queries.money import Money
from sublet_broker.service.unit_of_work.context import Context
from sublet_broker.service.unit_of_work.signed_input import (
    as_refusal,
    check_fresh,
    receive_document,
)
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.api import BalanceView, PartyView
from sublet_contracts.documents import (
    Deposit,
    DocumentRefused,
    KeyDocument,
    Signed,
)
from sublet_contracts.envelope import Envelope
from sublet_contracts.problems import ProblemCode


class Accounts:
    """Parties and deposits."""

    def __init__(self, context: Context, money: Money) -> None:
        self._context = context
        self._money = money

    def register_key(self, envelope: Envelope) -> PartyView:
        """Take up a party that introduces itself; again with a newer name: renamed."""
        try:
            signed = receive_document(self._context, envelope, KeyDocument)
            with self._context.work() as work:
                check_fresh(self._context, work.now_ms, issued_ms=signed.document.issued_ms)
                return self._register(work, signed)
        except DocumentRefused as error:
            raise as_refusal(error) from error

    def _register(self, work: UnitOfWork, signed: Signed[KeyDocument]) -> PartyView:
        document = signed.document
        known = work.get(PartyFact, document.party)
        settings, rate_limits = self._context.settings, self._context.rate_limits
        if known is None:
            rate_limits.demand("new parties", "", settings.max_new_parties_an_hour, work.now_ms)
            renamed = True
        else:
            newer = accepted(known.envelope, KeyDocument).issued_ms < document.issued_ms
            renamed = newer and known.name != document.name
            if renamed:
                most = settings.max_renames_an_hour
                rate_limits.demand("new names", document.party, most, work.now_ms)
        if known is None or renamed:
            since_ms = known.since_ms if known else work.now_ms
            known = PartyFact(document.party, document.name, since_ms, signed.envelope)
            work.put(known)
            work.record(signed.id)
        return PartyView(party=known.id, name=known.name, since_ms=known.since_ms)

    def deposit(self, caller: str, envelope: Envelope) -> BalanceView:
        """Credit an account. Only the operator may: whoever has the broker's key."""
        if caller != self._context.party:
            raise Refusal(ProblemCode.NOT_OPERATOR, "only the broker's own key may deposit")
        try:
            signed = receive_document(
                self._context, envelope, Deposit, signed_by=(self._context.party,)
            )
            with self._context.work() as work:
                self._deposit(work, signed)
        except DocumentRefused as error:
            raise as_refusal(error) from error
        return self._money.balance(signed.document.party)

    def _deposit(self, work: UnitOfWork, signed: Signed[Deposit]) -> None:
        document = signed.document
        if work.get(DepositFact, signed.id) is not None:
            return
        check_fresh(self._context, work.now_ms, issued_ms=document.issued_ms)
        work.post(
            [
                ledger.Move(
                    ledger.transfer_id("deposit", signed.id),
                    ledger.WORLD,
                    ledger.available(document.party),
                    document.amount_ucr,
                    signed.id,
                    document.memo or "deposit",
                )
            ]
        )
        work.add(DepositFact(signed.id, document.party, signed.envelope))
        work.record(signed.id)
