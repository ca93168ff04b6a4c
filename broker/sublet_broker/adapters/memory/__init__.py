"""Store, blobs, matcher and verifier in this process: for tests, the simulator and a first look."""
