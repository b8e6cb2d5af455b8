"""Official weights in our layout."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

# Official key -> ours, applied in order. The official names are those of the released SW and SLaK code.
_KEYS = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.large_kernel\.", ".mixer."),
    (r"(^|\.)LoRAs\.(\d+)\.weight$", r"\1filters.\2"),
    (r"(^|\.)bn_lora1\.", r"\1norms.0."),
    (r"(^|\.)bn_lora2\.", r"\1norms.1."),
    (r"(^|\.)bn_small\.", r"\1norms.2."),
    (r"\.se\.down\.", ".se.fc1."),
    (r"\.se\.up\.", ".se.fc2."),
    (r"\.pwconv1\.1\.", ".pwconv1."),
    (r"\.act\.1\.gamma$", ".grn.weight"),
    (r"\.act\.1\.beta$", ".grn.bias"),
    (r"\.pwconv2\.0\.", ".pwconv2."),
    (r"\.pwconv2\.2\.", ".norm_out."),
]


def convert_official(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the entries of an official SW state dict so that `model.load_state_dict` takes them strictly.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Official state dict of a network or of one SW module.
    model : nn.Module
        Our model of the same configuration.

    Raises
    ------
    ValueError
        When entries are missing, left over, or of another shape.
    """
    target = model.state_dict()
    converted = {}
    for key, tensor in state_dict.items():
        ours = key
        for pattern, name in _KEYS:
            ours = re.sub(pattern, name, ours)
        flat = ours in target and tensor.dim() == 4 and target[ours].dim() == 1       # GRN: (1, 1, 1, C) -> (C,)
        converted[ours] = tensor.flatten() if flat else tensor
    wrong = [f"{key} {tuple(value.shape)} for {tuple(target[key].shape)}" for key, value in converted.items()
             if key in target and value.shape != target[key].shape]
    missing, extra = sorted(target.keys() - converted.keys()), sorted(converted.keys() - target.keys())
    if wrong or missing or extra:
        raise ValueError(
            f"the weights do not fit the model: {len(missing)} missing {missing[:3]}, {len(extra)} unexpected {extra[:3]}, "
            f"{len(wrong)} of another shape {wrong[:3]}. Is the model of the same configuration?"
        )
    return converted
