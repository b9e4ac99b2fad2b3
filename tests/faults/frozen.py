"""Last of what the fork server imports: collections of garbage in its children need not look through all of it."""

import atexit
import gc

gc.freeze()
atexit.register(gc.unfreeze)  # some libraries report what is still there at the end of Python as leaked
