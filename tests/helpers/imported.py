"""What a process has imported that `helpers.forks` forks: what takes seconds, and all that runs of the tests need."""

import accelerate
import onnxscript
import timm.data
import timm.optim
import timm.scheduler
import torch._dynamo
import torchvision
from torch import nn

import cpd
import cpd.cli
import cpd.jobs.compress
import cpd.jobs.family
import cpd.jobs.sensitivity
import cpd.jobs.sweep
from helpers import runs, tiny
from helpers.hasty import hasten

__all__ = ["accelerate", "cpd", "onnxscript", "runs", "timm", "tiny", "torchvision"]

torch.set_num_threads(1)
hasten()
cpd.export_onnx(nn.Linear(1, 1), torch.ones(1, 1), check=False)  # the first takes seconds, as much is imported for it
