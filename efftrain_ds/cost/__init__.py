"""What a run costs before it runs: analytic MACs, memory, measured throughput and the priced plan."""
