"""LeNet-300-100, ResNet-20 and -32 for CIFAR, and VGG-19: the same in Flax and in PyTorch.

An `Architecture` lists the layers. `initial_variables` draws their weights in NumPy, in Flax's
layout. `safe_core.study.models.flax.Network` applies them, and
`safe_core.study.models.torch.build` makes the equivalent PyTorch model.

>>> network = architecture("vgg-19", classes=100)
>>> network.parameters
20081188
>>> sorted(initial_variables(ResNet(20), seed=0))
['batch_stats', 'params']
"""

from .architectures import VGG19, Architecture, LeNet, ResNet, architecture
from .weights import Variables, from_state_dict, initial_variables, to_state_dict

__all__ = [
    "VGG19",
    "Architecture",
    "LeNet",
    "ResNet",
    "Variables",
    "architecture",
    "from_state_dict",
    "initial_variables",
    "to_state_dict",
]
