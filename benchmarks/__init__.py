"""Speed and memory, ours beside a peer, in one process: ``python -m benchmarks NAME``; results in ``results/``."""
