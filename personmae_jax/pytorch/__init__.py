"""The bridge to PyTorch: import of foreign ViTs, export of ours, checks of both.

Import is below the trainings, which start from it; export restores their runs.
"""
