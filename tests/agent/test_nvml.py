"""The GPU probe against a stand-in for the driver's library, made of C in the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sublet_agent.adapters.machine.facts import device_of
from sublet_agent.adapters.machine.host import cpu_class, gpu_class, memory_free, read_host
from sublet_agent.adapters.machine.nvml import Gpu
from sublet_contracts.documents import Device
from tests.services import require

# Three GPUs: 0 tells everything, 1 tells only its uuid, 2 is in MIG mode with instances at 0 and 2.
STUB = r"""
#include <stdio.h>
#include <string.h>
typedef void *H;
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
static int id(H h) { return (int)(long)h - 1; }
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int e) { return e == NOT_SUPPORTED ? "Not Supported" : "Error"; }
int nvmlSystemGetDriverVersion(char *v, unsigned n) { snprintf(v, n, "580.10"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, H *h) { *h = (H)(long)(i + 1); return 0; }
int nvmlDeviceGetUUID(H h, char *u, unsigned n) {
  snprintf(u, n, id(h) < 10 ? "GPU-%d" : "MIG-%d", id(h)); return 0; }
int nvmlDeviceGetName(H h, char *s, unsigned n) {
  if (id(h) == 1) return NOT_SUPPORTED;
  snprintf(s, n, id(h) < 10 ? "NVIDIA A100-SXM4-80GB" : "NVIDIA A100-SXM4-80GB MIG 1g.10gb");
  return 0; }
int nvmlDeviceGetMemoryInfo(H h, unsigned long long *m) {
  if (id(h) == 1) return NOT_SUPPORTED;
  m[0] = id(h) < 10 ? 85899345920ULL : 10737418240ULL; m[1] = m[0]; m[2] = 0; return 0; }
int nvmlDeviceGetCudaComputeCapability(H h, int *a, int *b) {
  if (id(h) == 1) return NOT_SUPPORTED; *a = 8; *b = 0; return 0; }
int nvmlDeviceGetEccMode(H h, unsigned *a, unsigned *b) {
  if (id(h) == 1) return NOT_SUPPORTED; *a = *b = 1; return 0; }
int nvmlDeviceGetMigMode(H h, unsigned *a, unsigned *b) {
  if (id(h) == 1) return NOT_SUPPORTED; *a = *b = id(h) == 2; return 0; }
int nvmlDeviceGetMaxMigDeviceCount(H h, unsigned *n) { *n = 3; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(H h, unsigned i, H *m) {
  if (i == 1) return NOT_FOUND; *m = (H)(long)(11 + i); return 0; }
int nvmlDeviceGetMaxPcieLinkGeneration(H h, unsigned *v) {
  if (id(h) == 1) return NOT_SUPPORTED; *v = 4; return 0; }
int nvmlDeviceGetMaxPcieLinkWidth(H h, unsigned *v) {
  if (id(h) == 1) return NOT_SUPPORTED; *v = 16; return 0; }
int nvmlDeviceGetUtilizationRates(H h, unsigned *u) {
  if (id(h)) return NOT_SUPPORTED; u[0] = 97; u[1] = 40; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(H h, unsigned *v) {
  if (id(h) == 1) return NOT_SUPPORTED; *v = 400000; return 0; }
"""
ASK = (
    "import json, dataclasses; from sublet_agent.adapters.machine.nvml import probe; "
    "print(json.dumps(dataclasses.asdict(probe())))"
)


def _probe(library_path: Path) -> dict[str, Any]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library_path)}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    require("cc")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "stub.c").write_text(STUB)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-w", "-o", folder / "libnvidia-ml.so.1", folder / "stub.c"],
        check=True,
    )
    return _probe(folder)


def test_all_facts_of_a_gpu(found: dict[str, Any]) -> None:
    assert found["gpus"][0] == {
        "uuid": "GPU-0",
        "name": "NVIDIA A100-SXM4-80GB",
        "hardware_class": "nvidia-a100-sxm4-80gb",
        "memory_bytes": 80 * 2**30,
        "compute_capability": "8.0",
        "driver": "580.10",
        "ecc": True,
        "mig": False,
        "pcie_generation": 4,
        "pcie_lanes": 16,
        "power_limit_mw": 400000,
        "parent_uuid": None,
        "index": 0,
        "instance": None,
        "used_bytes": 0,
        "utilization_percent": 97,
    }


def test_a_gpu_that_tells_only_its_uuid(found: dict[str, Any]) -> None:
    gpu = found["gpus"][1]
    assert gpu["uuid"] == "GPU-1"
    assert gpu["name"] == "NVIDIA GPU"
    told = {"uuid", "name", "hardware_class", "driver", "index", "used_bytes"}
    assert {k for k, v in gpu.items() if v is not None} == told


def test_mig_instances_are_the_devices(found: dict[str, Any]) -> None:
    instances = found["gpus"][2:]
    assert [(g["uuid"], g["parent_uuid"], g["mig"]) for g in instances] == [
        ("MIG-10", "GPU-2", True),
        ("MIG-12", "GPU-2", True),
    ]
    assert instances[0]["memory_bytes"] == 10 * 2**30
    assert instances[0]["hardware_class"] != found["gpus"][0]["hardware_class"]


def test_what_the_driver_tells_stands_in_the_offer(found: dict[str, Any]) -> None:
    """A fact that jobs may ask for and no offer states would be refused for ever."""
    for number, untold in ((0, set[str]()), (2, {"power_limit_mw"})):  # a GPU, a MIG instance
        device = device_of(Gpu(**found["gpus"][number]))
        unsaid = {
            name
            for name, field in Device.model_fields.items()
            if not field.is_required() and getattr(device, name) == field.default
        }
        assert unsaid == untold, (
            f"no offer says {sorted(unsaid - untold)}: nvml.py reads it, facts.py's device_of "
            "passes it on"
        )


def test_no_library_is_no_gpu_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")  # hides a real one, too
    nothing = _probe(tmp_path)
    assert nothing["gpus"] == []
    assert "no NVIDIA GPU" in nothing["reasons"][0]


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags : sse4_2 popcnt avx2 fma bmi2", "cpu-x86_64-avx2"),
        (
            "x86_64",
            "flags\t: avx2 fma bmi2 avx512f avx512bw avx512cd avx512dq avx512vl",
            "cpu-x86_64-avx512",
        ),
        ("x86_64", "flags : avx2 fma bmi2 avx512f", "cpu-x86_64-avx2"),
        ("aarch64", "Features : fp asimd", "cpu-aarch64-neon"),
        ("riscv64", "", "cpu-riscv64-base"),
    ],
)
def test_cpu_class(machine: str, flags: str, expected: str) -> None:
    assert cpu_class(machine, flags) == expected


@pytest.mark.parametrize(
    ("name", "memory_bytes", "expected"),
    [
        ("NVIDIA A100 80GB PCIe", 80 * 2**30, "nvidia-a100-80gb-pcie"),
        ("NVIDIA GeForce RTX 4090", 24564 * 2**20, "nvidia-rtx-4090-24gb"),
        ("Tesla T4", 15360 * 2**20, "nvidia-tesla-t4-15gb"),
        ("NVIDIA GPU", None, "nvidia-gpu"),
    ],
)
def test_gpu_class(name: str, memory_bytes: int | None, expected: str) -> None:
    assert gpu_class(name, memory_bytes) == expected


def test_memory_that_programs_can_still_have() -> None:
    text = "MemTotal: 100 kB\nMemFree: 10 kB\nMemAvailable:   40 kB\n"
    assert memory_free(text, 7) == 40 * 1024
    assert memory_free("MemTotal: 100 kB\n", 7) == 7


def test_this_machine(tmp_path: Path) -> None:
    facts = read_host(tmp_path)
    assert facts.cpu_count >= 1
    assert facts.memory_bytes > 2**28
    assert 0 < facts.memory_free_bytes <= facts.memory_bytes
    assert facts.disk_free_bytes > 0
    assert facts.hardware_class.startswith("cpu-")
