"""`python -m biasloss_ext.models` prints the table of the published sizes."""

from biasloss_ext.models.summary import variants_table

print(variants_table())
