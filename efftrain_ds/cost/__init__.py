"""Analytic MACs, throughput and the priced plan."""
