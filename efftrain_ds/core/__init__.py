"""Protocol, events, timeline, composition, registry, randomness and errors; imports nothing of the package above it."""
