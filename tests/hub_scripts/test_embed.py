"""Embedding many checkpoints: the same file whatever interrupts, shares or orders the work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_scripts import embed as module
from hub_scripts.embed import EmbedArguments, embed
from hub_scripts.zoos.zoo import Zoo

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 4)
    monkeypatch.setattr(module, "PART_FILES", 2)


@pytest.fixture(scope="module")
def files(tiny_zoo, tmp_path_factory) -> list[str]:
    """Five networks of the zoo as files."""
    folder, zoo = tmp_path_factory.mktemp("files"), Zoo(tiny_zoo)
    for number in range(5):
        save_file(zoo.state_dict("train", number), folder / f"{number}.safetensors")
    return [str(folder / f"{number}.safetensors") for number in range(5)]


def run(model, output_dir, *sources, **settings):
    args = EmbedArguments(model=str(model), output_dir=str(output_dir), **settings)
    args.sources = list(map(str, sources))
    return embed(args)


def table(folder: Path):
    return pq.read_table(folder / "embeddings.parquet")


def stop_at(monkeypatch, number: int) -> list[int]:
    """Raises when that many parts were embedded; the list says how many were, also after that."""
    done, real = [0], module._embed_part

    def counted(*args):
        if done[0] == number:
            raise KeyboardInterrupt
        done[0] += 1
        return real(*args)

    monkeypatch.setattr(module, "_embed_part", counted)
    return done


def test_rows_stand_in_the_order_of_the_sources_with_the_properties_of_zoos(tiny_zoo, tiny_model, files, tmp_path):
    (tmp_path / "list.txt").write_text(f"# more\n{files[2]}\n\n{files[1]}\n")
    found = run(tiny_model, tmp_path / "e", files[0], tiny_zoo, f"@{tmp_path / 'list.txt'}")
    rows, zoo = table(tmp_path / "e"), Zoo(tiny_zoo)
    assert (found["checkpoints"], found["skipped"]) == (len(zoo) + 3, 0)
    assert rows["source"].to_pylist() == [files[0], *[str(tiny_zoo)] * len(zoo), files[2], files[1]]
    assert rows.column_names[:5] == ["source", "split", "model_id", "epoch", "layout_id"]
    assert {"test_accuracy", "embedding"} <= set(rows.column_names)
    train = rows.slice(1, len(zoo.rows("train")))
    assert train["model_id"].to_pylist() == zoo.rows("train")["model_id"][:]
    assert train["test_accuracy"].to_pylist() == zoo.rows("train")["test_accuracy"][:]
    assert str(rows.schema.field("embedding").type) == "list<element: float>"
    embeddings = np.asarray(rows["embedding"].to_pylist())
    np.testing.assert_allclose(embeddings[0], embeddings[1], rtol=1e-4, atol=1e-4)  # the zoo's first row as a file
    assert {path.name for path in (tmp_path / "e").iterdir()} == {".sane", "embeddings.parquet", "results.json"}


def test_an_interrupted_run_goes_on_to_the_same_file(tiny_zoo, tiny_model, files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        whole = stop_at(patch, -1)
        run(tiny_model, tmp_path / "whole", tiny_zoo, *files)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, tmp_path / "resumed", tiny_zoo, *files)
    assert not (tmp_path / "resumed" / "embeddings.parquet").exists()
    with monkeypatch.context() as patch:
        done = stop_at(patch, -1)
        run(tiny_model, tmp_path / "resumed", tiny_zoo, *files)
        assert done[0] == whole[0] - 3
        run(tiny_model, tmp_path / "resumed", tiny_zoo, *files)  # all is there
        assert done[0] == whole[0] - 3
    whole, resumed = (tmp_path / name / "embeddings.parquet" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_two_processes_write_what_one_does(tiny_zoo, tiny_model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 64)  # as the processes have it
    monkeypatch.setattr(module, "PART_FILES", 16)
    run(tiny_model, tmp_path / "one", tiny_zoo, *files)
    words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    arguments = ["--model", tiny_model, "--output-dir", tmp_path / "two", tiny_zoo, *files]
    process = subprocess.run(
        [sys.executable, *words, "hub_scripts/embed.py", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("embeddings in") == 1
    one, two = table(tmp_path / "one"), table(tmp_path / "two")
    assert one.equals(two)
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == json.loads(
        (tmp_path / "two" / "results.json").read_text()
    )


def test_a_permuted_twin_has_the_same_embedding(tiny_zoo, tiny_model, files, tmp_path):
    spec = Zoo(tiny_zoo).symmetries.of_kind("permutation", "sign")
    network = load_file(files[0])
    twin = spec.apply(network, spec.draw(torch.Generator().manual_seed(1)))
    assert not torch.equal(twin["fc1.weight"], network["fc1.weight"])
    save_file({name: tensor.contiguous() for name, tensor in twin.items()}, tmp_path / "twin.safetensors")
    run(tiny_model, tmp_path / "e", files[0], tmp_path / "twin.safetensors")
    first, second = table(tmp_path / "e")["embedding"].to_pylist()
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_embedded_is_named_or_counted(tiny_model, files, tmp_path):
    broken = load_file(files[0])
    broken["fc1.weight"][0, 0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    save_file({"other.weight": torch.ones(3, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(Path(files[0]).read_bytes()[:-9])
    bad = [tmp_path / f"{name}.safetensors" for name in ("nan", "other", "cut")]
    sources = [files[0], bad[0], files[1], *bad[1:]]

    with pytest.raises(ValueError, match=r"nan\.safetensors: fc1\.weight holds 1 NaN"):
        run(tiny_model, tmp_path / "e", *sources)
    assert not (tmp_path / "e").exists()  # nothing was done that would be lost
    found = run(tiny_model, tmp_path / "e", *sources, on_error="skip")
    assert (found["checkpoints"], found["skipped"]) == (2, 3)
    assert all(str(path) in text for path, text in zip(bad, found["skipped_checkpoints"], strict=True))
    assert table(tmp_path / "e")["source"].to_pylist() == files[:2]
    with pytest.raises(ValueError, match=r"nan\.safetensors"):  # what was skipped before is not passed over in silence
        run(tiny_model, tmp_path / "e", *sources)
    with pytest.raises(ValueError, match="none of the 1 checkpoints could be embedded"):
        run(tiny_model, tmp_path / "none", bad[0], on_error="skip")


def test_a_damaged_row_of_a_zoo_is_skipped_alone(tiny_zoo, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_zoo, tmp_path / "zoo")
    (file,) = (folder / "data").glob("train-*.parquet")
    rows = pq.read_table(file)
    weights = rows["weights"].to_pylist()
    weights[2] = weights[2][:-1] + bytes([weights[2][-1] ^ 1])
    place = rows.schema.get_field_index("weights")
    pq.write_table(
        rows.set_column(place, rows.schema.field("weights"), pa.array(weights, rows.schema.field("weights").type)),
        file,
    )
    found = run(tiny_model, tmp_path / "e", folder, on_error="skip")
    assert (found["checkpoints"], found["skipped"]) == (len(Zoo(tiny_zoo)) - 1, 1)
    assert "train row" in found["skipped_checkpoints"][0]
    whole = [name for index, name in enumerate(rows["model_id"].to_pylist()) if index != 2]
    assert table(tmp_path / "e")["model_id"].to_pylist()[: len(whole)] == whole


def test_a_file_that_was_replaced_is_embedded_again(tiny_model, files, tmp_path):
    network = tmp_path / "network.safetensors"
    network.write_bytes(Path(files[0]).read_bytes())
    run(tiny_model, tmp_path / "e", network)
    before = table(tmp_path / "e")["embedding"].to_pylist()
    network.write_bytes(Path(files[3]).read_bytes())
    os.utime(network, (1, 1))
    run(tiny_model, tmp_path / "e", network)
    assert table(tmp_path / "e")["embedding"].to_pylist() != before


def test_other_settings_do_not_go_on(tiny_zoo, tiny_model, files, tmp_path):
    run(tiny_model, tmp_path / "e", files[0])
    with pytest.raises(ValueError, match="was begun with --feature latents_and_moments, now it is token_mean"):
        run(tiny_model, tmp_path / "e", files[0], feature="token_mean")
    with pytest.raises(ValueError, match="was begun with --sources"):
        run(tiny_model, tmp_path / "e", files[1])
    with pytest.raises(ValueError, match=r"the list .*none\.txt does not exist"):
        run(tiny_model, tmp_path / "f", f"@{tmp_path}/none.txt")
    with pytest.raises(ValueError, match="--on-error is 'ignore'"):
        EmbedArguments(model="m", output_dir="e", on_error="ignore")
