"""Method folders: one a method; none imports another."""
