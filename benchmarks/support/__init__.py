"""What several benchmarks share: peers, workloads, data and measurements."""
