"""Models of both papers, registered with timm: `timm.create_model("sw_tiny")` after `import swconv.models`."""

from swconv.models.network import LargeKernelNet
from swconv.models.sw import shiftwise_net

__all__ = ["LargeKernelNet", "shiftwise_net"]
