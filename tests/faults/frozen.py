"""Last of what the fork server imports: collections of garbage in its children need not look through all of it."""

import gc

gc.freeze()
