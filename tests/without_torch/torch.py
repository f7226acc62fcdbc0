"""On PYTHONPATH, makes a machine on which torch is installed one on which it is not.

That is what runs are trained on; and tensorboardX imports torch where it finds it, two
seconds a start.
"""

raise ImportError("hidden by the tests")
