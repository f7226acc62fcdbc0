"""PersonMAE pretraining: losses, step, a program and a run on the one engine."""
