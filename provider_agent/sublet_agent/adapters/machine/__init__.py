"""What this machine has: GPUs, memory, cores, and the terms it is offered on."""
