"""The training command sharded on CPUs, which accelerate does for accelerators alone unless it takes them for such."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from helpers import train_eccl

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
train_eccl.main([*sys.argv[1:], "--accelerator_config", '{"use_configured_state": true}'])
