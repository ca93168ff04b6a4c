"""`sublet.run`: submit a container, as a function call."""

from collections.abc import Mapping, Sequence

from sublet.client import Client, Job
from sublet.spec import Amount, JobSpec


def run(
    image: str,
    command: Sequence[str],
    *,
    max_price: Amount,
    budget: Amount,
    gpus: str | int = 1,
    checkpoint_every: str | int = "2m",
    patience: str | int = "20s",
    stop_grace: str | int = "30s",
    inputs: Mapping[str, str] | None = None,
    outputs: str = "",
    env: Mapping[str, str] | None = None,
    name: str = "",
    memory: str | int = "",
    disk: str | int = "10GB",
    cpus: Amount = 1,
    region: str = "",
    hardware_class: str = "",
    egress: bool = False,
    accept_receipts: Amount | None = None,
    start_within: str | int = "7d",
    wait_for_offer: bool = False,
    client: Client | None = None,
) -> Job:
    """Submit a job and return a handle for it.

    `max_price`: credits per device and hour; no machine above it is taken. `budget`: credits; the
    job never costs more: at the edge it is checkpointed and paused. `gpus`: "1", "1x24GB", "2xA100"
    or "cpu". Durations are like "90s", "2m", "1h" (a number is seconds), sizes like "24GB" or
    "512MiB" (a number is bytes). `checkpoint_every`: how often the job is asked to save;
    `patience`: silence after which its machine counts as lost; `stop_grace`: time to save when it
    is to stop. `inputs`: local file or folder -> path in the container. `outputs`: the container's
    folder that is brought back. `memory`, `disk`, `cpus`: for the whole job. `hardware_class`: only
    devices of this class (results are bit-identical within one). `egress`: whether it needs the
    network. `accept_receipts`: receipts up to this charge need no signature of yours (default: the
    budget). `start_within`: it is cancelled if nothing took it by then. `wait_for_offer`: submit
    even if nothing on the market fits now.

    Raises UnitError and InputError, which name the option; SubletError with the broker's reason,
    such as the constraint that no offer meets and the cheapest one to relax.
    """
    return (client or Client()).submit(
        JobSpec(
            image=image,
            command=command,
            max_price=max_price,
            budget=budget,
            gpus=gpus,
            checkpoint_every=checkpoint_every,
            patience=patience,
            stop_grace=stop_grace,
            inputs=inputs or {},
            outputs=outputs,
            env=env or {},
            name=name,
            memory=memory,
            disk=disk,
            cpus=cpus,
            region=region,
            hardware_class=hardware_class,
            egress=egress,
            accept_receipts=accept_receipts,
            start_within=start_within,
        ),
        wait_for_offer=wait_for_offer,
    )
