"""From a zoo on the Hub to a model on the Hub to generated networks on the Hub."""

import csv
import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, save_file

from hub_scripts.import_zoo import ImportZooArguments, import_zoo
from hub_scripts.zoos.architectures import SmallCNN

KWARGS = {"channels": [2, 2], "hidden_size": 4}


def digits_zoo(folder: Path) -> dict[str, bytes]:
    """Files of a zoo of untrained networks that could be trained on digits."""
    (folder / "checkpoints").mkdir()
    with (folder / "properties.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "model_id", "epoch", "validation_accuracy"])
        for number in range(12):
            torch.manual_seed(number)
            save_file(SmallCNN(**KWARGS).state_dict(), folder / "checkpoints" / f"{number}.safetensors")
            table.writerow([f"{number}.safetensors", f"m{number}", 0, 0.1])
    args = ImportZooArguments(
        properties=str(folder / "properties.csv"),
        architecture="hub_scripts.zoos.architectures:SmallCNN",
        architecture_kwargs=json.dumps(KWARGS),
        input_shape="1,8,8",
        task="digits",
        license="mit",
    )
    args.source, args.output_dir = str(folder / "checkpoints"), str(folder / "zoo")
    import_zoo(args)
    zoo = folder / "zoo"
    return {path.relative_to(zoo).as_posix(): path.read_bytes() for path in zoo.rglob("*") if path.is_file()}


def test_model_and_generated_networks_are_published_with_what_was_measured(hub, run, tmp_path):
    hub.put("me/digits", digits_zoo(tmp_path), "dataset")
    sizes = ["--token-size", "16", "--latent-size", "8", "--hidden-size", "16", "--num-hidden-layers", "1"]
    settings = ["--max-steps", "2", "--eval-steps", "2", "--save-steps", "1", "--batch-size", "4"]
    train = ["sane", "train", "--zoo", "me/digits", "--output-dir", tmp_path / "model", *sizes, *settings]
    run([*train, "--push-to-hub", "--hub-model-id", "me/sane", "--hub-private"])
    assert hub.repos()["models/me/sane"]
    # the first checkpoint was published while training went on
    titles = [commit.title for commit in hub.commits("me/sane")]
    assert titles[:2] == ["Upload SANE", "SANE, training at step 1"]
    files = hub.files("me/sane")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_sane.py"} <= files.keys()
    assert not [name for name in files if name.startswith(("step_", "trackers", ".sane"))]
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["me/digits"]
    measured = json.loads((tmp_path / "model" / "results.json").read_text())["validation"]
    assert card.data.eval_results[0].metric_value == round(measured["r2"], 4)
    assert str(tmp_path) not in files["README.md"].decode()

    sample = ["sane", "sample", "--model", "me/sane", "--zoo", "me/digits", "--output-dir", tmp_path / "sample"]
    # these networks were never trained, so the exit code may say that they are at chance
    run([*sample, "--anchors", "top:2", "--count", "3", "--keep", "2", "--push-to-hub", "me/generated"], expect=None)
    files = hub.files("me/generated")
    assert load(files["joint/001.safetensors"]).keys() == SmallCNN(**KWARGS).state_dict().keys()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.datasets) == ("me/sane", ["me/digits"])
    figures = json.loads((tmp_path / "sample" / "results.json").read_text())["sample"]
    assert card.data.eval_results[0].metric_value == round(figures["laplace"]["accuracy_mean"], 4)
    networks = json.loads(files["networks.json"])
    for anchor in networks["anchors"]:
        assert f"`{anchor}`" in card.text
    assert str(tmp_path) not in "".join(files[name].decode() for name in ("README.md", "networks.json"))
    assert not hub.leaks


def test_revisions_on_the_hub_become_the_epochs_of_a_zoo(hub, run, tmp_path):
    def content(value: float) -> bytes:
        save_file({"fc.weight": torch.full((3, 4), value)}, tmp_path / "w.safetensors")
        return (tmp_path / "w.safetensors").read_bytes()

    names = [f"me/net{number}" for number in range(3)]
    for number, name in enumerate(names):
        for step in (1, 2):
            hub.put(name, {"model.safetensors": content(10.0 * number + step)}, branch=f"step{step}")
    (tmp_path / "repos.txt").write_text("\n".join(names))
    command = ["sane", "import-zoo", "--format", "hub", tmp_path / "repos.txt", tmp_path / "zoo"]
    run([*command, "--revisions", "step1", "step2"])

    def read(folder):
        from hub_scripts.zoos.zoo import Zoo

        zoo = Zoo(folder)
        rows = {split: zoo.rows(split) for split in zoo.splits}
        return [
            [row["model_id"], row["epoch"], zoo.state_dict(split, index)["fc.weight"][0, 0].item(), row["source"]]
            for split in rows
            for index, row in enumerate(rows[split])
        ]

    found = sorted(run(read, tmp_path / "zoo").value)
    assert [row[:3] for row in found] == [[name, s, 10.0 * n + s] for n, name in enumerate(names) for s in (1, 2)]
    assert all(row[3].startswith(f"{row[0]}@") for row in found)
