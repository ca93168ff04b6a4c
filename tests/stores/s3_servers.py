"""Two S3-compatible servers, each once a session: moto's, in a thread, and s3rver, in Node.

They are doubles that others have written, and not the thing itself. What each shows, and what
neither does, deploy/blob-stores.md says.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import logging
import shutil
import subprocess
from pathlib import Path

import httpx
from obstore.store import S3Store

from sublet_broker.adapters.blobs.s3_place import Credentials, S3Place

BUCKET = "content"
KEY = Credentials("S3RVER", "S3RVER")
"""The one that s3rver knows; moto takes any."""
_S3RVER = "s3rver@3.7.1"
_FOLDER = Path(__file__).parents[2] / "build" / "s3rver"
_INSTALL_S = 120
_numbers = itertools.count()

_RUN = """
const S3rver = require("s3rver");
const [directory, bucket] = process.argv.slice(1);
new S3rver({
  address: "127.0.0.1", port: 0, silent: true, directory, resetOnClose: true,
  configureBuckets: [{ name: bucket }],
}).run().then(({ port }) => console.log(port));
process.stdin.on("end", () => process.exit(0)).resume();
"""


def new_place(endpoint: str) -> S3Place:
    """Return a place in which nothing lies."""
    return S3Place(BUCKET, f"some/where-{next(_numbers)}", endpoint, "us-east-1")


def objects(place: S3Place) -> S3Store:
    """Return a client of the place that does whatever it is told."""
    return S3Store(
        place.bucket,
        prefix=place.prefix,
        endpoint=place.endpoint,
        region=place.region,
        access_key_id=KEY.key_id,
        secret_access_key=KEY.secret,
        client_options={"allow_http": True},
    )


@functools.cache
def moto() -> str:
    """Return the address of moto's server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    httpx.put(f"{endpoint}/{BUCKET}", timeout=30).raise_for_status()
    return endpoint


@functools.cache
def s3rver() -> str:
    """Return the address of s3rver. It ends when this process does."""
    data = _FOLDER / "data"
    shutil.rmtree(data, ignore_errors=True)
    process = subprocess.Popen(
        ["node", "-e", _RUN, "--", str(data), BUCKET],
        cwd=_FOLDER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    atexit.register(process.stdin.close)
    return f"http://127.0.0.1:{int(process.stdout.readline())}"


def missing_s3rver() -> str | None:
    """Install s3rver below build/; say why it can't be."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "no node and npm: install Node.js 20"
    installed = _FOLDER / "node_modules" / "s3rver" / "package.json"
    wanted = _S3RVER.partition("@")[2]
    if installed.exists() and json.loads(installed.read_text())["version"] == wanted:
        return None
    _FOLDER.mkdir(parents=True, exist_ok=True)
    (_FOLDER / "package.json").write_text('{"private": true}\n')
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", _S3RVER]
    try:
        done = subprocess.run(
            command, cwd=_FOLDER, capture_output=True, timeout=_INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"npm did not install {_S3RVER} within {_INSTALL_S} s"
    said = done.stderr.decode(errors="replace").strip()
    return f"npm can't install {_S3RVER}: {said[-300:]}" if done.returncode else None
