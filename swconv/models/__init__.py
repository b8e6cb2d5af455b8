"""Models of both papers, registered with timm: `timm.create_model("sw_tiny")` after `import swconv.models`."""

from swconv.models.network import LargeKernelNet
from swconv.models.slak import lk_convnext_net, slak_net
from swconv.models.sw import shiftwise_net
from swconv.models.unireplknet import unireplknet_net

__all__ = ["LargeKernelNet", "lk_convnext_net", "shiftwise_net", "slak_net", "unireplknet_net"]
