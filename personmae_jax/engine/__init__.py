"""Running a training: loop, programs, rows, checkpoints, workdirs, processes.

It knows batches (`data/`), and neither the method nor people.
"""
