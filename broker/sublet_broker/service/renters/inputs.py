"""A job's inputs: content that its renter has uploaded, looked at before the job is accepted."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from sublet_broker.market.facts import BlobFact
from sublet_broker.service.content.claims import claimed, lies
from sublet_broker.service.content.packs import Packs
from sublet_broker.service.errors import Refusal
from sublet_broker.service.ports import BlobMissing
from sublet_broker.service.unit_of_work.context import Context
from sublet_contracts.amounts import format_bytes
from sublet_contracts.documents import Input, Job
from sublet_contracts.problems import ProblemCode
from sublet_contracts.tree import TreeIndex, TreeRefused, parse_index


class Inputs:
    """Finds what a job's inputs consist of."""

    def __init__(self, context: Context, packs: Packs) -> None:
        self._context = context
        self._packs = packs

    @contextmanager
    def found(self, document: Job) -> Iterator[list[BlobFact]]:
        """Give all content of the job's inputs, pinned for as long as the block lasts: commit the
        job's claims inside of it. Not inside a unit of work. Raises Refusal: some of it isn't here,
        or isn't the renter's."""
        total_bytes = sum(entry.total_bytes for entry in document.inputs)
        limit_bytes = self._context.settings.max_input_bytes
        if total_bytes > limit_bytes:
            raise Refusal(
                ProblemCode.INPUT_TOO_LARGE,
                f"they have {format_bytes(total_bytes)}; at most {format_bytes(limit_bytes)} "
                "are taken",
                field="inputs",
                total_bytes=total_bytes,
                limit_bytes=limit_bytes,
            )
        pins = self._context.pins
        linked: dict[str, BlobFact] = {}
        with ExitStack() as held:
            for position, entry in enumerate(document.inputs):
                field = f"inputs.{position}"
                held.enter_context(pins.hold((entry.index_digest,)))
                found = self._rows(document.renter, (entry.index_digest,))
                if not found:
                    raise _missing(field, entry)
                chunks = self._index(field, entry).chunks()
                held.enter_context(pins.hold(chunks))
                found |= self._rows(document.renter, chunks)
                for digest in chunks:
                    if digest not in found:
                        raise _missing(field, entry)
                if not chunks.keys() <= self._present(chunks):
                    raise _missing(field, entry)
                linked |= found
            yield [linked[digest] for digest in sorted(linked)]

    def _rows(self, renter: str, hashes: Collection[str]) -> dict[str, BlobFact]:
        with self._context.read() as snapshot:
            return claimed(snapshot, renter, hashes)

    def _present(self, hashes: Collection[str]) -> set[str]:
        with self._context.read() as snapshot:
            contents = lies(snapshot, hashes)
        return self._packs.present(contents.values())

    def _index(self, field: str, entry: Input) -> TreeIndex:
        try:
            index = parse_index(self._packs.read(entry.index_digest))
        except BlobMissing as error:
            raise _missing(field, entry) from error
        except TreeRefused as error:
            raise Refusal(
                ProblemCode.INPUT_REFUSED, str(error), field=field, destination=entry.destination
            ) from error
        if index.total_bytes != entry.total_bytes:
            # In bytes: what differs may be less than a size in words shows.
            raise Refusal(
                ProblemCode.INPUT_CHANGED,
                f"{entry.destination} was signed with {entry.total_bytes} bytes, its index "
                f"lists {index.total_bytes}",
                field=field,
                destination=entry.destination,
                signed_bytes=entry.total_bytes,
                listed_bytes=index.total_bytes,
            )
        return index


def _missing(field: str, entry: Input) -> Refusal:
    return Refusal(
        ProblemCode.INPUT_MISSING,
        f"the content of {entry.destination} is not here",
        field=field,
        destination=entry.destination,
    )
