"""The Small CNN Zoo: one matrix, its metrics and its layout."""

import gzip

import numpy as np
import pytest
import torch
from torch import nn

from hub_scripts.zoos.importers import ImportOptions, importer
from hub_scripts.zoos.importers.unterthiner import list_checkpoints

# height 3, width 2, in 1, out 5; then dense 5 to 4: biases stand before kernels, as in the published files
LAYOUT = """varname,start_idx,end_idx,size,shape,weight_type
sequential/conv2d/bias:0,0,5,5,"(5,)",bias
sequential/conv2d/kernel:0,5,35,30,"(3, 2, 1, 5)",kernel
sequential/dense/bias:0,35,39,4,"(4,)",bias
sequential/dense/kernel:0,39,59,20,"(5, 4)",kernel
"""
METRICS = """,config.activation,config.l2reg,modeldir,step,test_accuracy,test_loss,train_accuracy,train_loss
0,relu,1e-3,/runs/a,0,0.125,2.5,0.25,2
1,relu,1e-3,/runs/a,86,0.5,1,0.75,nan
2,tanh,,/runs/b,0,0.1,2,,2
"""


def make_zoo(folder, layout=LAYOUT, metrics=METRICS, weights=None):
    folder.mkdir(exist_ok=True)
    weights = np.random.default_rng(0).normal(size=(3, 59)).astype(np.float32) if weights is None else weights
    np.save(folder / "weights.npy", weights)
    (folder / "layout.csv").write_text(layout)
    (folder / "metrics.csv.gz").write_bytes(gzip.compress(metrics.encode()))
    return weights


def test_rows_become_checkpoints(tmp_path):
    make_zoo(tmp_path)
    first, second, third = importer("unterthiner")(str(tmp_path), ImportOptions())
    found = [(checkpoint.model_id, checkpoint.epoch) for checkpoint in (first, second, third)]
    assert found == [("/runs/a", 0), ("/runs/a", 86), ("/runs/b", 0)]
    assert first.where == f"{tmp_path}/weights.npy[0]"
    assert second.columns == {
        "hparams_activation": "relu",
        "hparams_l2reg": 0.001,
        "test_accuracy": 0.5,
        "test_loss": 1,
        "train_accuracy": 0.75,
        "train_loss": None,
        "generalization_gap": 0.25,
    }
    assert third.columns["hparams_l2reg"] is None
    assert "generalization_gap" not in third.columns


def test_weights_are_bit_for_bit_in_the_order_of_pytorch(tmp_path):
    weights = make_zoo(tmp_path)
    for row, checkpoint in zip(weights, list_checkpoints(str(tmp_path), ImportOptions()), strict=True):
        found = checkpoint.read()
        kernel, dense = row[5:35].reshape(3, 2, 1, 5), row[39:59].reshape(5, 4)
        assert [*found] == [
            "sequential.conv2d.bias",
            "sequential.conv2d.weight",
            "sequential.dense.bias",
            "sequential.dense.weight",
        ]
        assert np.array_equal(found["sequential.conv2d.bias"], row[:5])
        assert np.array_equal(found["sequential.dense.bias"], row[35:39])
        assert found["sequential.conv2d.weight"].shape == (5, 1, 3, 2)
        assert all(
            found["sequential.conv2d.weight"][o, 0, y, x] == kernel[y, x, 0, o]
            for o in range(5)
            for y in range(3)
            for x in range(2)
        )
        assert torch.equal(found["sequential.dense.weight"], torch.from_numpy(dense).T)
        assert all(tensor.is_contiguous() for tensor in found.values())


def test_the_network_computes_in_pytorch_what_it_did_in_keras(tmp_path):
    weights = make_zoo(tmp_path)
    network = nn.Module()
    network.sequential = nn.Sequential()
    network.sequential.conv2d, network.sequential.dense = nn.Conv2d(1, 5, (3, 2)), nn.Linear(5, 4)
    network.load_state_dict(list_checkpoints(str(tmp_path), ImportOptions())[1].read())
    image = np.random.default_rng(1).normal(size=(3, 2, 1)).astype(np.float32)  # (height, width, channels)
    row = weights[1]
    hidden = np.einsum("yxc,yxco->o", image, row[5:35].reshape(3, 2, 1, 5)) + row[:5]
    expected = hidden @ row[39:59].reshape(5, 4) + row[35:39]
    found = network.sequential.dense(network.sequential.conv2d(torch.from_numpy(image).permute(2, 0, 1)).flatten())
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-5)


def test_the_short_columns_of_a_layout_will_do(tmp_path):
    layout = 'name,offset,shape\ndense/kernel,3,"(2, 3)"\ndense/bias,0,3\n'
    weights = make_zoo(tmp_path, layout=layout, weights=np.arange(27, dtype=">f4").reshape(3, 9))
    found = list_checkpoints(str(tmp_path), ImportOptions())[2].read()
    assert [*found] == ["dense.bias", "dense.weight"]
    assert found["dense.weight"].tolist() == weights[2, 3:].reshape(2, 3).T.tolist()


def test_without_modeldir_a_model_begins_where_the_step_does_not_grow(tmp_path):
    make_zoo(tmp_path, metrics="step,test_accuracy\n0,0.1\n86,0.5\n0,0.2\n")
    found = list_checkpoints(str(tmp_path), ImportOptions())
    assert [(checkpoint.model_id, checkpoint.epoch) for checkpoint in found] == [("0", 0), ("0", 86), ("1", 0)]


def test_columns_can_be_hyper_parameters_or_left_out(tmp_path):
    make_zoo(tmp_path, metrics="step,modeldir,lr,junk\n0,a,1,x\n1,a,1,2\n2,a,1,3\n")
    options = ImportOptions(hparam_columns=["lr"], ignore_columns=["junk"])
    assert list_checkpoints(str(tmp_path), options)[0].columns == {"hparams_lr": 1}


def test_plain_metrics_are_read_too(tmp_path):
    make_zoo(tmp_path)
    (tmp_path / "metrics.csv.gz").unlink()
    (tmp_path / "metrics.csv").write_text(METRICS)
    assert len(list_checkpoints(str(tmp_path), ImportOptions())) == 3


def test_weights_stay_on_disk(tmp_path):
    make_zoo(tmp_path)
    checkpoint = list_checkpoints(str(tmp_path), ImportOptions())[0]
    assert isinstance(checkpoint.read.args[0], np.memmap)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.zeros((2, 59))}, r"metrics\.csv\.gz has 3 rows, weights\.npy beside it has 2"),
        ({"weights": np.zeros((4, 59))}, r"metrics\.csv\.gz has 3 rows, weights\.npy beside it has 4"),
        ({"weights": np.zeros((3, 60))}, r"layout\.csv is about 59 columns, weights\.npy beside it has 60"),
        ({"weights": np.zeros(3)}, r"weights\.npy is float64 of shape \(3,\), expected a matrix of floats"),
        (
            {"weights": np.zeros((3, 59), int)},
            r"weights\.npy is int64 of shape \(3, 59\), expected a matrix of floats",
        ),
        ({"weights": np.array([[None]])}, r"weights\.npy is no NumPy matrix of numbers: "),
        ({"layout": LAYOUT.replace(":0,5,35", ":0,6,36")}, r"conv2d\.weight begins at column 6, expected 5"),
        (
            {"layout": LAYOUT.replace("(5, 4)", "(5, 5)")},
            r"line 5: sequential/dense/kernel:0 has 20 columns, .* has 25",
        ),
        (
            {"layout": LAYOUT.replace("varname", "what")},
            r"layout\.csv, line 2 does not tell a variable; expected the col",
        ),
        (
            {"metrics": METRICS.replace("step", "when")},
            r"has no column 'step', .*; expected the metrics of a Small CNN",
        ),
        (
            {"metrics": METRICS.replace(",86,", ",end,")},
            r"metrics\.csv\.gz, line 3, column 'step' is 'end', expected an in",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, changes, message):
    make_zoo(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        list_checkpoints(str(tmp_path), ImportOptions())


def test_a_damaged_row_can_be_left_out(tmp_path):
    make_zoo(tmp_path, metrics=METRICS.replace(",86,", ",end,"))
    options = ImportOptions(on_error="skip")
    assert [checkpoint.where[-3:] for checkpoint in list_checkpoints(str(tmp_path), options)] == ["[0]", "[2]"]
    assert len(options.skipped) == 1


def test_a_truncated_matrix_is_refused(tmp_path):
    make_zoo(tmp_path)
    content = (tmp_path / "weights.npy").read_bytes()
    (tmp_path / "weights.npy").write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"weights\.npy is no NumPy matrix of numbers: .*; download it again"):
        list_checkpoints(str(tmp_path), ImportOptions())


def test_a_wrong_folder_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"unterthiner expects weights\.npy, layout\.csv and metrics\.csv\.gz .* has none"
    ):
        list_checkpoints(str(tmp_path), ImportOptions())
    make_zoo(tmp_path / "mnist")
    with pytest.raises(ValueError, match=r"is no Small CNN Zoo, but holds .*/mnist; give one of them"):
        list_checkpoints(str(tmp_path), ImportOptions())
    (tmp_path / "mnist" / "layout.csv").unlink()
    with pytest.raises(ValueError, match=r"mnist has no layout\.csv; download it too"):
        list_checkpoints(str(tmp_path / "mnist"), ImportOptions())
