"""The train step compiled for chips that are not here: time, memory, FLOPs."""
