"""What odd jobs do, drawn from a seed, and the reasons that their ends may have.

A job does some odd deeds in the folders that it can write, and then comes to an end. The table of
what may follow stands here, beside what is done, and knows nothing of the agent: it is what a
person would say who has read the job.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from sublet_contracts.reasons import Reason

PRELUDE = """\
import os, sys, time, json, signal, stat, threading, random, hashlib, socket, errno
C = os.environ['SUBLET_CHECKPOINT_DIR']
O = os.environ.get('SUBLET_OUTPUT_DIR') or os.getcwd()
H = next(at for at in (os.getcwd(), os.environ.get('HOME', '/'), '/tmp') if os.access(at, os.W_OK))
os.chdir(H)
os.makedirs(H + '/outside', exist_ok=True)
open(H + '/secret', 'w').close()
dice = random.Random({seed})
def tried(deed):
    try:
        deed()
    except (OSError, ValueError, RecursionError, OverflowError):
        pass  # what this system doesn't let it do is left out
def write(path, data=b''):
    with open(path, 'wb') as file:
        file.write(data if isinstance(data, bytes) else data.encode('utf-8', 'surrogateescape'))
def save(step, content=b'weights', done=None):
    at = f'{{C}}/out/step-{{step}}'
    os.makedirs(at + '.tmp', exist_ok=True)
    write(at + '.tmp/model.bin', content)
    entry = dict(path='model.bin', size_bytes=len(content))
    good = json.dumps(dict(step=step, files=[entry], meta={{}}))
    write(at + '.tmp/DONE', good if done is None else done)
    os.rename(at + '.tmp', at)
"""


@dataclass(frozen=True)
class Deed:
    """Something odd. `code` defines `deed`."""

    name: str
    code: str
    anyway: frozenset[Reason] = frozenset()
    """reasons that the run may have because of it, whatever its end"""
    instead_of_success: frozenset[Reason] = frozenset()
    """reasons that it may have where it would have succeeded"""
    may_finish: bool = False
    """whether exit code 0 when asked to stop may be believed after it"""


@dataclass(frozen=True)
class Order:
    """What the broker asks for while the job runs."""

    after_s: float
    desired: str
    reason: Reason
    grace_ms: int


@dataclass(frozen=True)
class End:
    """How a job comes to its end. `code` runs last; `reasons`: one of these."""

    name: str
    code: str
    reasons: frozenset[Reason]
    orders: tuple[Order, ...] = ()
    on_docker: frozenset[Reason] | None = None
    """where another may follow there"""
    command: tuple[str, ...] | None = None
    """instead of a program in Python"""
    may_be_done: bool = False
    """it ends with 0 when asked to stop: done, if something says so"""


@dataclass(frozen=True)
class OddJob:
    """One of them."""

    seed: int
    deeds: tuple[Deed, ...]
    end: End
    pause_s: float

    @property
    def name(self) -> str:
        """Say what it does."""
        return f"{self.seed}: {', '.join(d.name for d in self.deeds) or 'nothing'}; {self.end.name}"

    @property
    def code(self) -> str:
        """Return the program."""
        parts = [PRELUDE.format(seed=self.seed)]
        for deed in self.deeds:
            parts.append(f"{deed.code.strip()}\ntried(deed)\n")
        parts.append(f"time.sleep({self.pause_s})\n{self.end.code}")
        return "\n".join(parts)

    def reasons(self, kind: str) -> frozenset[Reason]:
        """Return those of which its end must have one."""
        found = self.end.reasons
        if kind == "docker" and self.end.on_docker is not None:
            found = self.end.on_docker
        if self.end.may_be_done and any(deed.may_finish for deed in self.deeds):
            found |= {Reason.SUCCEEDED}
        if Reason.SUCCEEDED in found:
            found = found.union(*(deed.instead_of_success for deed in self.deeds))
        return found.union(*(deed.anyway for deed in self.deeds))


def draw(seed: int) -> OddJob:
    """Return the odd job of a seed."""
    dice = Random(seed)
    deeds = tuple(dice.choice(DEEDS)(dice) for _ in range(dice.choice((0, 1, 1, 1, 2, 2, 3, 4))))
    end = dice.choice(ENDS)(dice)
    pause_s = dice.choice((0.0, 0.0, 0.1, 0.3, 0.6))
    return OddJob(seed, deeds, end, pause_s)


# -- deeds -----------------------------------------------------------------------------------------

Make = Callable[[Random], Deed]
_NO_SUCCESS = frozenset({Reason.CHECKPOINT_INVALID})
_TOO_MUCH = frozenset({Reason.DISK_LIMIT})


def _fixed(
    name: str,
    body: str,
    *,
    anyway: Iterable[Reason] = (),
    instead: Iterable[Reason] = (),
    may_finish: bool = False,
) -> Make:
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    deed = Deed(name, f"def deed():\n{indented}", frozenset(anyway), frozenset(instead), may_finish)
    return lambda _dice: deed


def _drawn(
    name: str,
    body: Callable[[Random], str],
    *,
    anyway: Iterable[Reason] = (),
    instead: Iterable[Reason] = (),
    may_finish: bool = False,
) -> Make:
    def make(dice: Random) -> Deed:
        made = _fixed(name, body(dice), anyway=anyway, instead=instead, may_finish=may_finish)
        return made(dice)

    return make


_ODD_PROGRESS = (
    "'[' * 60_000",
    "'{\"step\": 1e400}'",
    "'{\"step\": ' + '9' * 4000 + '}'",
    '\'{"step": -5, "total": true, "metrics": {"loss": NaN, "a": 1e999}}\'',
    '\'{"step": 9007199254740991, "total": 9007199254740991}\'',
    "'{\"step\": 9007199254740992}'",
    '\'{"step": 3, "metrics": {"\\\\ud800": 1, "x" : [1]}}\'',
    "b'\\xff\\xfe\\x00' * 100",
    "'x' * 200_000",
    '\'{"step": 1, "step": 2, "total": "many"}\'',
    "''",
    "'null'",
)
_ODD_STEPS = (
    "step-007",
    "step--1",
    "step-99999999999999999999",
    "step-999999999999999",
    "step-9007199254740991",
    "step-1e3",
    "step-0",
    "step-5.tmp",
    "step-",
    "STEP-5",
    "step-५",
)
_ODD_DONES = (
    "b''",
    "'[' * 100_000",
    "'[' + '[],' * 2_000_000 + '[]]'",
    "b'\\xff' * 1000",
    "json.dumps(dict(step=5, files=[dict(path='../../x', sha256='', size_bytes=0)]))",
    '\'{"step": 1e999, "files": []}\'',
    "'{\"step\": ' + '9' * 4300 + ', \"files\": []}'",
    '\'{"step": 5, "files": null}\'',
    "'{\"step\": 5, \"files\": [' + '{},' * 300_000 + '{}]}'",
    "' ' * (17 * 1024 * 1024)",
)
_ODD_NAMES = (
    "'new\\nline'",
    "'back\\\\slash'",
    "b'\\xff\\xfe bad utf8'",
    "'\\x01\\x1b[2Jcontrol'",
    "'n' * 255",
    "'-rf'",
    "' '",
    "'a:b|c*?'",
    "'\\u202egpj.exe'",
    "'DONE'",
    "'.'  * 3",
)
_SPECIAL = (
    "os.mkfifo(at)",
    "os.chdir(os.path.dirname(at))\n"
    "socket.socket(socket.AF_UNIX).bind(os.path.basename(at))\n"
    "os.chdir(H)",
    # Never to what isn't this job's: on the process runner it may write where it likes.
    "os.symlink(H + '/secret', at)",
    "os.symlink('nowhere', at)",
    "os.symlink(os.path.basename(at), at)",
    "os.symlink(H + '/outside', at)",
    "os.symlink('/proc/self/fd/0', at)",
    "os.mknod(at, stat.S_IFCHR | 0o666, os.makedev(1, 5))",
    "os.mknod(at, stat.S_IFBLK | 0o666, os.makedev(7, 200))",
    "os.mkdir(at)",
    "os.mkdir(at); os.chmod(at, 0)",
    "write(at, b'x'); os.chmod(at, 0)",
)


def _special_at(path: str) -> Callable[[Random], str]:
    def body(dice: Random) -> str:
        return (
            f"at = f'{path}'\n"
            "import shutil\n"
            "shutil.rmtree(at, ignore_errors=True) if os.path.isdir(at) and not os.path.islink(at)"
            " else os.path.lexists(at) and os.unlink(at)\n" + dice.choice(_SPECIAL)
        )

    return body


def _race(
    name: str,
    body: str,
    *,
    anyway: Iterable[Reason] = (),
    instead: Iterable[Reason] = (),
    may_finish: bool = False,
) -> Make:
    indented = "\n".join(f"        {line}" for line in body.strip().splitlines())
    code = f"""\
end = time.monotonic() + dice.choice((0.3, 0.8))
def again():
    while time.monotonic() < end:
{indented.replace("        ", "        ", 1)}
def runner():
    try:
        again()
    except OSError:
        pass
thread = threading.Thread(target=runner)
thread.start()
thread.join()"""
    return _fixed(name, code, anyway=anyway, instead=instead, may_finish=may_finish)


DEEDS: tuple[Make, ...] = (
    _drawn(
        "odd progress",
        lambda dice: f"write(C + '/progress.json', {dice.choice(_ODD_PROGRESS)})",
        may_finish=True,
    ),
    _drawn("odd thing for progress", _special_at("{C}/progress.json"), may_finish=True),
    _race(
        "progress that changes what it is",
        """\
p = C + '/progress.json'
write(p, '{"step": 4, "total": 9}')
time.sleep(0.001)
os.unlink(p)
os.mkdir(p)
os.rmdir(p)""",
        may_finish=True,
    ),
    _drawn("odd thing for STOP", _special_at("{C}/STOP")),
    _drawn("odd thing for SAVE", _special_at("{C}/SAVE")),
    _drawn("odd thing for ack", _special_at("{C}/ack"), may_finish=True),
    _drawn("odd thing for out", _special_at("{C}/out"), may_finish=True),
    _drawn("odd thing for in", _special_at("{C}/in"), may_finish=True),
    _drawn("odd thing as a step", _special_at("{C}/out/step-7"), may_finish=True),
    _drawn(
        "oddly named steps",
        lambda dice: "\n".join(
            f"os.mkdir(C + '/out/{name}'); write(C + '/out/{name}/DONE', b'{{}}')"
            for name in dice.sample(_ODD_STEPS, 3)
        ),
        may_finish=True,
    ),
    _drawn(
        "odd DONE",
        lambda dice: f"save(5, b'w', {dice.choice(_ODD_DONES)})",
        may_finish=True,
        anyway=_TOO_MUCH,
    ),
    _drawn(
        "odd thing for DONE",
        lambda dice: (
            "os.mkdir(C + '/out/step-6'); write(C + '/out/step-6/w', b'w')\n"
            + _special_at("{C}/out/step-6/DONE")(dice)
        ),
        may_finish=True,
    ),
    _drawn(
        "odd thing in a checkpoint",
        lambda dice: "save(8)\n" + _special_at("{C}/out/step-8/odd")(dice),
        may_finish=True,
    ),
    _fixed("good checkpoints", "for n in (1, 2, 3): save(n)", may_finish=True),
    _fixed("many checkpoints", "for n in range(300): save(n)", may_finish=True, anyway=_TOO_MUCH),
    _fixed(
        "far too many step folders",
        "for n in range(6_000): os.mkdir(f'{C}/out/step-{n}')",
        anyway=(Reason.CHECKPOINT_INVALID, Reason.DISK_LIMIT),
        may_finish=True,
    ),
    _race(
        "checkpoints that move while they are read",
        """\
n = dice.randrange(5)
save(n, os.urandom(dice.randrange(100_000)))
os.rename(f'{C}/out/step-{n}', f'{C}/out/step-{n}x')
os.rename(f'{C}/out/step-{n}x/model.bin', f'{C}/out/step-{n}x/DONE')
os.rename(f'{C}/out/step-{n}x', f'{C}/out/step-{n + 10}')""",
        may_finish=True,
        anyway=_TOO_MUCH,
    ),
    _race(
        "a file that grows and shrinks while it is read",
        """\
save(3, b'w' * 200_000) if not os.path.exists(C + '/out/step-3') else None
os.truncate(C + '/out/step-3/model.bin', dice.randrange(1_000_000))""",
        may_finish=True,
        anyway=_TOO_MUCH,
    ),
    _race(
        "out that comes and goes",
        """\
os.rename(C + '/out', C + '/elsewhere')
os.symlink(H + '/outside', C + '/out')
os.unlink(C + '/out')
os.rename(C + '/elsewhere', C + '/out')""",
    ),
    _fixed(
        "no checkpoint folder any more",
        "import shutil\nshutil.rmtree(C, ignore_errors=True)",
        may_finish=True,
    ),
    _fixed(
        "a file for a checkpoint folder",
        "import shutil\nshutil.rmtree(C)\nwrite(C, b'none')",
        may_finish=True,
    ),
    _fixed(
        "closed checkpoint folder",
        "save(2)\nos.chmod(C + '/out', 0)\nos.chmod(C, 0)",
        may_finish=True,
    ),
    _drawn(
        "odd names among the outputs",
        lambda dice: "\n".join(
            f"name = {name}\nwrite(os.path.join(os.fsencode(O), os.fsencode(name)), b'x')"
            for name in dice.sample(_ODD_NAMES, 2)
        ),
    ),
    _drawn("odd thing among the outputs", lambda dice: _special_at("{O}/odd")(dice)),
    _fixed(
        "a deep tree of outputs",
        """\
at = os.open(O, os.O_RDONLY)
for n in range(dice.choice((60, 150, 1500))):
    os.mkdir('d', dir_fd=at)
    below = os.open('d', os.O_RDONLY, dir_fd=at)
    os.close(at)
    at = below""",
        instead=_NO_SUCCESS,
        anyway=_TOO_MUCH,
    ),
    _fixed(
        "a wide tree of outputs",
        """\
for n in range(60):
    os.mkdir(f'{O}/wide-{n}')
    for m in range(60): write(f'{O}/wide-{n}/{m}')""",
        anyway=_TOO_MUCH,
    ),
    _fixed(
        "closed folders among the outputs",
        """\
os.makedirs(O + '/a/b/c')
write(O + '/a/b/c/file', b'x' * 10_000)
os.chmod(O + '/a/b', 0)
os.chmod(O + '/a', 0)""",
    ),
    _fixed(
        "a sparse file",
        """\
write(O + '/sparse')
size = 1 << 40
while size:
    try:
        os.truncate(O + '/sparse', size)
        break
    except OSError:
        size >>= 1""",
        anyway=_TOO_MUCH,
    ),
    _fixed(
        "hard links",
        """\
write(O + '/one', b'x' * 100_000)
for n in range(200): os.link(O + '/one', f'{O}/link-{n}')""",
        anyway=_TOO_MUCH,
    ),
    _fixed(
        "too much on disk",
        "for n in range(40): write(f'{O}/full-{n}', b'x' * 1_000_000)\ntime.sleep(0.5)",
        anyway=_TOO_MUCH,
        instead=_NO_SUCCESS,
    ),
    _drawn(
        "what looks like a trainer's checkpoint",
        lambda dice: "\n".join(
            (
                "os.makedirs(O + '/checkpoint-20', exist_ok=True)",
                "for name in ('model.safetensors', 'optimizer.pt', 'rng_state.pth'):",
                "    write(O + '/checkpoint-20/' + name, b'PK\\x03\\x04 torn' * dice.randrange(5))",
                "at = O + '/checkpoint-20/trainer_state.json'",
                dice.choice(
                    (
                        "os.mkdir(at)",
                        "os.mkfifo(at)",
                        'write(at, \'{"global_step": 20, "max_steps": 9007199254740991}\')',
                        "write(at, '[' * 1_000_000)",
                        "write(at, b'{' + b' ' * 17_000_000 + b'}')",
                    )
                ),
                "for path in (at, O + '/checkpoint-20'): os.utime(path, (1e9, 1e9))",
            )
        ),
        instead=_NO_SUCCESS,
        anyway=_TOO_MUCH,
        may_finish=True,
    ),
    _fixed(
        "times of nowhere",
        """\
for n, at in enumerate((0, -1, 1 << 33, 1 << 40)):
    os.makedirs(f'{O}/checkpoint-{n}')
    write(f'{O}/checkpoint-{n}/model.safetensors', b'x')
    write(f'{O}/checkpoint-{n}/trainer_state.json', json.dumps(dict(global_step=n, max_steps=9)))
    tried(lambda: os.utime(f'{O}/checkpoint-{n}/trainer_state.json', (at, at)))""",
        may_finish=True,
    ),
    _race(
        "outputs that change while they are read",
        """\
n = dice.randrange(9)
os.makedirs(f'{O}/x/{n}', exist_ok=True)
write(f'{O}/x/{n}/file', os.urandom(dice.randrange(1000)))
os.rename(f'{O}/x/{n}', f'{O}/x/{n}y{dice.random()}')""",
        anyway=_TOO_MUCH,
    ),
    _fixed("binary output", "sys.stdout.buffer.write(os.urandom(200_000))\nsys.stdout.flush()"),
    _fixed("half characters", "sys.stdout.buffer.write(b'\\xed\\xa0\\x80\\x00\\xff\\n' * 500)"),
    _fixed("an endless line", "sys.stdout.write('x' * 1_000_000)\nsys.stdout.flush()"),
    _fixed("a line that returns", "for n in range(2_000): sys.stdout.write(f'\\r{n} %')"),
    _fixed("no output any more", "os.close(1)\nos.close(2)"),
    _fixed("many empty lines", "sys.stdout.write('\\n' * 500_000)\nsys.stdout.flush()"),
    _fixed("many lines", "print('line\\n' * 20_000, end='')"),
    _fixed(
        "children that stay",
        """\
for n in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)""",
    ),
    _fixed(
        "a child that ends by a signal",
        """\
for number in (9, 15, 11, 19):
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), number)
        os._exit(0)
    if number == 19:
        os.waitpid(pid, os.WUNTRACED)
        os.kill(pid, 9)
    os.waitpid(pid, 0)""",
    ),
    _fixed(
        "children that go on writing",
        """\
if os.fork() == 0:
    os.setsid()
    n = 0
    while n < 2_000:
        tried(lambda: write(f'{O}/late-{n % 50}', b'late'))
        n += 1
    time.sleep(600)""",
        instead=_NO_SUCCESS,
        anyway=_TOO_MUCH,
    ),
    _fixed(
        "no signal is heard",
        "for n in (1, 2, 3, 10, 12, 15): signal.signal(n, signal.SIG_IGN)",
    ),
    _fixed("closed home", "write(H + '/x', b'x')\nos.chmod(H + '/x', 0)"),
)


# -- ends ------------------------------------------------------------------------------------------

MakeEnd = Callable[[Random], End]
_SENT = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_OWN_MISTAKE = (
    *(signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGBUS),
    *(signal.SIGSYS, signal.SIGTRAP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2),
)
_BY_EITHER = frozenset({Reason.KILLED_UNATTRIBUTED, Reason.JOB_FAILED})


def _returns(dice: Random) -> End:
    code = dice.choice((0, 0, 0, 75, dice.randrange(256)))
    reason = {0: Reason.SUCCEEDED, 75: Reason.YIELDED}.get(code, Reason.JOB_FAILED)
    reasons = frozenset({reason})
    if code - 128 in _SENT:
        # Before, a deed may have ended one of its own processes by that very signal.
        reasons = _BY_EITHER
    how = dice.choice(("os._exit({})", "sys.stdout = None; os._exit({})", "os._exit({} + 256)"))
    return End(f"exit {code}", how.format(code), reasons)


def _signals_itself(dice: Random) -> End:
    number = dice.choice((*_SENT, *_OWN_MISTAKE))
    code = (
        f"tried(lambda: signal.signal({number:d}, signal.SIG_DFL))\n"
        f"os.kill(os.getpid(), {number:d})\ntime.sleep(0.5)\nos._exit(9)"
    )
    reasons = frozenset({Reason.KILLED_UNATTRIBUTED if number in _SENT else Reason.JOB_FAILED})
    return End(f"kills itself with {signal.Signals(number).name}", code, reasons)


def _handles_its_own_signal(dice: Random) -> End:
    code = dice.randrange(1, 75)
    return End(
        f"answers its own TERM with {code}",
        f"signal.signal(15, lambda *_: os._exit({code}))\n"
        "os.kill(os.getpid(), 15)\ntime.sleep(1)\nos._exit(9)",
        # It chose the code; who asked is seen where there is a witness, and nothing else can say.
        _BY_EITHER,
    )


def _kills_its_parent(_dice: Random) -> End:
    code = (
        "what = open(f'/proc/{os.getppid()}/cmdline', 'rb').read()\n"
        "if b'sublet_agent.adapters.process.supervisor' in what: os.kill(os.getppid(), 9)\n"
        "time.sleep(1)\nos._exit(5)"
    )
    return End(
        "kills its parent", code, frozenset({Reason.KILLED_UNATTRIBUTED}), on_docker=_BY_EITHER
    )


def _kills_its_group(_dice: Random) -> End:
    code = "os.killpg(os.getpgrp(), 9) if os.getpgrp() == os.getpid() else os._exit(9)"
    return End(
        "kills its group", code, frozenset({Reason.KILLED_UNATTRIBUTED}), on_docker=_BY_EITHER
    )


def _passes_a_kill_on(_dice: Random) -> End:
    code = (
        "pid = os.fork()\nif not pid: time.sleep(60)\n"
        "os.kill(pid, 9)\nos.waitpid(pid, 0)\nos._exit(137)"
    )
    # As a shell does for what it ran.
    return End("returns 137 for its worker", code, frozenset({Reason.KILLED_UNATTRIBUTED}))


def _takes_all_memory(_dice: Random) -> End:
    code = (
        "held = []\nfor n in range(200):\n"
        "    held.append(bytearray(b'x') * 8_000_000)\n    time.sleep(0.01)\nos._exit(9)"
    )
    return End("takes all memory", code, frozenset({Reason.OUT_OF_MEMORY}))


def _is_cancelled(dice: Random) -> End:
    order = Order(
        dice.choice((0.0, 0.2, 0.6, 1.2)), "stop", Reason.CANCELLED, dice.choice((0, 500))
    )
    code = dice.choice(
        (
            "time.sleep(600)",
            "os.kill(os.getpid(), 19)\ntime.sleep(600)",
            "signal.signal(15, signal.SIG_IGN)\nwhile True: time.sleep(1)",
        )
    )
    return End("is cancelled", code, frozenset({Reason.CANCELLED}), (order,))


def _is_drained(dice: Random) -> End:
    order = Order(dice.choice((0.3, 0.8)), "drain", Reason.RECLAIMED, 600)
    code = dice.choice(
        (
            "time.sleep(600)",
            "signal.signal(15, signal.SIG_IGN)\nwhile True: time.sleep(1)",
            "signal.signal(15, lambda *_: os._exit(0))\nwhile True: time.sleep(1)",
            "signal.signal(15, lambda *_: os._exit(75))\nwhile True: time.sleep(1)",
        )
    )
    done = "_exit(0)" in code
    return End("is drained", code, frozenset({Reason.RECLAIMED}), (order,), may_be_done=done)


def _can_not_be_started(dice: Random) -> End:
    command = dice.choice((("/no/such/program",), ("/etc",), ("python3", "/no/such/script.py")))
    return End("can't be started", "", frozenset({Reason.JOB_FAILED}), command=command)


ENDS: tuple[MakeEnd, ...] = (
    *(_returns,) * 8,
    *(_signals_itself,) * 3,
    _handles_its_own_signal,
    _kills_its_parent,
    _kills_its_group,
    _passes_a_kill_on,
    _takes_all_memory,
    *(_is_cancelled,) * 2,
    *(_is_drained,) * 2,
    _can_not_be_started,
)
