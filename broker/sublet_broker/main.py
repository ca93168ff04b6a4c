"""The composition root: `sublet broker`. Everything is chosen and connected here, and only here."""

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import platformdirs
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from sublet_broker.adapters import log_format as logs
from sublet_broker.adapters.blobs.file_blobs import FileBlobs
from sublet_broker.adapters.blobs.opening import open_s3
from sublet_broker.adapters.blobs.s3_addresses import S3Addresses
from sublet_broker.adapters.blobs.s3_place import PlaceRefused
from sublet_broker.adapters.clock import SteadyClock, SystemEntropy
from sublet_broker.adapters.data_folder import DataFolder, FolderInUse
from sublet_broker.adapters.http.edge import Probe
from sublet_broker.adapters.http.server import (
    CannotListen,
    bind,
    compose,
    parse_listen,
    serve,
    url_of,
)
from sublet_broker.adapters.ray.engine import EngineConfig
from sublet_broker.adapters.ray.ports import RayPorts
from sublet_broker.adapters.sql.engine import Claim, DatabaseInUse, DatabaseUnsupported
from sublet_broker.adapters.sql.migrations import NewerData, migrate, release
from sublet_broker.adapters.sql.store import SqlStore
from sublet_broker.market.facts import CounterFact
from sublet_broker.service.broker import Broker, Ports, Settings
from sublet_broker.service.ports import Addresses, BlobStore, StorageFull
from sublet_contracts.keys import KeyRefused, SigningKey

log = logging.getLogger("sublet.broker")

LEAST_FREE_BYTES = 64 * 1024**2
DAY_MS = 86_400_000
KEY_FILE = "broker.key"
GC_THRESHOLD = (50_000, 20, 100)
"""Python's own (700, 10, 10) looks at everything that lives several times a minute: with a thousand
connections that is a tenth of a second in which nothing else runs."""
SWITCH_S = 0.0005
"""How long a thread may keep the interpreter from another that wants it. The event loop gives it
away with each frame that it reads or writes, and waits so long to get it back from a use-case:
with Python's own 5 ms it can't serve a thousand agents beside a few busy threads (measured)."""
LISTEN_FILE = "listen.json"


class CannotStart(Exception):
    """The broker can't start; the message says why and what to do. Nothing was changed."""


def main(argv: list[str] | None = None) -> int:
    """Run `sublet broker` with these arguments; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="sublet broker",
        description="Run a broker: one process, one port.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Settings()
    parser.add_argument(
        "--listen",
        default="127.0.0.1:8470",
        metavar="HOST:PORT",
        help="where it answers (port 0: any free one); put TLS in front for other machines",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        metavar="DIR",
        help=f"database, blobs and the broker's key; by default {default_data_dir()}",
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        default=None,
        help="postgresql://USER@HOST/NAME; by default SQLite in the data folder",
    )
    parser.add_argument(
        "--blobs",
        metavar="s3://BUCKET/PREFIX",
        default=None,
        help="where content lies; its key and address come from AWS_* variables, see "
        "deploy/blob-stores.md; by default the data folder",
    )
    parser.add_argument(
        "--ray",
        default="local",
        metavar="local|off|ADDRESS",
        help="start Ray here, do without (a small market on a small machine), or join a cluster",
    )
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="of stderr")
    parser.add_argument(
        "--fee-bps",
        type=_between(0, 10_000),
        default=defaults.fee_bps,
        metavar="N",
        help="the broker's share of each charge, in hundredths of a percent",
    )
    parser.add_argument(
        "--image-policy",
        choices=("any", "digest"),
        default=defaults.image_policy,
        help="digest: jobs must pin their image",
    )
    parser.add_argument(
        "--heartbeat-ms",
        type=_between(100, 60_000),
        default=defaults.heartbeat_ms,
        metavar="MS",
        help="how often agents report",
    )
    parser.add_argument(
        "--unknown-after-ms",
        type=_between(300, 600_000),
        default=defaults.unknown_after_ms,
        metavar="MS",
        help="silence after which a successor is prepared",
    )
    parser.add_argument(
        "--keep-days",
        type=_between(1, 3_650),
        default=defaults.keep_ended_ms // DAY_MS,
        metavar="N",
        help="how long ended jobs' outputs and checkpoints, and unused inputs, are kept",
    )
    args = parser.parse_args(argv)
    if args.unknown_after_ms < 2 * args.heartbeat_ms:
        parser.error("--unknown-after-ms must be at least twice --heartbeat-ms")
    return run_broker(
        listen=args.listen,
        data_dir=args.data,
        database=args.database,
        blobs=args.blobs,
        ray=args.ray,
        log_format=args.log_format,
        fee_bps=args.fee_bps,
        image_policy=args.image_policy,
        heartbeat_ms=args.heartbeat_ms,
        unknown_after_ms=args.unknown_after_ms,
        keep_days=args.keep_days,
    )


def default_data_dir() -> Path:
    """Return the data folder that is used where none is named."""
    return platformdirs.user_data_path("sublet") / "broker"


def run_broker(
    *,
    listen: str = "127.0.0.1:8470",
    data_dir: Path | None = None,
    database: str | None = None,
    blobs: str | None = None,
    ray: str = "local",
    log_format: Literal["text", "json"] = "text",
    fee_bps: int = 500,
    image_policy: str = "any",
    heartbeat_ms: int = 3_000,
    unknown_after_ms: int = 9_000,
    keep_days: int = 7,
) -> int:
    """Run a broker until SIGTERM or SIGINT. Return 0, or 1 when it could not start."""
    logs.set_up(log_format)
    settings = Settings(
        fee_bps=fee_bps,
        image_policy=image_policy,
        heartbeat_ms=heartbeat_ms,
        unknown_after_ms=unknown_after_ms,
        keep_ended_ms=keep_days * DAY_MS,
        keep_inputs_ms=keep_days * DAY_MS,
    )
    root = (data_dir or default_data_dir()).absolute()
    try:
        folder = _open_folder(root)
        try:
            # Only the folder's holder may touch this file: a reader must not find a dead broker's.
            (root / LISTEN_FILE).unlink(missing_ok=True)
            sock = bind(*_listen(listen))
            try:
                _run(folder, sock, database, blobs or "", ray, settings)
            finally:
                sock.close()
        finally:
            folder.close()
    except CannotStart as error:
        return _complain(str(error))
    except CannotListen as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _complain(why: str) -> int:
    print(f"sublet broker: {why}", file=sys.stderr)
    return 1


def _run(
    folder: DataFolder,
    sock: socket.socket,
    database: str | None,
    s3: str,
    ray: str,
    settings: Settings,
) -> None:
    _raise_file_limit()
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(*GC_THRESHOLD)
    try:
        key = SigningKey.load_or_create(folder.root / KEY_FILE)
    except KeyRefused as error:
        raise CannotStart(str(error)) from error
    except OSError as error:
        raise CannotStart(_unwritable(folder.root, error)) from error
    url = database or folder.database_url
    claim, store = _open_database(url)
    try:
        blobs, addresses, look_at_blobs = _open_blobs(folder, s3)
        clock = SteadyClock.resume(store)
        if clock.ahead_of_wall_ms() > 1_000:
            log.warning(
                "this machine's clock is %d s behind the time when the broker last ran; the "
                "broker goes on from there. Set the clock: timedatectl set-ntp true",
                clock.ahead_of_wall_ms() // 1000,
            )
        engine = EngineConfig(database_url=url, blobs_root=folder.blobs_root, address=ray, s3=s3)
        market = RayPorts.over(engine, store, blobs)
        ports = Ports(
            store=store,
            blobs=blobs,
            clock=clock,
            entropy=SystemEntropy(),
            matcher=market.matcher,
            verifier=market.verifier,
            settler=market.settler,
            addresses=addresses,
            pack_work=market.pack_work,
            key=key,
        )
        probes = (
            Probe("database", lambda: claim.trouble() or _check_database(store)),
            Probe("blobs", look_at_blobs),
            Probe(
                "matcher",
                lambda: (
                    ""
                    if market.engine.off or market.engine.alive()
                    else "Ray is away: the broker matches by itself"
                ),
                needed=False,
            ),
        )
        market.start()
        try:
            asyncio.run(_serve(Broker(ports, settings), folder.root, sock, probes, market))
        except (SQLAlchemyError, StorageFull) as error:
            # Of the first transaction: once it serves, whoever asked is told, and it goes on.
            raise CannotStart(_unusable(error)) from error
        finally:
            market.stop()
    finally:
        store.close()
        claim.close()


async def _serve(
    broker: Broker,
    root: Path,
    sock: socket.socket,
    probes: tuple[Probe, ...],
    market: RayPorts,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked(signum: int) -> None:
        log.info("%s: stopping; running jobs go on", signal.Signals(signum).name)
        loop.remove_signal_handler(signum)  # the second one ends it at once
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, asked, signum)
    url = url_of(sock)

    def ready() -> None:
        _write_atomically(root / LISTEN_FILE, {"url": url, "broker": broker.party})
        says = f"sublet broker is ready at {url} as {broker.party}, data in {root}"
        if not market.engine.off:
            says += (
                "; Ray's own ports listen on every interface, guarded by a token: close them to "
                "the outside (deploy/README.md)"
            )
        print(says, flush=True)

    edge, hub = compose(broker, release(), probes)
    try:
        await serve(edge, hub, sock, stop=stop, on_ready=ready, on_stop=market.stop)
    finally:
        # On a disk that can't be written it stays; whoever starts next takes it away.
        with contextlib.suppress(OSError):
            (root / LISTEN_FILE).unlink(missing_ok=True)
    log.info("stopped")


def _listen(text: str) -> tuple[str, int]:
    try:
        return parse_listen(text)
    except ValueError as error:
        raise CannotStart(f"--listen: {error}") from error


def _open_folder(root: Path) -> DataFolder:
    try:
        return DataFolder.open(root)
    except FolderInUse as error:
        raise CannotStart(str(error)) from error
    except OSError as error:
        raise CannotStart(_unwritable(root, error)) from error


def _unwritable(path: Path, error: OSError) -> str:
    return (
        f"can't write to {path}: {error.strerror}; make it writable for this user, "
        "free some space, or name another folder with --data"
    )


def _open_blobs(
    folder: DataFolder, s3: str
) -> tuple[BlobStore, Addresses | None, Callable[[], str]]:
    """Return the store, which works, its addresses if content moves by them, and what says whether
    it still works."""
    if s3:
        try:
            there = open_s3(s3, os.environ)
            there.prepare()
            addresses = S3Addresses(there)
            why_not = addresses.why_not(time.time_ns() // 1_000_000)
        except PlaceRefused as error:
            raise CannotStart(str(error)) from error
        if why_not:
            log.warning(
                "%s doesn't keep to what an address says (%s): content goes through this broker",
                s3,
                why_not,
            )
        return there, None if why_not else addresses, there.trouble
    root = folder.blobs_root
    here = FileBlobs(root)
    try:
        here.prepare()
    except OSError as error:
        raise CannotStart(_unwritable(root, error)) from error
    return here, None, lambda: _check_blobs(root)


def _open_database(url: str) -> tuple[Claim, SqlStore]:
    try:
        claim = Claim(url)
        try:
            migrate(url)
            return claim, SqlStore(url)
        except BaseException:
            claim.close()
            raise
    except (NewerData, DatabaseInUse, DatabaseUnsupported) as error:
        raise CannotStart(str(error)) from error
    except ArgumentError as error:
        raise CannotStart(f"--database: not a database URL: {error}") from error
    except SQLAlchemyError as error:
        raise CannotStart(_unusable(error)) from error


def _unusable(error: SQLAlchemyError | StorageFull) -> str:
    # The URL may hold a password: it is not shown, and neither are the driver's parameters.
    said = error if isinstance(error, StorageFull) else getattr(error, "orig", None)
    why = str(said or type(error).__name__).strip().splitlines()[0]
    return f"the database can't be used: {why}; check its disk, --database and --data"


def _check_database(store: SqlStore) -> str:
    with store.snapshot() as tx:
        tx.get(CounterFact, "clock")
    return ""


def _check_blobs(root: Path) -> str:
    room = os.statvfs(root)
    free = room.f_bavail * room.f_frsize
    if free < LEAST_FREE_BYTES:
        return f"{free // 1024**2} MiB left on the disk; free some space"
    try:
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(b"can this be written?")
            file.flush()
    except OSError as error:
        return f"can't be written: {error.strerror}"
    return ""


def _write_atomically(path: Path, content: dict[str, str]) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    aside.write_text(json.dumps(content) + "\n")
    aside.replace(path)


def _raise_file_limit() -> None:
    """Each agent and each stream is a file descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _between(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {least} to {most}")
        return int(text)

    return parse


if __name__ == "__main__":
    raise SystemExit(main())
