"""The renter's side: a client for one broker, and a handle for each job.

client = sublet.Client()
job = client.run(image="...", command=["python", "train.py"], max_price=0.40, budget=5)
job.follow(); job.download("out/")
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack
from urllib.parse import quote

import httpx

from sublet.config import ConfigError, Profile, broker_url
from sublet.cosign import Cosigned, cosign
from sublet.downloads import (
    Chosen,
    Downloaded,
    Wish,
    best_folders,
    choose,
    local_names,
    matching,
    no_best,
    nothing_matches,
)
from sublet.errors import DISK_FULL, BrokerAway, SubletError, no_answer
from sublet.http import RETRIED_STATUS, Link
from sublet.log_head import LogRewritten, head_in, head_of, proven_growth
from sublet.options import Amount, JobOptions
from sublet.options_docs import with_options
from sublet.spec import JobSpec
from sublet.transfers import (
    OnBytes,
    download_files,
    read_file,
    read_index,
    upload_inputs,
)
from sublet.units import Moment, UnitError, credits_to_ucr, moment_ms
from sublet_contracts.api import (
    BalanceView,
    CheckpointsPage,
    CheckpointView,
    EarningsView,
    EventsPage,
    JobLogLine,
    JobsPage,
    JobView,
    LogView,
    MatchRequest,
    MatchView,
    OffersPage,
    PartyView,
    ReceiptsPage,
    ResumeRequest,
    SignedRequest,
    StatementView,
)
from sublet_contracts.documents import (
    Amendment,
    Deposit,
    KeyDocument,
    open_document,
    sign_document,
)
from sublet_contracts.documents import Job as JobDocument
from sublet_contracts.envelope import Envelope
from sublet_contracts.keys import SigningKey
from sublet_contracts.problems import ProblemCode
from sublet_contracts.states import JOB, JobState, is_terminal
from sublet_contracts.tree import LeftOut, TreeFile, TreeIndex, TreeRefused

if TYPE_CHECKING:
    from sublet.code_origin import CodeOrigin

POLL_S = 0.5
PAGE = 1000
"""checkpoints that are asked for at once"""


Announce = Callable[[str, int], OnBytes]
"""Called before something moves, with its name and its bytes; what it returns is called with the
bytes of each part that has moved."""


def _unannounced(what: str, total_bytes: int) -> OnBytes:
    return lambda count_bytes: None


class Client:
    """A party at a broker. Everything it asks is signed by the profile's key."""

    def __init__(
        self,
        broker: str | None = None,
        profile: str | None = None,
        config_dir: Path | None = None,
        key: SigningKey | None = None,
        away_limit_s: float = 60.0,
    ) -> None:
        """Raises ConfigError, KeyRefused. Nothing is sent before the first call."""
        self.profile = Profile.open(profile, config_dir)
        self.url = broker_url(broker)
        self.key = key or self.profile.key()
        self.link = Link(self.url, self.key, away_limit_s=away_limit_s)
        self._config_dir = config_dir
        self._away_limit_s = away_limit_s
        self._broker: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self.link.close()

    def copy(self, away_limit_s: float | None = None) -> "Client":
        """Return a client of the same party with connections of its own, for another thread."""
        limit_s = self._away_limit_s if away_limit_s is None else away_limit_s
        return Client(self.url, self.profile.name, self._config_dir, self.key, limit_s)

    @property
    def party(self) -> str:
        """This party's id."""
        return self.key.party

    @property
    def broker(self) -> str:
        """The broker's id; pinned when it's first seen. Raises ConfigError if it has changed."""
        if self._broker is None:
            broker = self.link.broker_info().broker
            known = self.profile.pinned(self.url) == broker
            self.profile.pin(self.url, broker)
            self.link.sign_for(broker)
            self._broker = broker
            if not known:
                self._introduce(broker)
        return self._broker

    def _introduce(self, broker: str) -> None:
        document = KeyDocument(
            party=self.party, broker=broker, name=self.profile.name, issued_ms=_now_ms()
        )
        signed = sign_document(document, self.key)
        self.link.call("POST", "/v1/keys", PartyView, body=SignedRequest(envelope=signed.envelope))

    def _call(self, method: str, path: str, kind: Any, **options: Any) -> Any:
        broker = self.broker
        try:
            return self.link.call(method, path, kind, **options)
        except SubletError as error:
            if error.problem.code != ProblemCode.UNKNOWN_PARTY:
                raise
        # A broker with a new database, or another machine's first call with this key.
        self._introduce(broker)
        return self.link.call(method, path, kind, **options)

    @with_options()
    def run(
        self,
        image: str,
        command: str | Sequence[str] = (),
        *,
        announce: Announce = _unannounced,
        **options: Unpack[JobOptions],
    ) -> "Job":
        """Submit a job and return its handle at once; the budget is held from the account.

        Raises UnitError and InputError, which name the option; SubletError with what the broker
        refused, and BrokerAway.
        """
        spec = JobSpec(image=image, command=command, **options)
        return self.submit(spec, announce=announce)

    def submit(self, spec: JobSpec, *, announce: Announce = _unannounced) -> "Job":
        """Send the inputs, sign the job, submit it. Raises as `run` does."""
        spec.document(renter=self.party, broker=self.broker, now_ms=_now_ms(), inputs=())
        inputs = upload_inputs(self.link, spec.inputs, announce)
        if spec.code is not None:
            from sublet.code_tree import send_code

            code = send_code(self.link, spec.code, spec.code_destination, announce)
            inputs = (*inputs, code)
        document = spec.document(
            renter=self.party, broker=self.broker, now_ms=_now_ms(), inputs=inputs
        )
        signed = sign_document(document, self.key)
        view = self._call(
            "POST",
            "/v1/jobs",
            JobView,
            body=SignedRequest(envelope=signed.envelope),
            query={"wait": None if spec.options["wait_for_offer"] else "false"},
        )
        return Job(self, view.id, view)

    def match(self, spec: JobSpec) -> MatchView:
        """Ask which offers a job would get."""
        body = MatchRequest(
            resources=spec.resources(),
            max_price_ucr_per_device_hour=spec.max_price_ucr,
            image=spec.options["image"],
            budget_ucr=spec.budget_ucr,
        )
        found: MatchView = self._call("POST", "/v1/offers/match", MatchView, body=body)
        return found

    def job(self, ref: str) -> "Job":
        """Return a job of this party by id, first digits or name. Raises SubletError."""
        view = self._call("GET", f"/v1/jobs/{quote(ref, safe='')}", JobView)
        return Job(self, view.id, view)

    def handle(self, view: JobView) -> "Job":
        """Return a handle for a job that has been looked up already."""
        return Job(self, view.id, view)

    def jobs(self, state: str = "", name: str = "", limit: int = 100) -> JobsPage:
        """Return this party's jobs, newest first."""
        query = {"state": state, "name": name, "limit": limit}
        page: JobsPage = self._call("GET", "/v1/jobs", JobsPage, query=query)
        return page

    def offers(self, kind: str = "", region: str = "") -> OffersPage:
        """Return the market's offers, cheapest first."""
        query = {"kind": kind, "region": region}
        page: OffersPage = self._call("GET", "/v1/offers", OffersPage, query=query)
        return page

    def balance(self) -> BalanceView:
        """Return this party's account."""
        view: BalanceView = self._call("GET", "/v1/balance", BalanceView)
        return view

    def check_log(self, also: Envelope | None = None) -> Envelope:
        """Check that the broker's log begins with what this profile has seen of it, and with the
        head `also`; keep its new head and return it. Raises LogRewritten, with both heads kept as
        evidence, and SubletError."""
        seen = self.profile.seen_head(self.broker)
        newest: Envelope | None = None
        for older in (seen, also):
            if older is not None:
                newest = self._log_grown_from(older)
        if newest is None:
            newest = self._log_since(0).tree_head
            head_of(newest, self.broker)
        self.profile.keep_head(self.broker, newest)
        return newest

    def _log_grown_from(self, older: Envelope) -> Envelope:
        try:
            return proven_growth(
                self._log_since(head_of(older, self.broker).size), older, self.broker
            )
        except LogRewritten as error:
            heads = [head for head in (error.older, error.newer) if head is not None]
            path = self.profile.keep_evidence(f"log-{error.older.id[:10]}", heads)
            error.add_note(f"both heads are in {path}")
            raise

    def _log_since(self, size: int) -> LogView:
        view: LogView = self._call("GET", "/v1/log", LogView, query={"since": size})
        return view

    def earnings(self) -> EarningsView:
        """Return what this party has earned as a provider."""
        view: EarningsView = self._call("GET", "/v1/earnings", EarningsView)
        return view

    def fund(self, party: str, credits: Amount, operator_key: Path, memo: str = "") -> BalanceView:
        """Credit an account by the operator's key. Raises ConfigError, KeyRefused, SubletError."""
        if not operator_key.is_file():
            raise ConfigError(f"{operator_key}: no such file; a broker's is DATA/broker.key")
        operator = SigningKey.load_or_create(operator_key)
        deposit = Deposit(
            broker=self.broker,
            party=party,
            amount_ucr=credits_to_ucr(credits, "amount"),
            memo=memo,
            nonce=os.urandom(16).hex(),
            issued_ms=_now_ms(),
        )
        link = Link(self.url, operator)
        link.sign_for(self.broker)
        try:
            body = SignedRequest(envelope=sign_document(deposit, operator).envelope)
            return link.call("POST", "/v1/deposits", BalanceView, body=body)
        finally:
            link.close()


class Job:
    """One job of this party."""

    def __init__(self, client: Client, id: str, view: JobView) -> None:
        self._client = client
        self.id = id
        self._view = view

    @property
    def client(self) -> Client:
        """The client that it was asked from."""
        return self._client

    def __repr__(self) -> str:
        return f"Job({self.id[:10]}, {self._view.name!r}, {self._view.state})"

    @property
    def name(self) -> str:
        """Its name."""
        return self._view.name

    def _call(self, method: str, path: str, kind: Any, **options: Any) -> Any:
        return self._client._call(method, f"/v1/jobs/{self.id}{path}", kind, **options)

    def view(self) -> JobView:
        """Ask the broker how it is."""
        self._view = self._call("GET", "", JobView)
        return self._view

    def cancel(self) -> JobView:
        """Cancel it."""
        return self._changed("/cancel")

    def pause(self) -> JobView:
        """Checkpoint and stop it, for now."""
        return self._changed("/pause")

    def resume(self, budget: Amount | None = None) -> JobView:
        """Go on after a pause, with a larger budget if one is given (the new total)."""
        amendment = None
        if budget is not None:
            total = credits_to_ucr(budget, "budget")
            document = Amendment(
                renter=self._client.party,
                broker=self._client.broker,
                job=self.id,
                budget_ucr=total,
                accept_receipts_up_to_ucr=total,
                issued_ms=_now_ms(),
            )
            amendment = sign_document(document, self._client.key).envelope
        return self._changed("/resume", body=ResumeRequest(amendment=amendment))

    def _changed(self, path: str, **options: Any) -> JobView:
        self._view = self._call("POST", path, JobView, **options)
        return self._view

    def events(self, after: int = 0) -> EventsPage:
        """Return its history from `after` on."""
        page: EventsPage = self._call("GET", "/events", EventsPage, query={"after": after})
        return page

    def checkpoints(self, limit: int | None = None, kind: str = "") -> CheckpointsPage:
        """Return its checkpoints and outputs, newest first: all, or only so many, or only of a kind
        ("checkpoint", "outputs", "partial-outputs"). A thousand come with each answer."""
        found: list[CheckpointView] = []
        before_ms: int | None = None
        while True:
            wanted = PAGE if limit is None else min(PAGE, limit - len(found))
            query = {"kind": kind, "before_ms": before_ms, "limit": max(1, wanted)}
            page: CheckpointsPage = self._call("GET", "/checkpoints", CheckpointsPage, query=query)
            found += page.checkpoints
            before_ms = page.next_before_ms
            if before_ms is None or (limit is not None and len(found) >= limit):
                return page.model_copy(update={"checkpoints": tuple(found[:limit])})

    def statement(self) -> StatementView:
        """Return every charge with the receipt it rests on."""
        view: StatementView = self._call("GET", "/statement", StatementView)
        return view

    def export(self) -> bytes:
        """Return its evidence, exactly as the broker gave it (see `sublet receipts verify`).

        Raises LogRewritten where the log under it isn't the one that was seen before.
        """
        _ = self._client.broker
        data = self._client.link.send("GET", f"/v1/jobs/{self.id}/export").content
        self._client.check_log(also=head_in(data))
        return data

    def cosign(self) -> Cosigned:
        """Sign the receipts that add up; say which don't. Nothing is signed for a broker whose log
        isn't the one that was seen before."""
        query = {"unsigned": "true"}
        page = self._call("GET", "/receipts", ReceiptsPage, query=query)
        result = cosign(page, self._client.key, self._client.broker, self._view.document)
        if result.signed:
            try:
                self._client.check_log()
            except LogRewritten as error:
                return Cosigned((), (str(error), *result.refused))
        for envelope in result.signed:
            self._client.link.send(
                "POST",
                f"/v1/receipts/{envelope.id}/signature",
                data=SignedRequest(envelope=envelope).model_dump_json().encode(),
            )
        return result

    def logs(
        self,
        *,
        follow: bool = False,
        after: int = -1,
        tail: int | None = None,
        since: Moment | None = None,
        run: int | None = None,
        unfinished: bool = False,
    ) -> Iterator[JobLogLine]:
        """Yield its output's lines beyond cursor `after`; with `follow` until the job ends.

        `tail`: only so many lines, the last ones. `since`: only from the first line that was
        written then or later: '10m' (so long ago), '2026-11-29T08:00', or a datetime. `run`: only
        that run's. `unfinished`: also how the lines stand that the job is still writing (a progress
        bar), each state as it changes; they are marked so, and their cursor is the line's before.

        Over a broken connection it goes on where it was, however long the broker is away: no line
        comes twice, none is left out. Raises UnitError; without `follow` SubletError, BrokerAway.
        """
        where: dict[str, object] = {
            "tail": _count(tail, "tail"),
            "since_ms": None if since is None else moment_ms(since, _now_ms(), "since"),
        }
        return self._lines(where, follow, after, _count(run, "run"), unfinished)

    def _lines(
        self,
        where: dict[str, object],
        follow: bool,
        after: int,
        run: int | None,
        unfinished: bool,
    ) -> Iterator[JobLogLine]:
        ended = not follow
        while True:
            query = {
                "after": after if after >= 0 else None,
                "follow": None if ended else "true",
                "run": run,
                "unfinished": "true" if unfinished else None,
                **where,
            }
            try:
                with self._client.link.stream(f"/v1/jobs/{self.id}/logs", query) as lines:
                    for value in lines:
                        line = JobLogLine.model_validate(value)
                        if not line.unfinished:
                            after = line.cursor
                            where = {}  # where to begin was asked, and from now on it's `after`
                        yield line
                if ended:
                    return
                # Once it has ended, one more round reads what the stream had not brought yet.
                ended = is_terminal(JOB, self.view().state)
            except SubletError as error:
                if not follow or error.problem.status not in {*RETRIED_STATUS, DISK_FULL}:
                    raise
            except httpx.TransportError as error:
                if not follow:
                    raise no_answer(self._client.url, str(error)) from error
            time.sleep(POLL_S)

    def wait(self, poll_s: float = POLL_S) -> JobView:
        """Wait until it has ended or is paused, however long; sign its receipts meanwhile.

        A receipt that doesn't add up is not signed, and a warning says why.
        """
        warned: set[str] = set()
        while True:
            try:
                view = self.view()
                warn_once(self.cosign().refused, warned)
            except BrokerAway:
                time.sleep(poll_s)
                continue
            if is_terminal(JOB, view.state) or view.state is JobState.PAUSED:
                return view
            time.sleep(poll_s)

    def download(
        self,
        target: str | Path | None = None,
        announce: Announce = _unannounced,
        *,
        checkpoint: str | int | None = None,
        include: Iterable[str] = (),
        partial: bool = False,
    ) -> Downloaded:
        """Write its outputs below `target` (./NAME of the job), in whatever state it is; where it
        has none, what a run had written that ended without finishing. What is there stays.

        `checkpoint`: instead of these a durable checkpoint, by its step, "latest", or "best" as HF
        Trainer names it. `include`: only files that match one of these patterns. `partial`: what a
        run had written that did not finish, even where there are outputs. Interrupted, it goes on
        when it is called again.

        Raises SubletError (what there is instead stands in it), TargetError, TreeRefused, OSError.
        """
        wish = Wish.of(checkpoint, partial, include)
        view, checkpoints = self.view(), self.checkpoints().checkpoints
        chosen = choose(view, checkpoints, wish)
        index, folders = self._tree(view, checkpoints, chosen, wish)
        names = local_names(index, self._content)
        wanted = matching(names, wish.include, folders)
        if not wanted and names:
            raise nothing_matches(view, chosen, names.values())
        by_path = {file.path: file for file in index.files}
        files = download_files(
            self._client.link,
            self.id,
            {names[path]: by_path[path] for path in wanted},
            Path(target if target is not None else f"./{view.name}").expanduser(),
            announce,
        )
        return Downloaded(
            chosen.kind, chosen.step, chosen.epoch, files, index.left_out, index.left_out_total
        )

    def left_out(self) -> tuple[tuple[LeftOut, ...], int]:
        """Return what lay in its outputs folder and could not be carried (at most 1,000 entries),
        of its outputs or else its partial outputs, and how much that is in all."""
        view = self.view()
        digest = view.outputs_index_digest or view.partial_outputs_index_digest
        if digest is None:
            return (), 0
        index = read_index(self._client.link, self.id, digest)
        return index.left_out, index.left_out_total

    def code_origin(self) -> "CodeOrigin | None":
        """Return from which commit the code comes that went along with it (`code=`), and what was
        changed since; None: none did, or it isn't kept any more. Raises SubletError."""
        from sublet.code_origin import MAX_ORIGIN_BYTES, ORIGIN, read_origin

        document = open_document(self.view().document, JobDocument).document
        for item in document.inputs:
            if item.destination != document.workdir:
                continue
            try:
                index = read_index(self._client.link, self.id, item.index_digest)
                file = next((file for file in index.files if file.path == ORIGIN), None)
                if file is not None and file.size_bytes <= MAX_ORIGIN_BYTES:
                    return read_origin(self._content(file))
            except (TreeRefused, ValueError):
                continue
            except SubletError as error:
                if error.problem.code != ProblemCode.NOT_FOUND:
                    raise
        return None

    def _content(self, file: TreeFile) -> bytes:
        return read_file(self._client.link, self.id, file)

    def _tree(
        self, view: JobView, checkpoints: Sequence[CheckpointView], chosen: Chosen, wish: Wish
    ) -> tuple[TreeIndex, tuple[str, ...]]:
        """Return the index of what is wanted, and the folders in it that are: none: all of it."""
        index = read_index(self._client.link, self.id, chosen.index_digest)
        if wish.checkpoint != "best":
            return index, ()
        folders = best_folders(index, self._content)
        if not folders:
            raise no_best(view, checkpoints)
        return index, folders

    def follow(self) -> JobView:
        """Show progress, logs and the price so far until it ends; Ctrl-C detaches."""
        from sublet.terminal.follow import follow

        return follow(self)


def warn_once(messages: Iterable[str], warned: set[str]) -> None:
    """Warn of each message that isn't in `warned` yet, and add it there."""
    for message in messages:
        if message not in warned:
            warned.add(message)
            warnings.warn(message, stacklevel=3)


def _count(number: int | None, name: str) -> int | None:
    least = 1 if name == "run" else 0
    if number is not None and number < least:
        raise UnitError(f"{name}: {number} is not a number from {least} on")
    return number


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


__all__ = ["Client", "Job", "SubletError"]
