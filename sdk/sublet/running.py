"""`sublet.run`: a container on somebody's GPU, under a hard price and budget."""

from collections.abc import Mapping, Sequence

from sublet.client import Client, Job
from sublet.spec import Amount


def run(
    image: str,
    command: Sequence[str] = (),
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
    broker: str | None = None,
    profile: str | None = None,
    client: Client | None = None,
) -> Job:
    """Submit a job and return its handle at once; the budget is held from your account.

    Durations are '90s', '2m', '1.5h' (a number is seconds); sizes '24GB', '512MiB' (a number is
    bytes); money is in credits, to the sixth decimal.

    image             by digest where the broker or the provider wants it
    command           what runs in it; () leaves it to the image
    max_price         the most that one device may cost, in credits per hour
    budget            the most that the job may cost in all: then it's checkpointed and paused
    gpus              '1', '2x24GB' (memory of each), '1xA100' (part of the name), or 'cpu'
    checkpoint_every  how often the agent asks for a checkpoint: the most work a loss can cost
    patience          how long a silent machine is waited for before the job goes on elsewhere
    stop_grace        what the job gets to save itself when it's asked to stop
    inputs            local file or folder -> path in the container, read-only there
    outputs           folder in the container that is brought back (`job.download`)
    env               environment variables; don't put secrets here: the provider can read them
    name              to find it by; default: from the image
    memory, disk, cpus  in all; default: 8GB beside a GPU and 1GB on a CPU, 10GB, 1 core
    region, hardware_class  exactly these; default: any
    egress            whether it needs the network (default: it has none)
    accept_receipts   receipts up to this stand without your signature; default: the budget
    start_within      how long it may wait for a start
    wait_for_offer    queue it even where no machine could take it now
    broker, profile   default: SUBLET_BROKER (else this machine's), SUBLET_PROFILE (else `default`)
    client            one that you have already, instead of these two

    Raises UnitError and InputError, which name the option; ConfigError and KeyRefused about your
    key and broker; SubletError with what the broker refused (`error.problem.code`: no_match,
    over_balance ...) and what to do; BrokerAway if it doesn't answer for a minute.
    """
    return (client or Client(broker=broker, profile=profile)).run(
        wait_for_offer=wait_for_offer,
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
    )
