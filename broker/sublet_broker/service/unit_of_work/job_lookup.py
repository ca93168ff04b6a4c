"""Finding what a caller names, among what is the caller's."""

from sublet_broker.market.facts import JobFact
from sublet_broker.service.errors import Refusal, not_found
from sublet_broker.service.unit_of_work.unit_of_work import UnitOfWork
from sublet_contracts.problems import ProblemCode

SHORTEST_PREFIX = 8


def own_job(work: UnitOfWork, caller: str, ref: str) -> JobFact:
    """Return the caller's job with that id, unique prefix, or name (the newest). Raises Refusal:
    others' jobs are as absent as ones that never were."""
    exact = work.get(JobFact, ref)
    if exact is not None and exact.renter == caller:
        return exact
    mine = work.find(JobFact, {"renter": caller}, order_by="submitted_ms", descending=True)
    if len(ref) >= SHORTEST_PREFIX:
        begun = [job for job in mine if job.id.startswith(ref)]
        if len(begun) > 1:
            raise Refusal(
                ProblemCode.AMBIGUOUS,
                f"{len(begun)} jobs begin with {ref}",
                ref=ref,
                jobs=len(begun),
            )
        if begun:
            return begun[0]
    named = [job for job in mine if job.name == ref]
    if named:
        return named[0]
    raise not_found("job", ref)
