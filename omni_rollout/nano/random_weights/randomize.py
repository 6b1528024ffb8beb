"""Every parameter of a module drawn anew."""

import torch
from torch import nn


@torch.no_grad()
def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew so that none is degenerate and the output depends on all of them.

    Default initialisation leaves biases and norms at 0 and 1, which hides bugs that swap, drop or mix them up. Here norm
    weights become 1 +- 0.2, biases N(0, 0.1), matrices and kernels N(0, 1 / fan_in), embeddings N(0, 1).
    """
    for parent in module.modules():
        for name, parameter in parent.named_parameters(recurse=False):
            if name == "bias":
                parameter.normal_(0.0, 0.1, generator=generator)
            elif isinstance(parent, nn.Embedding):
                parameter.normal_(generator=generator)
            elif parameter.dim() == 1 or name == "gamma":
                parameter.uniform_(0.8, 1.2, generator=generator)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
