"""What an owner does next, for each code that the broker turns the agent away with.

The broker and the session say what is so, as a code and a sentence; they know no client's options.
"""

from sublet_contracts.problems import ProblemCode
from sublet_contracts.session import SessionCode

_UPDATE = "update the agent; if it is the newest already, tell the broker's operator"

FIXES: dict[SessionCode | ProblemCode, str] = {
    SessionCode.CLOCK: (
        "set it (timedatectl set-ntp true) and the agent reconnects by itself; if it is right, "
        "tell the broker's operator"
    ),
    SessionCode.VERSION: "install the release that speaks it: the one that the broker runs",
    SessionCode.OTHER_BROKER: "use another --state for another broker",
    SessionCode.BAD_PROOF: _UPDATE,
    SessionCode.BAD_FRAME: _UPDATE,
    SessionCode.OUT_OF_TURN: _UPDATE,
    ProblemCode.STALE_INSTANCE: (
        "stop one of the two agents, or give one of them its own --state folder"
    ),
    ProblemCode.DOCUMENT_REFUSED: f"check this machine's clock; if it is right, {_UPDATE}",
    ProblemCode.TOO_MANY: "it goes on in the next hour; the operator may raise the broker's limit",
    ProblemCode.TOO_MUCH_STORED: "the job must write a smaller checkpoint, or fewer outputs",
    ProblemCode.DAMAGED: "an older checkpoint is used by itself",
    ProblemCode.NOT_AUTHENTIC: "nothing on the way, such as a proxy, may change a request",
}
"""Refusals that are not here need nothing of the owner: the agent acts on them by itself."""


def with_fix(code: str, detail: str) -> str:
    """Return what is so, and what to do about it where the owner can do something."""
    fix = _BY_TEXT.get(code)
    return f"{detail}; {fix}" if fix else detail


_BY_TEXT: dict[str, str] = {str(code): fix for code, fix in FIXES.items()}
