"""Networks: SkipblockNet XS to L, by builder or by name.

If timm is installed, `timm.create_model("skipblocknet_m")` builds them too after this package has been imported, whether
before or after timm.
"""

from biasloss_ext.models import timm_hook
from biasloss_ext.models.multiply_adds import count_multiply_adds
from biasloss_ext.models.registry import create_model, list_models
from biasloss_ext.models.skipblocknet import SkipblockNet
from biasloss_ext.models.summary import variants_table
from biasloss_ext.models.variants import skipblocknet_l, skipblocknet_m, skipblocknet_s, skipblocknet_xs

__all__ = [
    "SkipblockNet",
    "count_multiply_adds",
    "create_model",
    "list_models",
    "skipblocknet_l",
    "skipblocknet_m",
    "skipblocknet_s",
    "skipblocknet_xs",
    "variants_table",
]

timm_hook.register()
