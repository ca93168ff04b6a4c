"""Each hardening flag of the Docker runner, from inside a container and from `docker inspect`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

import docker
import pytest

from sublet_agent.adapters.docker import seccomp
from sublet_agent.adapters.docker.runner import EGRESS_NETWORK, JOB_UID, DockerRunner
from sublet_agent.core.runner_port import RunRefused, StartFailed
from tests.agent.runner_world import LOG_BYTES, World
from tests.services import require

pytestmark = pytest.mark.docker

LOOK = textwrap.dedent("""
    import ctypes, errno, json, os, platform, resource, socket
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *arguments):
        number = NUMBERS[name][platform.machine() == "aarch64"]
        if number is None: return "EPERM"
        ctypes.set_errno(0)
        done = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
        return "allowed" if done >= 0 else errno.errorcode[ctypes.get_errno()]

    NUMBERS = {  # x86_64, aarch64
        "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "bpf": (321, 280),
        "perf_event_open": (298, 241), "keyctl": (250, 219), "mount": (165, 40),
        "unshare": (272, 97), "ptrace": (101, 117), "clone3": (435, 435), "setns": (308, 268),
        "process_vm_readv": (310, 270), "init_module": (175, 105), "kexec_load": (246, 104),
        "open_by_handle_at": (304, 265), "add_key": (248, 217), "reboot": (169, 142),
        "pivot_root": (155, 41), "chroot": (161, 51), "clone": (56, 220), "getpid": (39, 172),
        "mknodat": (259, 33),
    }
    CLONE_NEWUSER = 0x10000000
    arguments = {"unshare": [CLONE_NEWUSER], "clone": [CLONE_NEWUSER | 17, 0, 0, 0, 0]}

    def family(number):
        try:
            socket.socket(number, socket.SOCK_STREAM if number != 17 else socket.SOCK_RAW).close()
        except OSError as error:
            return errno.errorcode[error.errno]
        return "allowed"

    def write(path):
        try:
            open(path, "w").write("x")
        except OSError as error:
            return errno.errorcode[error.errno]
        return "allowed"

    def fill(path):
        total = 0
        try:
            with open(path, "wb", buffering=0) as file:
                while total < 256 << 20: total += file.write(b"x" * (1 << 20))
        except OSError as error:
            os.unlink(path)
            return [errno.errorcode[error.errno], total]
        return ["allowed", total]

    status = dict(l.split(":", 1) for l in open("/proc/self/status").read().splitlines())
    here = os.environ["SUBLET_CHECKPOINT_DIR"]
    def moved(name):
        try:
            os.rename(here + "/" + name, here + "/other")
        except OSError as error:
            return errno.errorcode[error.errno]
        return "allowed"
    print(json.dumps({
        "calls": {name: call(name, *arguments.get(name, [0, 0, 0, 0, 0])) for name in NUMBERS},
        "families": {n: family(n) for n in (1, 2, 17, 38, 40)},
        "status": {k: v.strip() for k, v in status.items()},
        "ids": [os.getuid(), os.getgid()],
        "groups": os.getgroups(),
        "pid1": open("/proc/1/comm").read().strip(),
        "writes": {p: write(p) for p in ("/x", "/etc/x", "/tmp/x", "/dev/shm/x", here + "/out/x",
            here + "/in/x", here + "/ack/x", "/inputs/x", "/sublet/helper/x", "/data/in.csv",
            "/out/x", "/proc/sys/kernel/hostname", "x", os.path.expanduser("~/x"), "/home/x",
            os.getcwd() + "/../x")},
        "home": os.path.expanduser("~"),
        "moves": {n: moved(n) for n in ("in", "ack")},
        "tmp": fill("/tmp/fill"), "shm": fill("/dev/shm/fill"),
        "device": call("mknodat", -100, ctypes.cast(b"/tmp/null", ctypes.c_void_p).value,
            0o20666, 0x103, 0),
        "interfaces": os.listdir("/sys/class/net"),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "fsize": resource.getrlimit(resource.RLIMIT_FSIZE),
        "devices": sorted(os.listdir("/dev")),
        "oom": open("/proc/self/oom_score_adj").read().strip(),
    }))
""")
MEMORY_BYTES = 256 * 2**20
DISK_BYTES = 32 * 2**20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require("docker")
    made = World("docker", tmp_path_factory.mktemp("hardening"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def run_id(world: World) -> str:
    spec = world.spec(LOOK, memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES, cpu_millis=500)
    data = spec.inputs_dir / "in.csv"
    data.write_text("a")
    spec = world.spec(
        LOOK,
        run_id=spec.run_id,
        memory_bytes=MEMORY_BYTES,
        disk_bytes=DISK_BYTES,
        cpu_millis=500,
        destinations={"/data/in.csv": data},
    )
    world.runner.start(spec)
    assert world.ended(spec.run_id).exit_code == 0, world.output(spec.run_id)
    return spec.run_id


@pytest.fixture(scope="module")
def inside(world: World, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(world.output(run_id)[0])
    return found


@pytest.fixture(scope="module")
def host_config(world: World, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = _inspect(world, run_id)["HostConfig"]
    return found


def _inspect(world: World, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = docker.from_env().api.inspect_container(
        f"sublet-{world.owner[:12]}-{run_id}"
    )
    return found


@pytest.mark.parametrize(
    "name",
    [
        "userfaultfd",
        "bpf",
        "perf_event_open",
        "keyctl",
        "add_key",
        "mount",
        "unshare",
        "setns",
        "ptrace",
        "process_vm_readv",
        "init_module",
        "kexec_load",
        "open_by_handle_at",
        "reboot",
        "pivot_root",
        "chroot",
        "clone",
    ],
)
def test_calls_that_are_refused(inside: dict[str, Any], name: str) -> None:
    assert inside["calls"][name] == "EPERM"


@pytest.mark.parametrize("name", ["io_uring_setup", "clone3"])
def test_calls_that_are_not_there(inside: dict[str, Any], name: str) -> None:
    assert inside["calls"][name] == "ENOSYS"


def test_the_refusals_are_the_filters(inside: dict[str, Any], host_config: dict[str, Any]) -> None:
    assert inside["calls"]["getpid"] == "allowed"  # the probe itself works
    assert inside["status"]["Seccomp"] == "2"
    given = [o for o in host_config["SecurityOpt"] if o.startswith("seccomp=")]
    assert json.loads(given[0].removeprefix("seccomp=")) == seccomp.profile()


def test_socket_families(inside: dict[str, Any]) -> None:
    assert inside["families"]["1"] == "allowed"
    assert inside["families"]["2"] == "allowed"
    assert {inside["families"][n] for n in ("17", "38", "40")} == {"EPERM"}  # packet, alg, vsock


def test_no_capabilities_and_none_to_gain(
    inside: dict[str, Any], host_config: dict[str, Any]
) -> None:
    for which in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(inside["status"][which], 16) == 0
    assert inside["status"]["NoNewPrivs"] == "1"
    assert host_config["CapDrop"] == ["ALL"]
    assert not host_config["CapAdd"]
    assert "no-new-privileges" in host_config["SecurityOpt"]
    assert host_config["Privileged"] is False


def test_not_root(world: World, run_id: str, inside: dict[str, Any]) -> None:
    assert 0 not in inside["ids"]
    assert 0 not in inside["groups"]
    uid, gid = inside["ids"]
    assert _inspect(world, run_id)["Config"]["User"] == f"{uid}:{gid}"
    with pytest.raises(ValueError, match="user"):
        DockerRunner("x", user=(0, JOB_UID))


def test_an_init_that_is_not_the_job(inside: dict[str, Any], host_config: dict[str, Any]) -> None:
    assert inside["pid1"] in ("docker-init", "tini")
    assert host_config["Init"] is True


def test_what_can_be_written(inside: dict[str, Any], host_config: dict[str, Any]) -> None:
    out = "/sublet/checkpoint/"
    home = inside["home"] + "/x"
    assert {p for p, how in inside["writes"].items() if how == "allowed"} == {
        "/tmp/x",
        "/dev/shm/x",
        out + "out/x",
        "/out/x",
        "x",
        home,
    }
    assert inside["moves"] == {"in": "EBUSY", "ack": "EBUSY"}  # no link where the agent writes
    assert host_config["ReadonlyRootfs"] is True
    writable = {m["Target"] for m in host_config["Mounts"] if not m.get("ReadOnly")}
    assert writable == {"/sublet/checkpoint", "/out", "/work", "/home/job", "/tmp"}
    assert not host_config["Binds"]


def test_temporary_files_are_bounded(inside: dict[str, Any], host_config: dict[str, Any]) -> None:
    assert inside["tmp"][0] in ("ENOSPC", "EFBIG")
    assert inside["tmp"][1] <= DISK_BYTES
    assert inside["shm"][0] in ("ENOSPC", "EFBIG")
    # It is a folder on disk, whose mount says nothing of devices: no capability does.
    assert inside["device"] == "EPERM"
    assert not host_config.get("Tmpfs")
    assert host_config["ShmSize"] == MEMORY_BYTES // 2


def test_limits(inside: dict[str, Any], host_config: dict[str, Any]) -> None:
    assert host_config["Memory"] == host_config["MemorySwap"] == MEMORY_BYTES
    assert host_config["PidsLimit"] == 64
    assert host_config["NanoCpus"] == 500_000_000
    assert inside["core"] == [0, 0]
    assert inside["fsize"] == [DISK_BYTES, DISK_BYTES]
    assert inside["files"] == [16384, 16384]
    assert inside["oom"] == "500"
    assert host_config["LogConfig"] == {
        "Type": "local",
        "Config": {"max-size": str(LOG_BYTES // 2), "max-file": "2", "compress": "false"},
    }
    assert host_config["RestartPolicy"]["Name"] == "no"


def test_nothing_of_the_host(inside: dict[str, Any], host_config: dict[str, Any]) -> None:
    assert inside["interfaces"] == ["lo"]
    assert host_config["NetworkMode"] == "none"
    assert host_config["IpcMode"] == "private"
    assert host_config["PidMode"] == ""
    assert not {"kvm", "mem", "sda", "vsock", "kmsg"} & set(inside["devices"])


def test_egress_is_the_owners_to_allow(world: World) -> None:
    spec = world.spec("pass", network="egress")
    with pytest.raises(RunRefused, match="egress"):
        world.runner.start(spec)
    allowed = world.restarted(allow_egress=True)
    allowed.start(spec)
    world.ended(spec.run_id)
    assert _inspect(world, spec.run_id)["HostConfig"]["NetworkMode"] == EGRESS_NETWORK
    network = docker.from_env().api.inspect_network(EGRESS_NETWORK)
    assert network["Options"]["com.docker.network.bridge.enable_icc"] == "false"


def test_volumes_of_an_image_are_bounded_too(world: World) -> None:
    code = "open('/vol/x', 'w').write('x'); print(open('/proc/mounts').read())"
    client = docker.from_env()
    base = client.api.create_container(world.spec("").image, ["true"])
    try:
        made = client.api.commit(base["Id"], changes="VOLUME /vol")["Id"]
    finally:
        client.api.remove_container(base["Id"])
    try:
        spec, status = world.run(code, image=made, image_id=made)
        assert status.exit_code == 0, world.output(spec.run_id)
        assert any(line.startswith("tmpfs /vol ") for line in world.output(spec.run_id))
        assert not [m for m in _inspect(world, spec.run_id)["Mounts"] if m["Type"] == "volume"]
        world.runner.remove(spec.run_id)
    finally:
        client.api.remove_image(made)


def test_a_gpu_is_asked_for_by_its_uuid(world: World) -> None:
    info = docker.from_env().info()
    if "nvidia" in info["Runtimes"] or info.get("DiscoveredDevices"):
        pytest.skip("this engine has GPUs: it would start")
    spec = world.spec("pass", device_ids=("GPU-0a1b",))
    with pytest.raises(StartFailed, match="hand out its GPU"):
        world.runner.start(spec)
    (request,) = _inspect(world, spec.run_id)["HostConfig"]["DeviceRequests"]
    assert (request["Driver"], request["DeviceIDs"]) == ("nvidia", ["GPU-0a1b"])
    assert request["Capabilities"] == [["gpu", "compute", "utility"]]


def test_threads_follow_the_cpu_quota(world: World) -> None:
    code = (
        "import os, threading; t = threading.Thread(target=print, args=('thread',)); "
        "t.start(); t.join(); print(os.environ['OMP_NUM_THREADS'])"
    )
    spec, status = world.run(code, cpu_millis=1700)
    assert status.exit_code == 0
    assert world.output(spec.run_id) == ["thread", "1"]


def test_the_filter_lets_subprocesses_and_files_work(world: World) -> None:
    code = (
        "import subprocess, tempfile, sqlite3, asyncio; "
        "print(subprocess.run(['sh', '-c', 'echo a | cat'], capture_output=True).stdout); "
        "asyncio.run(asyncio.sleep(0)); tempfile.TemporaryFile().write(b'x')"
    )
    spec, status = world.run(code)
    assert status.exit_code == 0, world.output(spec.run_id)
    assert world.output(spec.run_id) == ["b'a\\n'"]


def test_an_image_that_is_not_here_says_what_to_do(world: World) -> None:
    from sublet_agent.core.runner_port import ImageNotAllowed, ImageUnknown

    with pytest.raises(ImageUnknown, match="an id alone can't be pulled"):
        world.runner.ensure_image("sha256:" + "1" * 64, print, "digest")
    with pytest.raises(ImageNotAllowed, match="--allow-registry"):
        world.runner.ensure_image("localhost:1/nowhere@sha256:" + "1" * 64, print, "digest")
