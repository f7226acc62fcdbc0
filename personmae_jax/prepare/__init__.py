"""From archives, LMDB and folders to one tfds data set, killed and resumed at will.

Of `engine/` it takes lock, storage, signals and progress.
"""
