"""The verifier without Ray: the same check, in this process."""

from sublet_broker.adapters.blobs.verifying import check_checkpoint
from sublet_broker.service.ports import (
    BlobStore,
    VerifyResult,
    VerifyTask,
)


class InProcessVerifier:
    """Checks content when it is asked for results (ports.Verifier)."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._tasks: dict[str, VerifyTask] = {}

    def submit(self, task: VerifyTask) -> None:
        """Keep the task until results are collected."""
        self._tasks[task.checkpoint] = task

    def collect(self) -> list[VerifyResult]:
        """Check what was submitted."""
        results: list[VerifyResult] = []
        while self._tasks:
            _, task = next(iter(self._tasks.items()))
            del self._tasks[task.checkpoint]
            try:
                results.append(check_checkpoint(task, self._blobs))
            except OSError as error:
                detail = f"it could not be read: {error}"
                results.append(VerifyResult(task.checkpoint, False, detail, permanent=False))
        return results
