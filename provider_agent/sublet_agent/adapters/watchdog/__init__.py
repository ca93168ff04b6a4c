"""No run outlives its lease or its budget: deadlines on disk, and a process of its own that ends
what outlives them, whatever becomes of the agent."""
