"""Benchmarks of the ops and networks against what one would use instead: ``biasloss bench``.

The shapes are in `shapes`, our side and its peers in one module an op, how time is taken in `timing`, and the order of
events (check against float64, warm up, take turns) in `engine`.
"""
