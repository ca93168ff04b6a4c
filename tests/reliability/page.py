"""Renders the records of reliability runs as one page. Pure: records in, text out."""

from __future__ import annotations

import itertools
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


@dataclass(frozen=True)
class Alarm:
    """A violation that was the auditor's own mistake, and mended."""

    seed: int
    said: str
    mistake: str


def page(records: Mapping[str, Record], bugs: Sequence[Bug], alarms: Sequence[Alarm]) -> str:
    """Return the page. `records`: by kind; those that are missing have no section."""
    parts = [HEAD]
    if "simulation" in records:
        parts.append(_simulation(records["simulation"], alarms))
    for kind, section in _SECTIONS.items():
        if kind in records:
            parts.append(section(records[kind]))
    parts.append(_bugs(bugs))
    return "\n".join(parts)


def violations_of(run: Record, alarms: Sequence[Alarm]) -> list[str]:
    """Return what broke a rule in a run, false alarms left out."""
    mistaken = tuple(f"seed {alarm.seed}: {alarm.said}" for alarm in alarms)
    return [said for said in run["violations"] if not said.startswith(mistaken)]


def clean_runs(runs: Sequence[Record], alarms: Sequence[Alarm]) -> list[Record]:
    """Return the runs since the last violation, the newest first."""
    return list(itertools.takewhile(lambda run: not violations_of(run, alarms), runs[::-1]))


def _simulation(record: Record, alarms: Sequence[Alarm]) -> str:
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
        ("**violations**", f"**{len(violations_of(record, alarms))}**"),
        ("wall time, two processes", f"{record['seconds'] / 60:.0f} min"),
    ]
    clean = clean_runs(record["runs"], alarms)
    clean_rows = [
        (
            run["commit"],
            f"{run['first_seed']:,}",
            f"{run['markets']:,}",
            f"{run['simulated_hours']:,.0f} h",
            f"{run['faults']:,}",
            f"{run['seconds'] / 60:.0f} min",
        )
        for run in clean
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
        f"The last **{sum(run['markets'] for run in clean):,} markets** that were taken in here, "
        f"with {sum(run['faults'] for run in clean):,} faults, are without a violation, the newest "
        "run first:",
        "",
        *_table(
            ("commit", "seeds from", "markets", "simulated", "faults", "wall time"), clean_rows
        ),
        "",
    ]
    lines += [f"- {violation}" for violation in violations_of(record, alarms)]
    lines += [
        "Not counted are the auditor's own mistakes. Each was mended by excusing what it had not "
        "known, which changes no history, and its seed was simulated again without a violation:",
        "",
        *_table(
            ("seed", "it said", "and hadn't known"),
            [(str(a.seed), a.said, a.mistake) for a in alarms],
        ),
        "",
    ]
    return "\n".join(lines)


def _mutants(record: Record) -> str:
    found = [m for m in record["mutants"] if m["seed"] is not None]
    rows = [
        (
            m["name"].replace("_", " "),
            f"seed {m['seed']}" if m["seed"] is not None else "SURVIVED",
            _brief(m["says"]),
        )
        for m in record["mutants"]
    ]
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
        (
            "losses, and steps lost",
            f"{record['losses']:,}, {record['lost_steps']:,} of {record['steps']:,}",
        ),
        ("losses of more than two checkpoint intervals", f"{len(record['long_losses']):,}"),
        (
            "  of them while nothing was away that a checkpoint needs",
            f"{record['unexplained_losses']:,}",
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


def _writes(record: Record) -> str:
    processes = record["processes"]
    rows = [
        (
            process,
            f"{found['points']}",
            f"{found['killed_at']}",
            f"{found['eio_at']}",
            f"{found['enospc_at']}",
        )
        for process, found in processes.items()
    ]
    rows.append(
        (
            "**all**",
            *(
                f"**{sum(found[what] for found in processes.values())}**"
                for what in ("points", "killed_at", "eio_at", "enospc_at")
            ),
        )
    )
    still = record["every_write_fails"]
    return "\n".join(
        [
            "## Every durable write",
            "",
            "Jobs run while each place in our code that makes something durable meets `kill -9`,",
            "`EIO` and `ENOSPC` at its fsync, by strace. A crash point is such a place: the",
            "process, the sort of file and the use-case; each is met once or more often by each",
            "fault. What ended is started again.",
            "",
            f"`{record['command']}` at {record['commit']}, in {record['seconds'] / 60:.0f} min",
            "",
            *_table(("process", "crash points found", "killed at", "EIO at", "ENOSPC at"), rows),
            "",
            *_table(
                ("", ""),
                [
                    *_faults_and_promises(record),
                    (
                        "calls that failed while every one did (broker, agent)",
                        f"{sum(still.values()):,}",
                    ),
                    (
                        "requests meanwhile, and how many were acknowledged",
                        f"{record['attempts_meanwhile']:,}, {record['acknowledged_meanwhile']}",
                    ),
                ],
            ),
            "",
            *(f"- not met: {line}" for line in record["not_met"]),
            *record.get("remarks", ()),
            "",
        ]
    )


def _database(record: Record) -> str:
    rows = [
        (one["process"], one["file"], one["fault"], f"{one['times']}") for one in record["files"]
    ]
    return "\n".join(
        [
            "## Every durable write of the database",
            "",
            "The same for a broker on PostgreSQL; the faults meet the database's own processes.",
            "The broker itself stays up throughout.",
            "",
            f"`{record['command']}` at {record['commit']}, in {record['seconds'] / 60:.0f} min",
            "",
            *_table(("process", "file", "fault", "times"), rows),
            "",
            *_table(("", ""), _faults_and_promises(record)),
            "",
            *record.get("remarks", ()),
            "",
        ]
    )


def _storms(record: Record) -> str:
    lines = [
        "## Storms",
        "",
        "Networks, time, disks and operators' deeds on real processes. Each is one run; at its",
        "end every job has succeeded with the weights of an undisturbed run, each line of its",
        "output is there once and in order, exports verify, and the ledger balances.",
        "",
    ]
    for storm in record["storms"]:
        injected = [(what, f"{storm['injected'][what]:,}") for what in sorted(storm["injected"])]
        found = [(what, f"{value:,}") for what, value in storm["notes"].items()]
        held = [
            ("jobs finished", f"{storm['finished']:,} of {storm['jobs']:,}"),
            ("results as an undisturbed run's", f"{storm['identical']:,} of {storm['jobs']:,}"),
            ("recoveries", f"{storm['recoveries']:,}"),
            ("lines of output, each once and in order", f"{storm['lines']:,}"),
            ("lost work that was charged", f"{storm['lost_work_charged_ucr']} ucr"),
            ("duplicate charges", f"{storm['duplicate_charges']}"),
            ("discrepancy between receipts and ledger", f"{storm['discrepancy_ucr']} ucr"),
        ]
        lines += [
            f"`{storm['command']}` at {storm['commit']}, in {storm['seconds'] / 60:.1f} min",
            "",
            *_table(("", ""), [*injected, *found, *held]),
            "",
        ]
    lines += [*record.get("remarks", ()), ""]
    return "\n".join(lines)


def _odd_jobs(record: Record) -> str:
    late = record["late"]
    rows = [
        ("odd jobs, each drawn from its seed", f"{record['jobs']:,}"),
        *(
            (f"  that ended as {reason}", f"{n:,}")
            for reason, n in sorted(record["reasons"].items())
        ),
        ("ends that nobody who has read the job would expect", f"{len(record['problems'])}"),
        ("the latest that the agent's loop was", f"{record['worst_late_ms']} ms"),
        ("  a bare loop beside it", f"{record['worst_beside_ms']} ms"),
        ("times that it was over 200 ms later than that", f"{len(late)}"),
    ]
    return "\n".join(
        [
            f"## Odd jobs: {record['runner']} runner",
            "",
            "One agent, and jobs that put what they like into every folder that they can write, at",
            "any moment, and end in every way.",
            "",
            f"`{record['command']}` at {record['commit']}, in {record['seconds'] / 60:.0f} min",
            "",
            *_table(("", ""), rows),
            "",
            *(f"- {text}" for text in (*record["problems"][:10], *late[:10])),
            "",
        ]
    )


def _faults_and_promises(record: Record) -> list[tuple[str, str]]:
    return [
        *(
            (f"{fault}s" if fault == "kill" else fault, f"{times:,}")
            for fault, times in sorted(record["faults"].items(), reverse=True)
        ),
        ("jobs finished", f"{record['finished']:,} of {record['jobs']:,}"),
        *(
            # Of records from when a job's own checkpoint was fsynced in the job.
            ("failed, as their own write did", f"{record[own]}")
            for own in ("jobs_failed_of_their_own_errors",)
            if own in record
        ),
        ("results as an undisturbed run's", f"{record['identical']:,} of {record['finished']:,}"),
        ("lost work that was charged", f"{record['lost_work_charged_ucr']} ucr"),
        ("duplicate charges", f"{record['duplicate_charges']}"),
        ("discrepancy between receipts and ledger", f"{record['discrepancy_ucr']} ucr"),
        ("acknowledged jobs that were gone", f"{record['acknowledged_and_gone']}"),
        ("processes left running, Ray's among them", f"{record['left_running']}"),
    ]


_SECTIONS = {
    "mutants": _mutants,
    "chaos": _chaos,
    "writes": _writes,
    "database": _database,
    "storms": _storms,
    "odd-process": _odd_jobs,
    "odd-docker": _odd_jobs,
    "recovery": _recovery,
}
