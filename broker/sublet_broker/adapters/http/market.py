"""Calls about the market and money: broker, keys, offers, balances, deposits, receipts."""

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from sublet_broker.adapters.http.openapi import READ, SIGNED, WRITE, problems, takes
from sublet_broker.adapters.http.signed_calls import EdgeOf, Reading, Sending
from sublet_contracts.api import (
    BalanceView,
    BrokerInfo,
    EarningsView,
    LogView,
    MatchRequest,
    MatchView,
    OffersPage,
    PartyView,
    SignedRequest,
)

router = APIRouter(prefix="/v1")

Receipt = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="the receipt's document id")]


@router.get("/broker", tags=["market"], summary="Who the broker is", response_model=BrokerInfo)
async def info(edge: EdgeOf) -> BrokerInfo:
    """Its id, time, fee and limits. Unsigned: clients pin the id on first use."""
    return await edge.call(edge.broker.views.info, edge.version)


@router.post(
    "/keys",
    tags=["market"],
    summary="Introduce a party",
    response_model=PartyView,
    responses=WRITE,
    openapi_extra=takes(SignedRequest, "a signed `key` document"),
)
async def register(call: Sending) -> Response:
    """Once per party, before anything else; again with another name renames it."""
    envelope = call.parse(SignedRequest).envelope
    return await call.answer(lambda: call.edge.broker.accounts.register_key(envelope))


@router.get(
    "/offers",
    tags=["market"],
    summary="What is on offer",
    response_model=OffersPage,
    responses=READ,
    openapi_extra=SIGNED,
)
async def offers(
    call: Reading,
    kind: Annotated[str, Query(max_length=16, description="gpu or cpu; empty: all")] = "",
    region: Annotated[str, Query(max_length=64, description="empty: all")] = "",
) -> Response:
    """Open offers of connected machines, cheapest first."""
    return await call.answer(lambda: call.edge.broker.market.offers(kind, region))


@router.post(
    "/offers/match",
    tags=["market"],
    summary="What would this job get?",
    response_model=MatchView,
    responses=WRITE,
    openapi_extra=takes(MatchRequest, "the parts of a job that matter"),
)
async def match(call: Sending) -> Response:
    """The offers that fit; where there is none, which constraint fails and which to relax."""
    wanted = call.parse(MatchRequest)
    return await call.answer(lambda: call.edge.broker.market.match(call.party, wanted))


@router.get(
    "/balance",
    tags=["money"],
    summary="Your account",
    response_model=BalanceView,
    responses=READ,
    openapi_extra=SIGNED,
)
async def balance(call: Reading) -> Response:
    """What is available, held and earned, with the newest transfers."""
    return await call.answer(lambda: call.edge.broker.money.balance(call.party))


@router.get(
    "/log",
    tags=["money"],
    summary="The log, and that it only grew",
    response_model=LogView,
    responses=READ,
    openapi_extra=SIGNED,
)
async def log(
    call: Reading,
    since: Annotated[int, Query(ge=0, le=2**53 - 1, description="entries you have seen")] = 0,
) -> Response:
    """A signed head of the append-only log with the proof that it begins with what you have seen.
    Keep the newest head: a broker that drops or reorders what it logged can't prove it any more."""
    return await call.answer(lambda: call.edge.broker.views.log(since))


@router.get(
    "/earnings",
    tags=["money"],
    summary="What you have earned",
    response_model=EarningsView,
    responses=READ,
    openapi_extra=SIGNED,
)
async def earnings(call: Reading) -> Response:
    """A provider's settled charges, and what running leases would bring now."""
    return await call.answer(lambda: call.edge.broker.money.earnings(call.party))


@router.post(
    "/deposits",
    tags=["money"],
    summary="Credit an account",
    response_model=BalanceView,
    responses={**WRITE, **problems(403)},
    openapi_extra=takes(SignedRequest, "a `deposit` document, signed by the operator's key"),
)
async def deposit(call: Sending) -> Response:
    """Only the operator (the broker's own key) may."""
    envelope = call.parse(SignedRequest).envelope
    answer = await call.answer(lambda: call.edge.broker.accounts.deposit(call.party, envelope))
    call.edge.wake_market()
    return answer


@router.post(
    "/receipts/{receipt}/signature",
    tags=["money"],
    summary="Countersign a receipt",
    status_code=204,
    response_class=Response,
    responses=WRITE,
    openapi_extra=takes(SignedRequest, "the receipt with the renter's signature added"),
)
async def countersign(call: Sending, receipt: Receipt) -> Response:
    """The renter agrees to the usage that the receipt states."""
    envelope = call.parse(SignedRequest).envelope
    answer = await call.answer(
        lambda: call.edge.broker.countersigning.countersign(call.party, receipt, envelope)
    )
    call.edge.loops.wake("settling")
    return answer
