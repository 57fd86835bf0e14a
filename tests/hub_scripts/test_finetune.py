"""`sane finetune`: sets of networks under one budget."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hub_scripts import finetune as command
from hub_scripts.evaluation import finetune_plots
from hub_scripts.evaluation.functional import batched_logits, ensemble_accuracy, evaluate, train_networks
from hub_scripts.evaluation.learning_curves import LearningCurve
from hub_scripts.finetune import FinetuneArguments, finetune
from hub_scripts.zoos.networks import load_networks, save_networks
from hub_scripts.zoos.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def networks(zoo, tmp_path_factory) -> Path:
    """Two sets: last checkpoints of the train split, and the same with noise that makes them worse."""
    folder = tmp_path_factory.mktemp("networks")
    good = zoo.stacked("train", np.flatnonzero(zoo.column("train", "epoch") == 2)[:3])
    generator = torch.Generator().manual_seed(0)
    noisy = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in good.items()}
    row = zoo.rows("train")[0]
    info = {"task": "digits", "architecture": row["architecture"], "architecture_kwargs": row["architecture_kwargs"]}
    save_networks(folder, {"good": good, "noisy": noisy}, info)
    return folder


@pytest.fixture(scope="module")
def results(networks, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("finetune") / "f"
    args = FinetuneArguments(
        init=[str(networks / "good"), str(networks / "noisy"), "scratch"],
        output_dir=str(folder),
        epochs=2,
        batch_size=100,
        learning_rates=[1e-5, 1e-2],
        seeds=2,
        reach=[0.3, 0.999],
    )
    return finetune(args), folder


def test_each_set_gets_the_learning_rate_that_is_best_on_validation_images(results):
    for one in results[0]["sets"].values():
        tried = one["validation_of_learning_rates"]
        assert one["learning_rate"] == max(map(float, tried), key=lambda rate: tried[str(rate)])
    assert results[0]["sets"]["scratch"]["learning_rate"] == 1e-2


def test_curves_start_where_the_networks_are_and_have_intervals(results):
    found, _ = results
    assert found["epochs"] == [0, 1, 2]
    assert found["good"][0] > max(found["noisy"][0], found["scratch"][0])
    assert found["scratch"][2] > found["scratch"][0]
    for name in ("good", "noisy", "scratch"):
        for mean, (low, high) in zip(found[name], found["interval"][name], strict=True):
            assert low <= mean <= high


def test_steps_to_reach_an_accuracy_agree_with_the_curve(results):
    found, _ = results
    assert found["steps_to_reach"]["good"] == {"0.3": 0, "0.999": None}
    step = found["steps_to_reach"]["scratch"]["0.3"]
    curve = found["curves"]
    place = curve["epochs"].index(pytest.approx(step / found["steps_per_epoch"]))
    assert curve["mean"]["scratch"][place] >= 0.3 > curve["mean"]["scratch"][place - 1]


def test_the_rate_of_a_set_is_the_one_whose_networks_do_best_on_validation_images(results, networks, zoo):
    tensors, _ = load_networks(networks / "noisy")
    images, labels = zoo.task.images, zoo.task.labels
    for rate, claimed in results[0]["sets"]["noisy"]["validation_of_learning_rates"].items():
        *_, last = train_networks(
            zoo.module, tensors, images["train"], labels["train"], learning_rate=float(rate), epochs=2, batch_size=100,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert claimed == evaluate(zoo.module, last, images["validation"], labels["validation"]).accuracy.mean()


def test_what_the_quickstart_reads_is_a_curve_for_each_set(results):
    found, folder = results
    assert json.loads((folder / "results.json").read_text())["finetune"]["sets"].keys() == found["sets"].keys()
    assert all(len(found[name]) == len(found["epochs"]) for name in found["sets"])


def test_a_report_is_written(results):
    _, folder = results
    assert {"results.json", "finetuning.png", "steps_to_reach.png", "report.html"} <= {
        p.name for p in folder.iterdir()
    }
    assert "never" in (folder / "report.html").read_text()


def test_an_ensemble_averages_probabilities(zoo):
    tensors = {name: tensor[:4] for name, tensor in zoo.stacked("test").items()}
    images, labels = zoo.task.images["test"], zoo.task.labels["test"]
    logits = batched_logits(zoo.module, tensors, images)
    mean = logits.softmax(-1).mean(0)
    assert ensemble_accuracy(logits, labels) == float((mean.argmax(-1) == labels).float().mean())


def test_few_labelled_samples_of_other_classes(networks, tmp_path):
    args = FinetuneArguments(
        init=[str(networks / "good"), "scratch"], output_dir=str(tmp_path / "f"), epochs=1, task="digits[3,1,4]", new_head="ridge",
        shots=5, batch_size=5, num_networks=2,
    )  # fmt: skip
    found = finetune(args)
    assert found["task"]["train_images"] == 15
    assert found["sets"]["good"]["networks"] == 2
    assert found["good"][0] > 0.6 > found["scratch"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": ["scratch"]}, "needs at least one set of networks"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"new_head": "magic"}, "expected ridge or init"),
        ({"learning_rates": []}, "--learning-rates"),
        ({"shots": 0}, "--shots is 0, expected at least 1"),
        ({"num_networks": -1}, "--num-networks is -1"),
        ({"reach": [0.5, 1.5]}, "--reach is"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        FinetuneArguments(**{"init": ["a", "scratch"], "output_dir": "o"} | change)


def test_sets_of_two_architectures_are_refused(networks, mlp_zoo, tmp_path):
    other = Zoo(mlp_zoo)
    row = other.rows("train")[0]
    info = {"task": "digits", "architecture": row["architecture"], "architecture_kwargs": row["architecture_kwargs"]}
    save_networks(tmp_path / "networks", {"mlp": other.stacked("train", [0])}, info)
    args = FinetuneArguments(
        init=[str(networks / "good"), str(tmp_path / "networks" / "mlp")], output_dir=str(tmp_path / "f")
    )
    with pytest.raises(ValueError, match="must be of one architecture"):
        finetune(args)
    assert not (tmp_path / "f").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        finetune(FinetuneArguments(init=[str(tmp_path / "empty")], output_dir=str(tmp_path / "f")))


def test_networks_that_are_not_finite_are_counted(networks, tmp_path):
    info = json.loads((networks / "networks.json").read_text())
    tensors, _ = load_networks(networks / "good")
    tensors["fc1.weight"][0] = float("nan")
    save_networks(tmp_path / "networks", {"broken": tensors}, info)
    args = FinetuneArguments(
        init=[str(tmp_path / "networks" / "broken")], output_dir=str(tmp_path / "f"), epochs=1, batch_size=400
    )
    found = finetune(args)["sets"]["broken"]
    assert (found["networks"], found["not_finite"], found["not_finite_networks"]) == (3, 1, ["000.safetensors"])
    assert "000.safetensors of broken" in (tmp_path / "f" / "report.html").read_text()


# --- curves
def curve() -> LearningCurve:
    """Two seeds, three points, three networks."""
    first = [[0.1, 0.1, 0.1], [0.2, 0.3, 0.7], [0.6, 0.7, 0.8]]
    second = [[0.1, 0.1, 0.1], [0.2, 0.3, 0.7], [0.4, 0.7, 0.8]]
    return LearningCurve(np.array([0, 5, 7]), np.array([first, second]))


def test_steps_are_those_of_the_mean_and_of_the_median_network():
    assert curve().mean == pytest.approx([0.1, 0.4, 4 / 6])
    assert curve().median == pytest.approx([0.1, 0.3, 0.7])
    assert [curve().steps_to_reach(level) for level in (0.05, 0.35, 0.65, 0.69)] == [0, 5, 7, None]
    assert [curve().median_steps_to_reach(level) for level in (0.05, 0.35, 0.69, 0.75)] == [0, 7, 7, None]


def test_intervals_draw_networks_and_seeds():
    low, high = curve().interval.T
    assert low[0] == high[0] == pytest.approx(0.1)  # all runs are alike there
    assert low[1] == pytest.approx(0.2)  # the same network three times: once in 27
    assert high[1] == pytest.approx(0.7)
    assert curve().steps_interval(0.35) == (5, 7)
    assert curve().steps_interval(0.75)[1] is None
    # networks that are alike leave the seeds
    seeds = LearningCurve(np.array([0]), np.array([[[0.2] * 50], [[0.4] * 50]]))
    assert seeds.interval[0] == pytest.approx([0.2, 0.4])


def test_one_run_has_no_interval():
    one = LearningCurve(np.array([0, 3]), np.array([[[0.2], [0.6]]]))
    assert np.isnan(one.interval).all()
    assert one.steps_interval(0.5) == (None, None)
    assert one.steps_to_reach(0.5) == 3


def test_plots_show_means_and_say_never():
    figure = finetune_plots.accuracy_curves({"anchors": curve()}, steps_per_epoch=5)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[0, 0.1], [1, 0.4], [1.4, 2 / 3]])
    assert figure.legends[0].get_texts()[0].get_text() == "anchors (n = 3 x 2)"
    panels = finetune_plots.steps_to_reach({"anchors": curve(), "mine": curve()}, [0.35, 0.9]).axes
    assert [axes.get_title() for axes in panels] == ["accuracy 0.35", "accuracy 0.9"]
    assert [line.get_xdata()[0] for line in panels[0].lines] == [5, 5]
    assert [text.get_text() for text in panels[1].texts] == ["never", "never"]


# --- sets and budgets
def test_sets_of_one_name_are_told_apart_by_their_folders(networks, tmp_path):
    info = json.loads((networks / "networks.json").read_text())
    tensors, _ = load_networks(networks / "good")
    for run in ("one", "two"):
        save_networks(tmp_path / run / "networks", {"good": tensors, "std": tensors}, info)
    init = [str(tmp_path / run / "networks" / "good") for run in ("one", "two")]
    args = FinetuneArguments(init=[*init, str(tmp_path / "one" / "networks" / "std")], output_dir=str(tmp_path / "f"), epochs=1, batch_size=400)  # fmt: skip
    found = finetune(args)
    assert list(found["sets"]) == ["one/networks/good", "two/networks/good", "networks/std"]
    assert found["one/networks/good"] == found["two/networks/good"]
    with pytest.raises(ValueError, match=r"--init names .*good twice\."):
        finetune(FinetuneArguments(init=[init[0], init[0]], output_dir=str(tmp_path / "g")))


def test_sets_of_two_tasks_need_to_be_told_which(networks, tmp_path):
    info = json.loads((networks / "networks.json").read_text())
    tensors, _ = load_networks(networks / "good")
    save_networks(tmp_path / "networks", {"other": tensors}, info | {"task": "digits[1,2]"})
    args = FinetuneArguments(
        init=[str(networks / "good"), str(tmp_path / "networks" / "other")], output_dir=str(tmp_path / "f")
    )
    with pytest.raises(ValueError, match=r"different tasks, digits and digits\[1,2\]; say which one with --task"):
        finetune(args)


def test_a_ridge_alone_is_told_apart_from_the_weights_below_it(networks, tmp_path):
    args = FinetuneArguments(
        init=[str(networks / "good"), "scratch"], output_dir=str(tmp_path / "f"), epochs=1, task="digits[3,1,4]", new_head="ridge",
        shots=5, batch_size=5, seeds=2, num_networks=1,
    )  # fmt: skip
    found = finetune(args)
    assert found["scratch_ridge"][0] > found["scratch"][0] + 0.1
    # both seeds have labelled images of their own, and with them another classifier
    assert found["interval"]["good"][0][0] < found["interval"]["good"][0][1]


def test_a_budget_limits_what_a_ridge_sees(networks, tmp_path):
    args = FinetuneArguments(
        init=[str(networks / "good")], output_dir=str(tmp_path / "f"), epochs=1, new_head="ridge", max_train_images=4
    )
    with pytest.raises(ValueError, match=r"digits has no train image of class \d among its 4; take more"):
        finetune(args)


def test_other_classes_without_a_new_head_are_refused(networks, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(
            ["--init", str(networks / "good"), "--task", "digits[3,1,4]", "--output-dir", str(tmp_path / "f")]
        )
    assert stopped.value.code == 1
    assert "has 3 classes, the networks answer with 10" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
