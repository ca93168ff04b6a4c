"""The faults that a simulated market may suffer, by name, and their toggles."""

from __future__ import annotations

FAULTS: dict[str, str] = {
    "break": "a connection breaks; what was under way is lost, or some of it arrives late",
    "delay": "a line is slow for a while",
    "partition": "nothing passes between one agent and the broker, in both directions; at once, or "
    "as it begins to pull",
    "one-way": "nothing passes in one direction, while the other works",
    "repeat": "an agent sends old, acknowledged messages again, in any order",
    "broker-crash": "the broker dies before or after one of its next commits, and comes back",
    "broker-full": "the broker's disk is full for a while: commits and uploads fail",
    "database": "the connection to the database breaks over a commit, made or not; or it is away",
    "bit-flip": "a blob or a pack in the broker's store is damaged",
    "put": "content moves past the broker (in four markets of ten): what is put into the store is "
    "lost, spoilt or not answered, comes late or twice, or is committed before it is there",
    "sweeper": "the sweeper of unclaimed files comes between an upload's file or pack and its rows",
    "power-cut": "the broker's machine loses power: its disk forgets what was not fsynced",
    "bad-fsync": "an fsync of the broker's fails, once: what it was to write is lost; of any kind, "
    "or of one that is drawn, so that those that come seldom fail, too",
    "blackout": "the broker is away for minutes",
    "shard": "a match shard dies, at once or before or after it replies",
    "shard-slow": "for some minutes shards are slow to hear or to answer now and then",
    "shard-zombie": "a match shard that was replaced goes on proposing",
    "ray-host": "Ray dies with all its shards, or hangs, and comes back after a while",
    "verifier": "the verifier's worker dies: what it was checking must be checked again",
    "agent-crash": "an agent dies before or after one of its next commits or effects",
    "machine": "a provider's machine reboots, at once or just when something was saved: its runs "
    "are gone, and what nobody fsynced is torn",
    "run-killed": "somebody kills a run on the provider's machine, or a worker of it; some are "
    "seen doing it",
    "gpu-lost": "a device fails while a run is on it: it ends, hangs or goes on; back later",
    "engine": "a container engine stops a run, or restarts: with its runs, or without them",
    "registry": "a registry is busy, or knows nothing of an image, for one machine or for all; or "
    "a tag is given to another image; or an image is deleted that a job has run on, and its "
    "machine is taken back",
    "slow-registry": "a registry is so slow that a pull takes a quarter of an hour",
    "worker-oom": "the kernel kills a worker for the memory that its job asked for",
    "self-kill": "a job sends itself KILL or TERM, or returns 137 or 143 by itself",
    "stall": "a job that is to be paused when it stalls stands still for good",
    "start-fails": "a machine can start nothing for a while, or only every other run",
    "deadline": "an agent dies and comes back long after the deadlines of its runs",
    "torn": "a checkpoint is torn on the provider's disk",
    "agent-full": "a provider's disk is full",
    "pause": "an agent hangs for a while (SIGSTOP) and goes on",
    "agent-clock": "a machine's wall clock jumps, up to a day, or has local time for some seconds, "
    "and an agent starts with it",
    "broker-clock": "the broker's wall clock is set back, with or without a restart, for a while",
    "upgrade": "the broker is stopped and comes back with other settings: fee, heartbeat, limits",
    "drift": "a machine's clock runs fast or slow from now on, by up to 500 ppm (NTP's most)",
    "reclaim": "an owner takes devices back, at once or just when a run is about to finish, and "
    "offers them again later",
    "inflate": "a provider claims more time than its run had",
    "fork": "a provider signs two receipts with one number",
    "two-leases": "a provider lets a lease pass, then signs it and the next one, and claims both",
    "zombie": "a provider goes on writing under leases that have gone elsewhere",
    "phantom": "a provider reports a checkpoint whose content it never sent",
    "partial": "a provider reports outputs, or partial ones, of a run that goes on, as a step far "
    "ahead, and rests a receipt on them",
    "huge-step": "a provider reports a whole checkpoint as a step after which none can be told",
    "rewrite": "in the end the broker drops, changes or reorders what it has logged: it is caught",
    "renter-acts": "renters cancel, pause, resume, and raise budgets at odd moments",
    "renter-repeats": "a renter sends the same job again",
    "renter-drains": "a renter sends two jobs at once, each with most of what is there as budget",
    "renter-mute": "some renters never sign a receipt",
    "bad-jobs": "some jobs fail, yield, hang, kill themselves, are deaf to a stop, or end with 0 at"
    " it; some have an image that is nowhere; some grow one file for ever",
}


class UnknownFault(ValueError):
    """A fault of that name doesn't exist."""


def parse_faults(text: str) -> frozenset[str]:
    """Return the faults that `all`, `none` or a list with commas names; a leading '-' leaves out.

    Raises UnknownFault.
    """
    chosen: set[str] = set()
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name == "all":
            chosen |= FAULTS.keys()
        elif name == "none":
            chosen.clear()
        elif name.removeprefix("-") not in FAULTS:
            raise UnknownFault(f"no fault {name!r}; there are: {', '.join(FAULTS)}")
        elif name.startswith("-"):
            chosen.discard(name[1:])
        else:
            chosen.add(name)
    return frozenset(chosen)
