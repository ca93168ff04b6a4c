"""One line for each framework, inside a job: `from sublet import frameworks`. See ckpt_frameworks.

The agent puts the same file into every container, so a script needs no sublet in its image.
"""

from sublet_contracts.ckpt_frameworks import *  # noqa: F403
from sublet_contracts.ckpt_frameworks import __all__ as __all__
