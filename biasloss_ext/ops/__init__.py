"""The ops: schemas, reference implementations, kernels and the choice between them."""
