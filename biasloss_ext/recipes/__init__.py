"""Training and comparing classifiers: what the commands ``biasloss train`` and ``biasloss compare`` run."""
