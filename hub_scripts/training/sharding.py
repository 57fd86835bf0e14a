"""Models whose parameters FSDP2 divides among the processes: whole again for what is not their own forward."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from modeling_sane import SaneForPreTraining


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it, parts of the model can be called; the blocks gather their own parameters, one after the other."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole_model(model: nn.Module, accelerator: Accelerator) -> SaneForPreTraining | None:
    """The model with all of its parameters on the CPU, to be saved; every process must ask, the main one gets it.

    A sharded model cannot save itself: its class is one that FSDP2 made, in a module that is not ours.
    """
    if not isinstance(model, FSDPModule):
        return accelerator.unwrap_model(model)
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not accelerator.is_main_process:
        return None
    whole = SaneForPreTraining(model.config)
    whole.load_state_dict(state_dict)
    return whole
