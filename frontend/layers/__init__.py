"""The arithmetic of layers, as functions of arrays: what Linen's and NNX's layers compute, written once."""
