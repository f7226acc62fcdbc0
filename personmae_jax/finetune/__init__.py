"""Fine-tuning on identities: a program and a run on the one engine."""
