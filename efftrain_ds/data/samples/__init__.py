"""Data that comes with the package; see the README beside each data set."""
