"""Why a use-case says no. A Refusal becomes problem+json; NotYet leaves a message unacked."""


class Refusal(Exception):
    """The request is refused, nothing has changed. `status` is HTTP's; `fix`: what to do next."""

    def __init__(
        self, status: int, code: str, title: str, detail: str, *, field: str = "", fix: str = ""
    ) -> None:
        super().__init__(f"{title}: {detail}")
        self.status = status
        self.code = code
        self.title = title
        self.detail = detail
        self.field = field
        self.fix = fix


class NotYet(Exception):
    """A reliable message came before what it rests on: don't acknowledge it, it is sent again."""


class StaleInstance(Refusal):
    """The message is of an agent process that another one with the same key has replaced."""

    def __init__(self) -> None:
        super().__init__(
            409,
            "stale_instance",
            "Replaced",
            "another agent with this key has joined since",
            fix="stop one of the two agents, or give one of them its own --state folder",
        )


def not_found(what: str, ref: str) -> Refusal:
    """Return the refusal for something that isn't there, or isn't the caller's to see."""
    return Refusal(
        404,
        "not_found",
        "Not found",
        f"you have no {what} {ref[:80]!r}",
        fix="sublet ps lists your jobs",
    )


def conflict(code: str, title: str, detail: str, *, field: str = "", fix: str = "") -> Refusal:
    """Return a 409."""
    return Refusal(409, code, title, detail, field=field, fix=fix)


def invalid(code: str, title: str, detail: str, *, field: str = "", fix: str = "") -> Refusal:
    """Return a 422: understood, and not acceptable."""
    return Refusal(422, code, title, detail, field=field, fix=fix)
