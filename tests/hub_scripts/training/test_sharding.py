import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

from modeling_sane import SaneConfig, SaneForPreTraining

SIZES = {"token_size": 8, "latent_size": 6, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hub_scripts.training.sharding import gathered, whole_model
from modeling_sane import SaneForPreTraining

accelerator = Accelerator(cpu=True)
mesh = init_device_mesh("cpu", (2,))
model = SaneForPreTraining.from_pretrained(sys.argv[1])
for block in [*model.sane.encoder.blocks, *model.sane.decoder.blocks]:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
tokens, positions = torch.load(sys.argv[2])
with gathered(model), torch.no_grad():
    latents = model.sane.encode_sequence(tokens, positions)
whole = whole_model(model, accelerator)
assert (whole is not None) == accelerator.is_main_process
if whole is not None:
    whole.save_pretrained(sys.argv[3])
    torch.save(latents, sys.argv[3] + "/latents.pt")
accelerator.wait_for_everyone()  # a process that leaves early takes the other's connections down
accelerator.end_training()
"""


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_two_processes_share_is_validated_and_saved_whole(tmp_path):
    torch.manual_seed(0)
    model = SaneForPreTraining(SaneConfig(**SIZES, window_size=10)).eval()
    model.save_pretrained(tmp_path / "before")
    tokens, positions = torch.randn(3, 10, 8), torch.arange(10)[:, None].repeat(1, 3)
    torch.save((tokens, positions), tmp_path / "window.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += [
        "--standalone",
        tmp_path / "script.py",
        tmp_path / "before",
        tmp_path / "window.pt",
        tmp_path / "after",
    ]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = model.sane.encode_sequence(tokens, positions)
    assert torch.equal(torch.load(tmp_path / "after" / "latents.pt"), expected)
    saved = AutoModel.from_pretrained(tmp_path / "after")
    for name, tensor in model.sane.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
