"""A start test: something that does nothing is started the way a job is, and has to end well."""

import time
from pathlib import Path

from sublet_agent.core.runner_port import Runner, RunSpec, StartFailed

RUN_ID = "start-test"
LIMIT_S = 60.0
_MEMORY_BYTES = 64 * 2**20
_DISK_BYTES = 16 * 2**20


def start_and_end(
    runner: Runner,
    folder: Path,
    device_ids: tuple[str, ...],
    *,
    image: str,
    image_id: str | None,
    command: tuple[str, ...],
) -> None:
    """Run `command` with these devices. Raises StartFailed, with what was seen."""
    spec = RunSpec(
        run_id=RUN_ID,
        job_id=RUN_ID,
        lease_id=RUN_ID,
        epoch=0,
        image=image,
        image_id=image_id,
        command=command,
        env={},
        device_ids=device_ids or ("cpu",),
        cpu_millis=1000,
        memory_bytes=_MEMORY_BYTES,
        disk_bytes=_DISK_BYTES,
        pids=64,
        network="none",
        run_dir=folder,
        checkpoint_dir=folder / "checkpoint",
        inputs_dir=folder / "inputs",
        helper_dir=folder / "helper",
        stop_grace_ms=0,
    )
    runner.remove(RUN_ID)
    for path in (spec.checkpoint_dir, spec.inputs_dir, spec.helper_dir):
        path.mkdir(parents=True, exist_ok=True)
    try:
        runner.start(spec)
        deadline_s = time.monotonic() + LIMIT_S
        status = runner.status(RUN_ID)
        while status.state == "running" and time.monotonic() < deadline_s:
            time.sleep(0.05)
            status = runner.status(RUN_ID)
    finally:
        runner.remove(RUN_ID)
    if status.state == "exited" and status.exit_code == 0:
        return
    seen = "is still there" if status.state == "running" else f"ended with {status.exit_code}"
    raise StartFailed(f"a program that does nothing {seen}" + (status.error or "")[:200])


def idle_program(machine: str) -> bytes | None:
    """Return a static program of a hundred-odd bytes that ends with 0, so that no image of the
    owner's is needed; None for an architecture that isn't known here (`machine`: as uname says)."""
    known = {
        # mov eax, 60; xor edi, edi; syscall: exit(0)
        "x86_64": (62, bytes.fromhex("b83c00000031ff0f05")),
        # mov x0, 0; mov x8, 93; svc 0
        "aarch64": (183, bytes.fromhex("000080d2a80b80d2010000d4")),
    }
    if machine not in known:
        return None
    number, code = known[machine]
    base, head_bytes = 0x400000, 64 + 56
    size = head_bytes + len(code)
    return b"".join(
        [
            b"\x7fELF\x02\x01\x01" + bytes(9),
            _little((2, 2), (number, 2), (1, 4), (base + head_bytes, 8), (64, 8), (0, 8), (0, 4)),
            _little((64, 2), (56, 2), (1, 2), (0, 2), (0, 2), (0, 2)),
            _little((1, 4), (5, 4), (0, 8), (base, 8), (base, 8), (size, 8), (size, 8), (4096, 8)),
            code,
        ]
    )


def _little(*numbers: tuple[int, int]) -> bytes:
    return b"".join(value.to_bytes(width, "little") for value, width in numbers)
