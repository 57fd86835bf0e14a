"""A saved folder must open where the package is missing, so these tests load it in fresh processes without it."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_sane import SaneConfig, SaneForPreTraining, SaneModel

SCRIPT = """
import sys

sys.modules["modeling_sane"] = None  # even if it is installed, importing it fails
try:
    import modeling_sane
except ImportError:
    pass
else:
    raise SystemExit("the package is importable, so this process shows nothing")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForPreTraining

torch.set_num_threads(1)
bare, whole, inputs, outputs, again = sys.argv[1:]
batch = load_file(inputs)
found = {}
with torch.no_grad():
    for name, folder in (("bare", bare), ("whole", whole)):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert type(model).__name__ == "SaneModel", type(model)
        found[name] = model(**batch).last_hidden_state
        found[name + "_sequence"] = model.encode_sequence(**batch, window_size=3, halo=1)
    model.save_pretrained(again)  # the code must travel on
    found["again"] = AutoModel.from_pretrained(again, trust_remote_code=True)(**batch).last_hidden_state
    model = AutoModelForPreTraining.from_pretrained(whole, trust_remote_code=True)
    output = model(**batch, second_token_values=batch["token_values"] + 1)
    found["reconstruction"], found["loss"] = output.reconstruction, output.loss
save_file({name: tensor.contiguous() for name, tensor in found.items()}, outputs)
"""


@pytest.fixture
def batch():
    torch.manual_seed(0)
    positions = torch.stack([torch.arange(11), torch.arange(11) // 4, torch.arange(11) % 4], dim=-1)
    return {
        "token_values": torch.randn(2, 11, 7),
        "position_ids": positions.repeat(2, 1, 1),
        "layer_kind_ids": torch.zeros(2, 11, dtype=torch.long),
    }


def test_saved_folders_open_bit_equal_without_the_package(tmp_path, batch):
    config = {"token_size": 7, "latent_size": 5, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    bare = SaneModel(SaneConfig(**config, window_size=13)).eval()
    whole = SaneForPreTraining(SaneConfig(**config, window_size=13)).eval()
    files = {"config.json", "model.safetensors", "configuration_sane.py", "modeling_sane.py"}
    for name, model in (("bare", bare), ("whole", whole)):
        model.save_pretrained(tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == files

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    save_file(batch, tmp_path / "inputs.safetensors")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hfm")}
    paths = [str(tmp_path / name) for name in ("bare", "whole", "inputs.safetensors", "outputs.safetensors", "again")]
    # -I: neither the working folder, nor PYTHONPATH, nor user packages
    result = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "script.py"), *paths],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "outputs.safetensors")
    assert {path.name for path in (tmp_path / "again").iterdir()} == files

    # read from the file here too: on some processors the last bits of a product depend on where in memory its factors stand
    bare, whole = SaneModel.from_pretrained(tmp_path / "bare"), SaneForPreTraining.from_pretrained(tmp_path / "whole")
    batch = load_file(tmp_path / "inputs.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the other process: sums in another order give other bits
    with torch.no_grad():
        output = whole(**batch, second_token_values=batch["token_values"] + 1)
        expected = {"reconstruction": output.reconstruction, "loss": output.loss}
        for name, model in (("bare", bare), ("whole", whole.sane)):
            expected[name] = model(**batch).last_hidden_state
            expected[name + "_sequence"] = model.encode_sequence(**batch, window_size=3, halo=1)
        expected["again"] = expected["whole"]
    torch.set_num_threads(threads)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
