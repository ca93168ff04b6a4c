"""Builds tests' stand-ins for the NVIDIA driver's library, for whole processes to load."""

import os
import subprocess
from pathlib import Path

from tests.agent.test_nvml import STUB
from tests.services import require

# Two GPUs of 24 GB or as many as `count` says. What a GPU answers stands in the file that NVML_CTL
# names, a line `key number` each, and is read anew for every question:
#   init, all: this error for the set-up, for everything   err1: for every question about GPU 1
#   hang1: a question about GPU 1 never returns            used1: bytes of its memory in use
#   nomem1: it knows of no memory of its own               card1: another card is in that slot
#   ecc1: errors so far that can't be corrected            mig1: so many MIG instances
#   xids: records so far; xid0, xid1, ...: 1000 * GPU + the record's number
TOLD_STUB = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef void *H;
static long long told(const char *key, int n) {
  char want[32], name[32]; long long number, found = 0;
  FILE *file = fopen(getenv("NVML_CTL"), "r");
  if (n < 0) snprintf(want, 32, "%s", key); else snprintf(want, 32, "%s%d", key, n);
  while (file && fscanf(file, "%31s %lld", name, &number) == 2)
    if (!strcmp(name, want)) found = number;
  if (file) fclose(file);
  return found;
}
static int id(H h) { return ((int)(long)h - 1) % 100; }
static int mig(H h) { return ((int)(long)h - 1) / 100; }
static int bad(H h) {
  while (told("hang", id(h))) sleep(1);
  return told("all", -1) ? told("all", -1) : told("err", id(h));
}
int nvmlInitWithFlags(unsigned f) { return told("all", -1) ? told("all", -1) : told("init", -1); }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int e) {
  return e == 18 ? "Driver/library version mismatch" : e == 15 ? "GPU is lost"
    : e == 3 ? "Not Supported" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char *v, unsigned n) { snprintf(v, n, "580.10"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) {
  *n = told("count", -1) ? told("count", -1) : 2; return told("all", -1); }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, H *h) { *h = (H)(long)(i + 1); return bad(*h); }
int nvmlDeviceGetUUID(H h, char *u, unsigned n) {
  if (mig(h)) snprintf(u, n, "MIG-%d-%d", id(h), mig(h) - 1);
  else snprintf(u, n, "GPU-%d-%lld", id(h), told("card", id(h)));
  return bad(h); }
int nvmlDeviceGetName(H h, char *s, unsigned n) {
  snprintf(s, n, "NVIDIA GeForce RTX 4090"); return bad(h); }
int nvmlDeviceGetMemoryInfo(H h, unsigned long long *m) {
  if (told("nomem", id(h))) return 3;
  m[0] = 25757220864ULL; m[2] = told("used", id(h)); m[1] = m[0] - m[2]; return bad(h); }
int nvmlDeviceGetCudaComputeCapability(H h, int *a, int *b) { *a = 8; *b = 9; return bad(h); }
int nvmlDeviceGetEccMode(H h, unsigned *a, unsigned *b) { *a = *b = 1; return bad(h); }
int nvmlDeviceGetTotalEccErrors(H h, int kind, int since, unsigned long long *n) {
  *n = kind == 1 && since == 0 ? told("ecc", id(h)) : 0; return bad(h); }
int nvmlDeviceGetMigMode(H h, unsigned *a, unsigned *b) {
  *a = *b = told("mig", id(h)) > 0; return bad(h); }
int nvmlDeviceGetMaxMigDeviceCount(H h, unsigned *n) { *n = 7; return bad(h); }
int nvmlDeviceGetMigDeviceHandleByIndex(H h, unsigned i, H *m) {
  if (i >= told("mig", id(h))) return 6;
  *m = (H)(long)((long)h + 100 * (i + 1)); return bad(h); }
int nvmlDeviceGetMaxPcieLinkGeneration(H h, unsigned *v) { *v = 4; return bad(h); }
int nvmlDeviceGetMaxPcieLinkWidth(H h, unsigned *v) { *v = 16; return bad(h); }
int nvmlDeviceGetEnforcedPowerLimit(H h, unsigned *v) { *v = 450000; return bad(h); }
static long long given = -1;
int nvmlEventSetCreate(H *set) { *set = (H)1; if (given < 0) given = told("xids", -1); return 0; }
int nvmlDeviceGetSupportedEventTypes(H h, unsigned long long *kinds) { *kinds = 8; return bad(h); }
int nvmlDeviceRegisterEvents(H h, unsigned long long kinds, H set) { return bad(h); }
struct event { H device; unsigned long long kind, data; unsigned gpu, part; };
int nvmlEventSetWait_v2(H set, struct event *e, unsigned wait) {
  if (given >= told("xids", -1)) return 10;
  long long record = told("xid", given++);
  e->device = (H)(long)(record / 1000 + 1); e->kind = 8; e->data = record % 1000;
  return 0; }
"""
CARDS = ("GPU-0-0", "GPU-1-0")


def build(folder: Path) -> dict[str, str]:
    """Build the one that says always the same; return the environment in which a process finds
    three GPUs."""
    return _build(folder, STUB)


class Driver:
    """The one that says what it is told to. `environment` is for processes that shall load it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.file = folder / "ctl"
        self.environment = {**_build(folder, TOLD_STUB), "NVML_CTL": str(self.file)}
        self.says()

    def says(self, **told: int) -> None:
        """Have it say this from now on, and nothing else."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text("".join(f"{key} {number}\n" for key, number in told.items()))
        fresh.replace(self.file)


def _build(folder: Path, text: str) -> dict[str, str]:
    require("cc")
    source = folder / "stub.c"
    source.write_text(text)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    before = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{folder}:{before}" if before else str(folder)}
