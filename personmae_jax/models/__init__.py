"""The network: ViT encoder and predictors, in Flax; `personmae.py` is its door."""
