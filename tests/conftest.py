"""Settings of every test process."""

import torch

#: pytest-xdist runs a process a core; more threads than cores spin at each other's barriers (a float64 depthwise
#: convolution takes seconds then).
torch.set_num_threads(1)
