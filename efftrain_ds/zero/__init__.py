"""Everything that knows how ZeRO stores parameters."""
