"""Simulated markets in each test run: known seeds, one drawn by chance, and the net itself."""

from __future__ import annotations

import ast
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sublet_broker.adapters.memory.blobs import MemoryBlobs
from sublet_broker.service.ports import BlobMissing
from sublet_contracts.digests import digest_of
from tests.simulation.faults import FAULTS, UnknownFault, parse_faults
from tests.simulation.market import Market, Outcome, Plan, simulate
from tests.simulation.models import Violation
from tests.simulation.mutants.mutate import Mutant, load_mutants

ROOT = Path(__file__).resolve().parents[2]
SMALL = Plan(faults=frozenset(FAULTS), hours=0.25, jobs=6, providers=3, fault_every_ms=20_000)


def right(outcome: Outcome) -> None:
    lines = "\n".join(outcome.last)
    assert not outcome.violation, f"seed {outcome.seed}: {outcome.violation}\n{lines}"


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_money_and_work_are_right(seed: int) -> None:
    right(simulate(seed, SMALL))


def test_a_market_drawn_by_chance() -> None:
    seed = secrets.randbelow(10**9)
    print(f"seed {seed}")
    right(simulate(seed, SMALL))


def test_without_faults_nothing_is_lost() -> None:
    outcome = simulate(7, replace(SMALL, faults=frozenset()))
    right(outcome)
    assert outcome.charged_ucr > 0
    assert outcome.lost_device_ms == 0


def test_one_seed_is_one_history_whatever_the_hash_seed() -> None:
    digests = set()
    for hash_seed in ("0", "4711"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.simulation",
                "--seed",
                "5",
                "--hours",
                "0.1",
                "--jobs",
                "4",
                "--providers",
                "3",
                "--fault-every-s",
                "20",
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.rsplit("digest ", 1)[1])
    assert len(digests) == 1


def test_the_auditor_sees_a_micro_credit() -> None:
    """One ucr too much on one account, and one transfer too many, and it says so."""
    market = Market(1, replace(SMALL, faults=frozenset(), hours=0.05))
    assert not market.run().violation
    store = market.broker.store
    facts = next(t.facts for k, t in store._tables.items() if k.__name__ == "AccountFact")
    key, account = next((k, a) for k, a in facts.items() if k != ("world",))
    with pytest.raises(Violation, match="its transfers give"), store.transaction() as tx:
        tx.put(replace(account, credits_ucr=account.credits_ucr + 1))
    assert key == (account.id,)


def test_damaged_content_counts_as_missing_once_it_was_read() -> None:
    """Found by seed 11: a damaged chunk that checkpoints share was never sent again."""
    blobs, digest = MemoryBlobs(), digest_of(b"base")
    blobs.put(digest, b"base")
    blobs.damage(digest)
    with pytest.raises(BlobMissing):
        blobs.get(digest)
    assert not blobs.has(digest)
    blobs.put(digest, b"base")
    assert blobs.get(digest) == b"base"


@pytest.mark.parametrize("mutant", load_mutants(), ids=lambda mutant: mutant.name)
def test_a_planted_bug_still_has_its_place(mutant: Mutant, tmp_path: Path) -> None:
    """Found by nobody, it would be one that survives: see mutate.py."""
    for edit in mutant.edits:
        (tmp_path / edit.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / edit.file, tmp_path / edit.file)
    assert not mutant.apply(tmp_path)
    for edit in mutant.edits:
        ast.parse((tmp_path / edit.file).read_text())


def test_faults_are_named() -> None:
    assert parse_faults("all,-fork") == frozenset(FAULTS) - {"fork"}
    assert parse_faults("none") == frozenset()
    with pytest.raises(UnknownFault, match="there are: break"):
        parse_faults("brek")
