"""The benchmark programs on tiny inputs: each measures, prints its table, and refuses mistakes before the work."""

import json

import pytest

from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from eccl.eval.benchmarks import data, metric, training


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """120 persons with two images and two captions each give 480 training pairs: four batches of 128."""
    folder = tmp_path_factory.mktemp("data") / "set"
    sizes = {"train_ids": 120, "val_ids": 1, "test_ids": 1, "images_per_id": 2}
    write_benchmark(SyntheticBenchmark("cuhk_pedes", **sizes), folder, num_workers=2)
    return folder


@pytest.mark.slow
def test_the_data_benchmark_prints_loads_and_pairs(benchmark, capsys):
    data.main(["--data_dir", str(benchmark), "--num_workers", "0", "--batches", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"244 images of cuhk_pedes in {benchmark}" and len(lines) == 4
    assert lines[1].startswith("first load") and lines[2].startswith("second load") and " MiB" in lines[1]
    assert lines[3].startswith("training pairs, 0 workers") and float(lines[3].split("workers")[1].split("/")[0]) > 0


@pytest.mark.slow
def test_the_rate_of_pairs_is_the_median_of_several_stretches(benchmark, tmp_path):
    rates = data.time_pairs("cuhk_pedes", str(benchmark), str(tmp_path), num_workers=0, batches=3)
    assert 0 < rates["slowest"] <= rates["pairs_per_second"] <= rates["fastest"]


def test_a_measurement_prints_json_for_its_parent_process(benchmark, tmp_path, capsys):
    data.main(["--data_dir", str(benchmark), "--measure", "load", "--cache_dir", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == 244 and result["seconds"] > 0 and result["peak_mib"] > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batches", "5"], "--batches is 5, it must be at least 6 with 2 workers"),
        (["--batches", "0"], "argument --batches: 0 is too small"),
        (["--num_workers", "-1"], "argument --num_workers: -1 is too small"),
        (["--dataset", "market"], "--dataset is 'market', it must be one of cuhk_pedes, icfg_pedes"),
    ],
)
def test_the_data_benchmark_refuses_mistakes_before_it_measures(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "measure_in_new_process", lambda *_: pytest.fail("it measures"))
    with pytest.raises(SystemExit) as raised:
        data.main(["--data_dir", str(tmp_path), *words])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert raised.value.code == 2 and len(errors) == 1 and message in errors[0]


def test_a_mistake_that_a_measurement_finds_is_reported_once(tmp_path, capfd):
    with pytest.raises(SystemExit) as raised:
        data.main(["--data_dir", str(tmp_path)])
    captured = capfd.readouterr()
    assert raised.value.code == 2 and captured.out == ""
    assert [line for line in captured.err.splitlines() if "error" in line] == [
        f"error: no reid_raw.json in {tmp_path} or in {tmp_path / 'CUHK-PEDES'}"
    ]


def test_too_few_pairs_are_named(benchmark, tmp_path):
    with pytest.raises(ValueError, match="has 4 batches of 128 pairs, a rate needs at least 7 with 2 workers"):
        data.time_pairs("cuhk_pedes", str(benchmark), str(tmp_path), num_workers=2, batches=60)


def test_the_metric_benchmark_prints_a_row_for_each_size(monkeypatch, capsys):
    monkeypatch.setattr(metric, "SIZES", {"small": metric.Size(40, 30, 3), "large": metric.Size(90, 60, 5)})
    metric.main(["--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["size of", "---", "small", "large"]
    assert "40 x 30 x 512" in lines[2] and "90 x 60 x 512" in lines[3]


def test_the_rows_benchmark_prints_the_cost_of_each_number_of_rows(capsys):
    training.measure_rows([300, 600], batch_size=8)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[1:]] == [300, 600]
    assert all(float(line.split()[4]) >= 0 for line in lines[1:])


@pytest.mark.slow
def test_the_scaling_benchmark_trains_with_one_and_two_processes(capsys):
    training.measure_scaling(rounds=1, steps=4)
    one, two, summary = capsys.readouterr().out.splitlines()
    assert one.startswith("1 processes: ") and two.startswith("2 processes: ") and "as fast as one" in summary


def test_the_scaling_benchmark_needs_the_shipped_backbone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eccl.utils.shipped.BACKBONE", tmp_path / "missing")
    with pytest.raises(SystemExit) as raised:
        training.main(["scaling"])
    assert raised.value.code == 2
    assert "the synthetic backbone is in the repository, not in the wheel" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_of_rows_trains_one_step_from_each_load(tmp_path, capsys):
    data.main(["--rows", "1000", "--data_dir", str(tmp_path / "rows")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["first load", "second load", "stream"]
    assert all(float(line.split(" s ")[0].split()[-1]) > 0 and line.endswith(" MiB") for line in lines)
