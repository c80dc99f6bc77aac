"""Many layers as one op: constants, and a list of instructions that are run without Python between them."""
