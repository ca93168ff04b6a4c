"""Commands about money: balance, statement, fund."""

import time
from collections.abc import Sequence
from pathlib import Path

from sublet.cli.parser import Parser, open_client, with_broker, with_job, with_json
from sublet.terminal.text import clip, paint, safe, state, table
from sublet_contracts.amounts import format_ago, format_credits, format_duration
from sublet_contracts.api import Charge, StatementView
from sublet_contracts.keys import short
from sublet_contracts.reasons import MEANINGS, Fault

_ACCEPTED = {
    "renter": "signed by you",
    "job": "within the bound you signed in the job",
    "none": "no receipt",
}


def balance(argv: Sequence[str]) -> int:
    """Show the account."""
    parser = with_json(with_broker(Parser("balance", "Your account, in credits.")))
    parser.add_argument("--lines", type=int, default=10, metavar="N", help="latest transfers shown")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        view = client.balance()
    if options.json:
        print(view.model_dump_json(indent=2))
        return 0
    amounts = [("available", view.available_ucr), ("held by jobs", view.held_ucr)]
    if view.earned_ucr:
        amounts.append(("earned", view.earned_ucr))
    width = max(len(format_credits(amount)) for _, amount in amounts)
    for name, amount in amounts:
        print(f"{name:<13} {format_credits(amount).rjust(width)}")
    latest = sorted(view.lines, key=lambda line: line.time_ms, reverse=True)[: options.lines]
    if latest:
        now_ms = time.time_ns() // 1_000_000
        rows = [
            [
                format_ago(line.time_ms, now_ms),
                line.account.rsplit(":", 1)[-1],
                ("+" if line.amount_ucr >= 0 else "") + format_credits(line.amount_ucr),
                short(line.cites),
                clip(safe(line.memo), 26),
            ]
            for line in latest
        ]
        print("\n" + table(("when", "account", "amount", "cites", "what"), rows, right=(2,)))
    if not view.available_ucr and not view.held_ucr:
        print("\nAn operator credits it: sublet fund CREDITS --party", view.party)
    return 0


def statement(argv: Sequence[str]) -> int:
    """Show a job's charges."""
    parser = with_job(
        with_json(with_broker(Parser("statement", "Every charge of a job, and what it rests on.")))
    )
    options = parser.parse_args(argv)
    with open_client(options) as client:
        job = client.job(options.job)
        view = job.statement()
        names = {run.lease: run.provider_name for run in job.view().runs}
    if options.json:
        print(view.model_dump_json(indent=2))
        return 0
    print(statement_text(view, names))
    return 0


def statement_text(view: StatementView, names: dict[str, str]) -> str:
    """Return a statement for people; `names`: lease -> what its provider is called."""
    head = f"{paint(safe(view.name), 'bold')} ({short(view.job)})  {state(view.state)}"
    if not view.charges:
        held = f"; {format_credits(view.held_ucr)} are held" if view.held_ucr else ""
        return f"{head}\n\nNothing has been charged yet{held}. A charge comes as a run ends."
    rows = [
        [
            str(charge.epoch),
            clip(safe(names.get(charge.lease, "")) or short(charge.provider), 14),
            format_credits(charge.price_ucr_per_device_hour),
            format_duration(charge.payable_device_ms),
            format_duration(charge.lost_device_ms) if charge.lost_device_ms else "-",
            format_credits(charge.charged_ucr),
            short(charge.receipt) if charge.receipt else "none",
        ]
        for charge in view.charges
    ]
    heads = ("run", "provider", "price/h", "paid time", "lost", "charged", "receipt")
    lines = [head, "", table(heads, rows, right=(0, 2, 3, 4, 5)), ""]
    lines += [_why(charge) for charge in view.charges]
    lines += [
        "",
        f"charged    {format_credits(view.charged_ucr)} "
        f"of a budget of {format_credits(view.budget_ucr)}"
        + (f"; {format_credits(view.held_ucr)} still held" if view.held_ucr else "")
        + (f"; {format_credits(view.released_ucr)} given back" if view.released_ucr else ""),
    ]
    lost_ms = sum(charge.lost_device_ms for charge in view.charges)
    if lost_ms:
        lines.append(
            f"lost work  {format_duration(lost_ms)}, "
            f"charged {format_credits(view.lost_work_charged_ucr)}"
        )
    lines.append(f"evidence   sublet receipts export {short(view.job)} > f.json")
    return "\n".join(lines)


def _why(charge: Charge) -> str:
    fault = "" if charge.fault is Fault.NOBODY else f" — answers: the {charge.fault}"
    return f"  run {charge.epoch}: {MEANINGS[charge.reason].says}{fault}\n" + paint(
        f"         receipt {_ACCEPTED.get(charge.accepted_by, charge.accepted_by)}", "dim"
    )


def fund(argv: Sequence[str]) -> int:
    """Credit an account by the operator's key."""
    parser = with_json(
        with_broker(
            Parser("fund", "Credit an account. Needs the operator's key: the broker's own.")
        )
    )
    parser.add_argument("amount", metavar="CREDITS", help="how much, like 5 or 0.25")
    parser.add_argument("--party", help="whose account; default: yours")
    parser.add_argument(
        "--operator-key",
        required=True,
        type=Path,
        metavar="FILE",
        help="DATA/broker.key of the broker",
    )
    parser.add_argument("--memo", default="", help="shown in the account")
    options = parser.parse_args(argv)
    with open_client(options) as client:
        party = options.party or client.party
        view = client.fund(party, options.amount, options.operator_key, memo=options.memo)
    if options.json:
        print(view.model_dump_json(indent=2))
    else:
        print(f"{short(party)} has {format_credits(view.available_ucr)} available")
    return 0
