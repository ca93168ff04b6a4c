"""Runs `sublet ...` as the release before receipt version 2 would: python -m tests.e2e.old_release
PYTHON -m sublet.cli.main ARGUMENTS...

That release knew one receipt, version 1: it tells its peers so, writes no other, and refuses every
newer one as unknown. All the rest of the program is today's, for nothing else has changed its
version since. What it is to know of documents is taken away before anything else is imported.
"""

import runpy
import sys
from typing import Any

from sublet_contracts import documents, versions
from sublet_contracts.versions import ReceiptV1


def forget_version_2() -> None:
    """Make version 1 the newest receipt of this process."""
    versions.OLDER.pop("receipt")
    documents.DOCUMENTS = tuple(
        ReceiptV1 if kind is documents.Receipt else kind for kind in documents.DOCUMENTS
    )
    setattr(documents, "Receipt", ReceiptV1)  # noqa: B010 - a class is not a variable to mypy

    # Today's broker asks for what only the newer one tells.
    setattr(ReceiptV1, "pull_device_ms", 0)  # noqa: B010 - no field, and mypy knows none

    # Today's agent fills in the newer field as well; the old one had never heard of it.
    from sublet_agent.core import receipts

    def written_then(**fields: Any) -> ReceiptV1:
        return ReceiptV1(**{k: v for k, v in fields.items() if k in ReceiptV1.model_fields})

    setattr(receipts, "Receipt", written_then)  # noqa: B010


def main() -> None:
    """Become the old program: the command that follows, less its interpreter."""
    forget_version_2()
    _python, _m, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
