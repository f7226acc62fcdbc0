"""Training on pseudo labels (USL, UDA): a program in rounds on the one engine."""
