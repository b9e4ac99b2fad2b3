"""Guards of a run: non-finite steps, ranks that disagree, ranks that stall, the request to stop."""
