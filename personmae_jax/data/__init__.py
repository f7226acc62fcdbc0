"""From encoded images to batches of two regions and one mask, on the host."""
