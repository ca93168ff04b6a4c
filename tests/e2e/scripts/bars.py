"""Progress as tqdm shows it: carriage returns, other scripts than Latin, no newline at the end."""

import sys
import time

print("Обучение 🚀 início — 训练开始")
for epoch in range(2):
    for at in range(1, 61):
        bar = "█" * (at // 4) + "▏" * (15 - at // 4)
        sys.stderr.write(f"\répoque {epoch}: {at:2}/60 |{bar}| loss={1 / at:.3f}")
        sys.stderr.flush()
        time.sleep(0.25)
    sys.stderr.write("\n")
print("\x1b[31mrot\x1b[0m fertig ✓")
sys.stdout.write("kein Zeilenende ✗")
