"""bsrgen in PyTorch: prune a model, convert it in place, run, compile, export or fine-tune it at its fixed pattern.

import bsrgen.integrations.torch as bt
bt.convert_(model, bt.BsrConfig(blocksize=(32, 1)))
"""

from bsrgen.integrations.torch.config import BsrConfig
from bsrgen.integrations.torch.convert import Conversion, convert_, load_
from bsrgen.integrations.torch.fuse import Fusion, fuse_
from bsrgen.integrations.torch.layer import BsrLinear
from bsrgen.integrations.torch.pruning import Pruner, group_lasso, prune_, search

__all__ = [
    "BsrConfig", "BsrLinear", "Conversion", "Fusion", "Pruner", "convert_", "fuse_", "group_lasso", "load_", "prune_",
    "search",
]  # fmt: skip
