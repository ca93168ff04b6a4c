"""Writes what it has into the folder that it is given, and then fails in its evaluation."""

import os
import sys
import time

out = sys.argv[1]
for number in range(3):
    with open(os.path.join(out, f"model_{number}.bin"), "wb") as file:
        file.write(bytes([number]) * 100_000)
os.symlink("model_2.bin", os.path.join(out, "latest"))
with open(os.path.join(out, "metrics.csv"), "w") as file:
    file.write("epoch,loss\n1,0.5\n2,0.25\n")
print("trained; evaluating", flush=True)
time.sleep(3)
raise RuntimeError("evaluation: division by zero")
