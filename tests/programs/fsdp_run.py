"""Runs the training command with a sharded model on CPUs, by making accelerate take the CPUs for accelerators."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from eccl.utils.command_line import end_launched_process
from helpers import train_eccl

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
train_eccl.main([*sys.argv[1:], "--accelerator_config", '{"use_configured_state": true}'])
end_launched_process()
