"""What a renter does next about each warning of a running job, in commands and options.

The broker says what is so, as codes with facts and a sentence (sublet_contracts/job_warnings.py);
it knows no client. A running job's options can't be changed any more: what needs others is said as
what to run it with the next time.
"""

import posixpath
import shlex
from collections.abc import Callable

from sublet.terminal.framework_fixes import addition_for
from sublet.terminal.text import safe
from sublet_contracts.api import JobView, WarningView
from sublet_contracts.documents import DocumentRefused, Job, read_document
from sublet_contracts.job_warnings import WarningCode
from sublet_contracts.keys import short

Fix = Callable[[JobView, WarningView], str]


def fix_of_warning(warning: WarningView, view: JobView) -> str:
    """Return what to do about a warning; '' for one that only a newer broker knows."""
    try:
        fix = FIXES[WarningCode(warning.code)]
    except ValueError:
        return ""
    return fix(view, warning)


def _job(view: JobView) -> Job | None:
    """Return what the renter signed; None: it is of a newer version than this client."""
    try:
        return read_document(view.document, Job)
    except DocumentRefused:
        return None


def _nothing_saved(view: JobView, warning: WarningView) -> str:
    job = _job(view)
    if job is not None and job.checkpoints:
        folders = ", ".join(job.checkpoints)
        return (
            f"nothing whole lies in {folders} yet: let the script save there, now and then, and "
            "close what it writes"
        )
    if warning.about:
        folder = shlex.quote(posixpath.dirname(warning.about) or ".")
        text = (
            f"it writes {safe(warning.about)}: run it with --checkpoint {safe(folder)}, and what "
            "lies there is kept and put back"
        )
        addition = addition_for(warning.about)
        return f"{text}; {addition}" if addition else text
    outputs = job.outputs if job is not None else ""
    below = f"below {outputs}" if outputs else "in the folder that --outputs names"
    return (
        "run it with --checkpoint DIR, the folder that it saves to; or save with sublet.ckpt; the "
        f"Trainer of Hugging Face: save_steps, and its output_dir {below}"
    )


def _load(view: JobView, warning: WarningView) -> str:
    return (
        "let the script load at its start what it has saved (sublet.ckpt.restore(); the Trainer of "
        "Hugging Face: train(resume_from_checkpoint=True); Accelerate: accelerator.load_state(); "
        'Lightning: fit(ckpt_path="last"); Keras: BackupAndRestore; Orbax: '
        "manager.restore(manager.latest_step())); "
        f"sublet pause {short(view.id)} stops it before it saves over that"
    )


def _saves_stopped(view: JobView, warning: WarningView) -> str:
    text = f"see in sublet logs {short(view.id)} whether saving fails, and whether the disk is full"
    job = _job(view)
    if job is None or not job.checkpoints:
        return text
    return (
        f"{text}; a file that only grows makes no checkpoint: let the script write how far it is "
        "into another, anew each time"
    )


def _answer(view: JobView, warning: WarningView) -> str:
    job = _job(view)
    if job is not None and job.checkpoints:
        return (
            f"let the script save more often to {', '.join(job.checkpoints)}, and close what it "
            "writes"
        )
    return (
        "let the script call sublet.ckpt.save() where sublet.ckpt.should_save() says so, or save "
        f"more often by itself; sublet logs {short(view.id)} shows whether saving fails"
    )


def _look(view: JobView, warning: WarningView) -> str:
    ref = short(view.id)
    text = f"see sublet logs -f {ref}; sublet pause {ref} ends what it costs"
    job = _job(view)
    if job is not None and job.stall_ms:
        return text
    return f"{text}, and --stall 30m does so by itself the next time"


def _idle(view: JobView, warning: WarningView) -> str:
    ref = short(view.id)
    return (
        f"see in sublet logs {ref} whether the script uses the GPU or waits for its data (more "
        f"--cpus may help); sublet pause {ref} ends what it costs"
    )


FIXES: dict[WarningCode, Fix] = {
    WarningCode.NOTHING_SAVED: _nothing_saved,
    WarningCode.SAVES_STOPPED: _saves_stopped,
    WarningCode.SAVE_UNANSWERED: _answer,
    WarningCode.CHECKPOINT_UNREAD: _load,
    WarningCode.BEGAN_AGAIN: _load,
    WarningCode.STANDS_STILL: _look,
    WarningCode.SILENT: _look,
    WarningCode.DEVICES_IDLE: _idle,
}
