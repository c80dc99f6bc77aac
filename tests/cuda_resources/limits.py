"""What each kernel may use. A change that needs more has to be looked at, and the table changed with it."""

from __future__ import annotations

import pytest

ARCHITECTURES = (80, 90, 100)
# As parameters of tests: what takes the most registers in every run, the others where there is time.
PARAMETERS = [
    pytest.param(architecture, marks=() if architecture == 100 else pytest.mark.thorough, id=f"sm_{architecture}")
    for architecture in ARCHITECTURES
]

# Registers a thread, on whichever architecture takes most: sm_100 takes up to 32 more than the others.
REGISTERS = {
    ("feature_variance_kernel", "float"): 40,
    ("feature_variance_kernel", "half"): 40,
    ("feature_variance_kernel", "bfloat16"): 40,
    ("feature_variance_kernel", "double"): 56,
    ("bias_loss_forward_kernel, one position", "float"): 72,
    ("bias_loss_forward_kernel, one position", "half"): 96,
    ("bias_loss_forward_kernel, one position", "bfloat16"): 96,
    ("bias_loss_forward_kernel, one position", "double"): 128,
    ("bias_loss_forward_kernel, many positions", "float"): 104,
    ("bias_loss_forward_kernel, many positions", "half"): 128,
    ("bias_loss_forward_kernel, many positions", "bfloat16"): 120,
    ("bias_loss_forward_kernel, many positions", "double"): 152,
    ("bias_loss_backward_kernel", "float"): 80,
    ("bias_loss_backward_kernel", "half"): 80,
    ("bias_loss_backward_kernel", "bfloat16"): 80,
    ("bias_loss_backward_kernel", "double"): 96,
    ("weigh_positions_kernel", "float"): 32,
    ("weigh_positions_kernel", "double"): 32,
}

# 16-byte loads that the innermost loop over the features or the scores has in flight before the first one is used.
VECTOR_LOADS_IN_FLIGHT = {
    "feature_variance_kernel": 4,
    "bias_loss_forward_kernel, one position": 4,
    "bias_loss_forward_kernel, many positions": 4,
    "bias_loss_backward_kernel": 4,
}
