"""Keras with BackupAndRestore, which resumes by itself; its backend is torch.

python keras_fit.py OUT [EPOCHS] [PACE_S]
"""

import os
import sys
import time

os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np

out = sys.argv[1]
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 8
pace_s = float(sys.argv[3]) if len(sys.argv) > 3 else 2.0


class Tell(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        # Its order of the data and its dropout depend on the epoch alone.
        keras.utils.set_random_seed(100 + epoch)
        print("starting epoch", epoch, flush=True)

    def on_epoch_end(self, epoch, logs=None):
        print("epoch", epoch, "loss", logs["loss"], flush=True)
        time.sleep(pace_s)


keras.utils.set_random_seed(5)
generator = np.random.default_rng(5)
inputs = generator.normal(size=(96, 16)).astype("float32")
labels = (inputs[:, 0] > 0).astype("float32")
model = keras.Sequential(
    [
        keras.Input((16,)),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dense(1, activation="sigmoid"),
    ]
)
model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")
os.makedirs(out, exist_ok=True)
model.fit(
    inputs,
    labels,
    batch_size=8,
    epochs=epochs,
    verbose=0,
    shuffle=False,
    callbacks=[keras.callbacks.BackupAndRestore(os.path.join(out, "backup")), Tell()],
)
np.savez(os.path.join(out, "weights.npz"), *model.get_weights())
