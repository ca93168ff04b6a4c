"""Checkpoints of a job, from inside: `from sublet import ckpt`. See ckpt_helper for how to use it.

The agent puts the same helper into every container, so a script needs no sublet in its image.
"""

from sublet_contracts.ckpt_helper import *  # noqa: F403
from sublet_contracts.ckpt_helper import __all__ as __all__
