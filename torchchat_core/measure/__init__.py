"""What a model is worth on this machine: how well it predicts a text, how far it is from another one, how fast it is.

What is measured of a model stands on `specs.LoadedModel` and `specs.Session`, and so holds for every runtime.
"""
