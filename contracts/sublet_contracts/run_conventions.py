"""What all who have to do with a run agree on, for those as well who start without pydantic.

Each run of the process runner has a supervisor of its own: what it imports, each run pays for.
"""

EXIT_PREEMPTED = 75
"""The exit code of a job that stopped when asked and can be resumed."""
NOT_THE_JOBS = ("/proc", "/sys", "/dev", "/sublet", "/inputs")
"""Folders of a container that belong to the system or to us."""
MAX_LOG_STATE_CHARACTERS = 4 * 1024
"""of an unfinished line, as it is shown while it grows"""
