"""What the driver's fault records (Xid) say of a GPU, and what they say of the job only. Pure.

A job can bring about many of them by itself: what it does wrong, or hands to one of the GPU's
engines, is recorded under its own GPU, and is no fault of the provider's. Some tell of what was
found or mended in time. All others, also those that are newer than this list, are the machine's: a
program can't cause them.
"""

JOBS_OWN = frozenset(
    {
        *(*range(1, 9), 11, 32, 37),  # commands that no engine understands, or that hung it
        *(13, 31, 43, 44, 45, 69, 76, 109, 137),  # exceptions, page faults, illegal accesses
        *(39, 40, 41, 42, 65, 66, 67, 68, 70, 71, 72, 73, 75),  # of the copy and video engines
        *(*range(82, 87), 88, 89, 90, *range(96, 106)),  # and of those that came later
    }
)
NOTES = frozenset({63, 92, 154})
"""Memory that was put aside for the next reset, many corrected errors, and what the driver would
have done about another record."""
_KNOWN = {
    48: "its memory has an error that can't be corrected",
    62: "its own controller has stopped",
    64: "its worn memory could not be put aside",
    74: "its link to another GPU has failed",
    79: "it has fallen off the bus",
    94: "its memory has an error that can't be corrected",
    95: "its memory has an error that can't be corrected, and not only this job's",
    119: "its system processor does not answer",
    120: "its system processor has failed",
}


def says_of_xid(number: int) -> str:
    """Return what is wrong with the GPU by this record; '' if nothing is."""
    if number in JOBS_OWN or number in NOTES:
        return ""
    return f"the driver recorded Xid {number}: {_KNOWN.get(number, 'a fault of the GPU')}"
