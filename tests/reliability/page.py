"""Renders the records of reliability runs as one page. Pure: records in, text out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

HEAD = """\
# How it fails

Made by `make reliability` from what its runs wrote to `tests/reliability/records/`; a test fails
when this page is stale. Every figure has the command that makes it anew. What has not been run is
not on the page.
"""


@dataclass(frozen=True)
class Bug:
    """A bug that these runs found in our own code."""

    what: str
    found_by: str
    fix: str


def page(records: Mapping[str, Record], bugs: Sequence[Bug]) -> str:
    """Return the page. `records`: by kind; those that are missing have no section."""
    parts = [HEAD]
    for kind, section in _SECTIONS.items():
        if kind in records:
            parts.append(section(records[kind]))
    parts.append(_bugs(bugs))
    return "\n".join(parts)


def _simulation(record: Record) -> str:
    faults = record["faults"]
    rows = [
        ("markets (seeds from " + f"{record['first_seed']:,})", f"{record['markets']:,}"),
        ("jobs", f"{record['jobs']:,}"),
        ("simulated time", f"{record['simulated_hours']:,.0f} h"),
        ("injected faults", f"{sum(faults.values()):,}"),
        (
            "crash points died at, of those met",
            f"{record['crash_points_died_at']} of {record['crash_points']}",
        ),
        ("charged", f"{record['charged_ucr'] / 1e6:,.2f} credits"),
        ("work lost and not charged", f"{record['lost_device_ms'] / 3.6e6:,.1f} device-hours"),
        ("**violations**", f"**{len(record['violations'])}**"),
        ("wall time, two processes", f"{record['seconds'] / 60:.0f} min"),
    ]
    lines = [
        "## Simulated markets",
        "",
        "The real market, service, agent core, session and co-signing on a virtual clock; an",
        "independent model checks every commit to the micro-credit. Each market has",
        f"{record['providers_each']} providers, 20 jobs, {record['hours_of_faults_each']:g} hours",
        "of faults (about one a minute), and then calm, in which everything must come to its end.",
        "",
        f"`python -m tests.simulation --from {record['first_seed']} --seeds {record['markets']}"
        f" --processes 2` at {record['commit']}",
        "",
        *_table(("", ""), rows),
        "",
        *_table(("fault", "times"), [(name, f"{faults[name]:,}") for name in sorted(faults)]),
        "",
    ]
    for violation in record["violations"]:
        lines.append(f"- {violation}")
    return "\n".join(lines)


def _mutants(record: Record) -> str:
    found = [m for m in record["mutants"] if m["seed"] is not None]
    rows = [
        (m["name"].replace("_", " "), f"seed {m['seed']}" if m["seed"] is not None else "SURVIVED",
         _brief(m["says"])) for m in record["mutants"]
    ]  # fmt: skip
    return "\n".join(
        [
            "## Planted bugs",
            "",
            "Known bugs, applied one at a time; the simulator has to find each within "
            f"{record['seeds']} seeds.",
            "",
            f"`make mutants` at {record['commit']}: **{len(found)} of {len(rows)} found**",
            "",
            *_table(("bug", "found by", "how it shows"), rows),
            "",
        ]
    )


def _chaos(record: Record) -> str:
    kills = record["kills"]
    recovery = record["recovery_s"]
    rows = [
        ("real kills survived", f"{sum(kills.values()):,}"),
        *((f"  of {name}", f"{kills[name]:,}") for name in sorted(kills)),
        ("jobs finished", f"{record['finished']:,} of {record['jobs']:,}"),
        ("results as an undisturbed run's", f"{record['identical']:,} of {record['jobs']:,}"),
        ("steps lost", f"{record['lost_steps']:,} of {record['steps']:,}"),
        (
            "longest loss",
            f"{record['longest_loss_steps']} steps",
        ),
        (
            "recovery p50 / p95 / p99",
            f"{recovery['p50']:.1f} / {recovery['p95']:.1f} / {recovery['p99']:.1f} s",
        ),
        ("lost work that was charged", f"{record['lost_work_charged_ucr']} ucr"),
        ("duplicate charges", f"{record['duplicate_charges']}"),
        ("discrepancy between receipts and ledger", f"{record['discrepancy_ucr']} ucr"),
        ("runs left running", f"{record['left_running']}"),
    ]
    return "\n".join(
        [
            "## Real processes",
            "",
            "A broker on SQLite with Ray, agents and runs as real processes, killed with -9 at",
            "random and started again while jobs run.",
            "",
            f"`{record['command']}` at {record['commit']}, in {record['seconds'] / 60:.0f} min",
            "",
            *_table(("", ""), rows),
            "",
            *record.get("remarks", ()),
            "",
        ]
    )


def _recovery(record: Record) -> str:
    rows = [
        (
            one["what"],
            f"{one['rounds']}",
            f"{one['p50_s']:.1f} s",
            f"{one['p95_s']:.1f} s",
            f"{one['detection_p50_s']:.1f} s" if one["what"] == "recovery" else "-",
            f"at most {one['limit_s']:.0f} s",
        )
        for one in record["measured"]
    ]
    return "\n".join(
        [
            "## How long a loss lasts",
            "",
            f"`make bench` at {record['commit']}, runner {record['runner']}, default settings:",
            "from `kill -9` of agent and run to the first new step elsewhere, and from the end of",
            "a reclaim's drain to it.",
            "",
            *_table(
                ("", "rounds", "p50", "p95", "of which detection, p50", "limit for the p95"), rows
            ),
            "",
        ]
    )


def _bugs(bugs: Sequence[Bug]) -> str:
    rows = [(bug.what, bug.found_by, bug.fix) for bug in bugs]
    return "\n".join(
        [
            "## What this work has found",
            "",
            "Bugs in our own code, before anybody was hurt by them.",
            "",
            *_table(("bug", "found by", "fix"), rows),
            "",
        ]
    )


def _brief(says: str) -> str:
    """Return it in a line, with the heads of long ids only."""
    short = re.sub(r"[0-9a-f]{40,}", lambda found: found[0][:8], says)
    return short if len(short) <= 120 else short[:119] + "…"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]


_SECTIONS = {
    "simulation": _simulation,
    "mutants": _mutants,
    "chaos": _chaos,
    "recovery": _recovery,
}
