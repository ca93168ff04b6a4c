"""Which digest a tag means, by the Docker Engine of this machine, if there is one."""

import json
import shutil
import subprocess

_LIMIT_S = 3.0


def local_digest(image: str) -> str | None:
    """Return `image` by its registry digest, else its id; None where no Engine here knows it."""
    docker = shutil.which("docker")
    if docker is None or image.startswith("-"):
        return None
    try:
        done = subprocess.run(
            [docker, "image", "inspect", "--format", "{{json .}}", image],
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
        )
        found = json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, subprocess.TimeoutExpired, ValueError):
        # Optional by design: the provider resolves the tag then.
        return None
    digests = found.get("RepoDigests") or []
    return str(digests[0] if digests else found.get("Id") or "") or None
