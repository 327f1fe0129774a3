"""The speed benchmark on a tiny model: its arithmetic, its baseline, its rows, and its files."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eccl.eval.benchmarks import speed, speed_cases, speed_models, speed_report, speed_sweep
from eccl.eval.benchmarks.metric import Figures, Size
from eccl.eval.benchmarks.processes import environment, run_in_new_process
from eccl.eval.benchmarks.speed_report import Budget, Row, Spread, SweepRow
from eccl.hub.adapter import TARGET_MODULES

TINY = ["--model", "tiny", "--batch_size", "2", "--rounds", "2"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config():
    return speed_models.MODELS["tiny"]()


@pytest.fixture(scope="module")
def settings():
    return speed_models.Settings("tiny", CPU, 2, 2, torch.get_num_threads(), (2, 4))


def count(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_arithmetic_is_what_torch_counts(name):
    config = speed_models.MODELS[name]()
    model = speed_models.make_plain(config)
    # torch counts the products of this attention, as of all linear layers.
    model.requires_grad_(False).set_attn_implementation("eager")
    batch = speed_models.draw_batch(config, 3, CPU)
    # The maps of the prompts are counted once for the batch.
    text_width, vision_width = (encoder.hidden_size for encoder in config.encoder_configs)
    maps = 2 * config.prompt_depth * config.num_prompt_tokens * text_width * vision_width
    assert count(lambda: model.get_image_features(batch.pixels)) == 3 * speed_models.image_flops(config) + maps
    tokens = batch.our_ids.shape[1] + config.num_prompt_tokens
    assert count(lambda: model.get_text_features(batch.our_ids)) == 3 * speed_models.text_flops(config, tokens)
    assert speed_models.pair_flops(config) == speed_models.image_flops(config) + speed_models.text_flops(config, tokens)


def test_the_arithmetic_of_the_published_shape():
    """2 operations for each of the 85 M and 38 M weights of the layers and each token, and a few per cent attention."""
    config = speed_models.MODELS["vit-b16"]()
    assert speed_models.image_tokens(config) == 197
    assert speed_models.image_flops(config) == pytest.approx(2 * 85e6 * 197, rel=0.06)
    assert speed_models.text_flops(config, 49) == pytest.approx(2 * 37.8e6 * 49, rel=0.02)


def test_the_baseline_computes_what_our_model_computes_without_prompts(config):
    clip = speed_models.make_clip(config)
    ours = speed_models.make_plain(config)
    ours.prompt_learner = None
    batch = speed_models.draw_batch(config, 3, CPU)
    for encode, inputs in (
        (speed_models.encode_images, batch.pixels),
        (speed_models.encode_texts, batch.clip_ids),
    ):
        assert torch.allclose(encode(ours, inputs), encode(clip, inputs), atol=1e-5)
    assert type(clip).__module__.startswith("transformers.")


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_baseline_has_our_parameters_except_for_the_prompts(name):
    config = speed_models.MODELS[name]()
    ours, clip = speed_models.make_ours(config), speed_models.make_clip_with_lora(config)

    def sizes(model, trained):
        return {
            key.replace("base_model.model.", ""): value.numel()
            for key, value in model.named_parameters()
            if value.requires_grad == trained and "prompt_learner" not in key
        }

    assert sizes(ours, True) == sizes(clip, True) and sizes(ours, False) == sizes(clip, False)
    layers = sum(encoder.num_hidden_layers for encoder in config.encoder_configs)
    assert len(sizes(clip, True)) == 2 * len(TARGET_MODULES) * layers


def test_captions_are_cut_for_us_and_padded_for_the_baseline(config):
    batch = speed_models.draw_batch(config, 4, CPU)
    end = config.encoder_configs[0].vocab_size - 1
    lengths = [row.tolist().index(end) + 1 for row in batch.clip_ids]
    assert lengths == [18, 27, 36, 45] and batch.clip_ids.shape == (4, 77) and batch.our_ids.shape == (4, 45)
    assert (batch.clip_ids[:, :45] == batch.our_ids).all() and (batch.clip_ids[:, 45:] == end).all()


def test_a_step_leaves_gradients_for_all_that_is_trained(config):
    batch = speed_models.draw_batch(config, 2, CPU)
    for dtype in ("float32", "bfloat16"):
        for make, loss in (
            (speed_models.make_ours, speed_models.our_loss),
            (speed_models.make_clip_with_lora, speed_models.clip_loss),
        ):
            model = make(config)
            speed_cases.make_step(model, loss, batch, dtype)()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert trained and all(parameter.grad is not None for parameter in trained)


def test_cases_take_turns_and_ratios_are_those_of_a_round(monkeypatch):
    from eccl.eval.benchmarks import speed_timing

    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = speed_timing.time_in_turn(cases, 3, CPU)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc" and all(len(values) == 3 for values in seconds.values())
    assert speed_timing.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Spread(2.0, 1.0, 3.0)
    gemm = speed_timing.Gemm(10, speed_models.MODELS["tiny"]().encoder_configs[1], torch.float32, CPU)
    assert gemm.flops == 10 * 2 * 10 * 24 * 96
    # Half of the operations in the same time.
    assert speed_timing.shares(gemm.flops / 2, [1.0, 2.0], gemm, [1.0, 2.0]) == Spread(0.5, 0.5, 0.5)


def test_the_device_parts_make_all_rows(settings):
    names = {
        part: [row.name for row in speed.make_measurements()[part](settings)]
        for part in ("step", "images", "texts", "memories")
    }
    assert names["step"] == [
        "training step, float32",
        "training step, bfloat16 autocast",
        "training step, bfloat16 autocast, base in bfloat16",
        "training step, bfloat16 autocast, base in bfloat16, eager attention in both",
        "update of Adam",
    ]
    assert names["images"] == ["image encode, float32", "image encode, bfloat16"]
    assert names["texts"] == [f"text encode, 16 captions of 49 tokens, {x}" for x in ("float32", "bfloat16")]
    assert names["memories"] == [
        "identity memory, batch 128, 11,003 rows",
        "instance memory, batch 128, 34,054 rows",
    ]


def test_the_captions_of_a_benchmark_are_shorter_than_the_limit(settings):
    rows = list(speed_cases.measure_captions(settings))
    assert [row.name.rpartition(" ")[2] for row in rows] == ["float32", "bfloat16", "bfloat16"]
    assert [row.reference.rpartition(" ")[2] for row in rows] == ["float32", "float32", "bfloat16"]


@pytest.mark.slow
def test_a_peak_is_that_of_a_new_process(settings):
    ballast = torch.ones(2**28)  # 1 GiB, which a process started from this one must not count.
    peak = run_in_new_process(speed_cases.step_peak, "ours", settings, "float32")
    assert 2**27 < peak < 4 * len(ballast)


def test_the_environment_is_as_before_after_the_block(monkeypatch):
    monkeypatch.setenv("ECCL_ONE", "1")
    with environment({"ECCL_ONE": "2", "ECCL_TWO": "2"}):
        assert speed.os.environ["ECCL_ONE"] == speed.os.environ["ECCL_TWO"] == "2"
    assert speed.os.environ["ECCL_ONE"] == "1" and "ECCL_TWO" not in speed.os.environ


def test_the_sweep_names_a_batch_that_does_not_fit(settings, monkeypatch):
    draw = speed_models.draw_batch

    def fail_for_four(config, size, device):
        if size == 4:
            raise torch.OutOfMemoryError
        return draw(config, size, device)

    monkeypatch.setattr(speed_sweep, "draw_batch", fail_for_four)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    rows = list(speed_sweep.sweep(settings))
    variants = [variant for variant in speed_sweep.VARIANTS if variant.dtype != "tf32"]
    assert [(row.name, row.batch_size) for row in rows] == [(each.name, size) for each in variants for size in (2, 4)]
    assert all(row.seconds is None and row.problem == "out of memory" for row in rows[1::2])
    assert all(row.seconds and row.share > 0 and not row.problem for row in rows[::2])
    # Class token, 4 x 2 patches and 4 prompts; 45 tokens and 4 prompts; of CLIP 1 + 8 and 77.
    assert {row.tokens for row in rows if "ours" in row.name} == {13 + 49}
    assert {row.tokens for row in rows if "CLIP" in row.name} == {9 + 77}


def test_a_failure_of_the_compiler_is_a_row(settings, monkeypatch):
    monkeypatch.setattr(speed_sweep, "VARIANTS", (speed_sweep.Variant("step", "ours", "float32", compiled=True),))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", broken))

    def broken(*_, **__):
        raise RuntimeError("no compiler")

    assert {row.problem for row in speed_sweep.sweep(settings)} == {"torch.compile failed: RuntimeError"}


def test_the_metric_part_has_a_row_for_each_size(settings, monkeypatch):
    monkeypatch.setattr(speed, "METRIC_SIZES", {"metric": (Size(40, 30, 3),), "large_metric": (Size(20_000, 30, 3),)})
    monkeypatch.setattr(speed, "run_in_new_process", lambda *_: Figures([1.0, 2.0], [1.1, 2.6], 2**29))
    (small,), (large, memory) = (list(speed.measure_metric(settings, part)) for part in speed.METRIC_SIZES)
    assert small.name == "metric, 40 x 30" and small.ratio == Spread(pytest.approx(1.2), pytest.approx(1.1), 1.3)
    assert large.budgets == (Budget("ratio", "at most", 1.3),) and large.meets(large.budgets[0])
    assert memory.value.median == 0.5 and memory.meets(memory.budgets[0])


@pytest.mark.slow
def test_the_other_parts_measure(settings, monkeypatch):
    monkeypatch.setattr(speed, "METRIC_SIZES", {"metric": (Size(40, 30, 3),)})
    # 960 pairs are 8 batches.
    monkeypatch.setattr(speed, "TRAIN_IDS", 120)
    monkeypatch.setattr(speed, "BATCHES", 7)
    rows = [row for part in ("metric", "data", "start") for row in speed.make_measurements()[part](settings)]
    assert [row.part for row in rows] == ["metric", "data", "start", "start", "start"]
    assert all(row.value.median > 0 for row in rows[:-1]) and rows[3].ratio.median > 0


def row(value=2.0, **changes) -> Row:
    return Row("step", "a step", "s", Spread(value, 1.0, 3.0), **changes)


def test_a_budget_is_met_on_the_right_side_of_its_limit():
    some = row(ratio=Spread(0.8, 0.7, 0.9), share=Spread(0.6, 0.6, 0.6))
    for budget, met in (
        (Budget("ratio", "at most", 0.82), True),
        (Budget("ratio", "at most", 0.79), False),
        (Budget("share", "at least", 0.6), True),
        (Budget("share", "at least", 0.61), False),
        (Budget("value", "at most", 2.0), True),
    ):
        assert some.meets(budget) is met
    with pytest.raises(ValueError, match="has a budget for its ratio, which was not measured"):
        row().meets(Budget("ratio", "at most", 1))


def test_a_row_of_the_table_has_every_figure_and_its_budget():
    line = speed_report.format_row(
        row(
            reference="CLIP",
            reference_value=Spread(4.0, 4.0, 4.0),
            ratio=Spread(0.5, 0.25, 0.75),
            budgets=(Budget("ratio", "at most", 0.4), Budget("value", "at most", 2)),
        )
    )
    assert line == (
        "| a step | 2.00 s (1.00 to 3.00) | CLIP: 4.00 s | 0.500 (0.250 to 0.750) | - | at most 0.4 x; at most 2 s "
        "| no; yes |"
    )
    sweep = SweepRow("step", 4, Spread(0.5, 0.5, 0.5), 100, 2**30, 0.25)
    assert speed_report.format_sweep_row(sweep) == "| step | 4 | 0.500 | 8 | 800 | 1.00 | 0.25 |"


def test_a_busy_machine_is_named():
    assert "WARNING" not in speed_report.describe_load(0.2, 0.1) and "unknown" in speed_report.describe_load(0.2, None)
    assert "the machine was not idle" in speed_report.describe_load(0.9, 0.1)
    assert "the machine was not idle" in speed_report.describe_load(0.1, 0.9)
    load = speed.Load()
    assert load.before >= 0 and load.busy_with_others() >= 0


def test_the_table_the_json_and_the_picture_say_the_same(tmp_path, capsys):
    speed.main([*TINY, "--parts", "images", "texts", "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()
    content = json.loads((tmp_path / "out" / "speed.json").read_text())
    text = (tmp_path / "out" / "speed.md").read_text()
    lines = [line for line in printed if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[1:]] == [row["name"] for row in content["rows"]]
    assert all(line in text for line in lines) and content["sweep"] == []
    for line, stored in zip(lines[1:], content["rows"], strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[-1] == ("; ".join("yes" if met else "no" for met in stored["met"]) or "-")
        assert float(cells[3].split()[0]) == pytest.approx(stored["ratio"]["median"], rel=0.01)
        assert float(cells[1].split()[0]) == pytest.approx(stored["value"]["median"], rel=0.01)
    assert content["header"]["model"] == "tiny" and content["header"]["load_before"] >= 0
    assert printed[0] in text and "load average before the run" in text
    with speed_image(tmp_path / "out" / "speed.png") as picture:
        assert (
            picture.width == 1000
            and picture.height == 34 + 24 * sum(len(row["budgets"]) for row in content["rows"]) + 10
        )


def speed_image(path):
    from PIL import Image

    return Image.open(path)


def test_a_bar_is_green_if_the_budget_is_met_and_red_if_not():
    rows = [row(ratio=Spread(value, value, value), budgets=(Budget("ratio", "at most", 1.0),)) for value in (0.5, 1.2)]
    picture = speed_report.draw_budgets(rows)
    first, second = (picture.getpixel((530, 34 + 24 * number + 12)) for number in range(2))
    assert first[1] > first[0] and second[0] > second[1]


def test_results_are_not_overwritten_unasked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "run_parts", lambda *_: ([row()], []))
    words = [*TINY, "--parts", "images", "--output_dir", str(tmp_path)]
    speed.main(words)
    assert not (tmp_path / "speed.png").exists()  # There is no budget to draw.
    before = (tmp_path / "speed.json").read_bytes()
    assert "give --overwrite to replace it" in error_of(words, capsys)
    assert (tmp_path / "speed.json").read_bytes() == before
    speed.main([*words, "--overwrite"])
    (tmp_path / "speed.json").write_text("{}")
    assert "files that no speed benchmark wrote" in error_of([*words, "--overwrite"], capsys)


def error_of(words, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        speed.main(words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert raised.value.code == 2 and len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "steps"], "argument --parts: invalid choice: 'steps'"),
        (["--model", "vit-l14"], "argument --model: invalid choice: 'vit-l14'"),
        (["--rounds", "0"], "argument --rounds: 0 is too small"),
        (["--threads", "0"], "argument --threads: 0 is too small"),
        (["--batch_sizes", "0"], "argument --batch_sizes: 0 is too small"),
        (["--overwrite"], "--overwrite only applies to --output_dir, which is missing"),
        (["--device", "gpu"], "--device is 'gpu', which this machine does not have"),
        (["--device", "cuda:99"], "--device is 'cuda:99', which this machine does not have"),
        (["--output_dir", "FILE"], "is a file"),
    ],
)
def test_a_mistake_is_reported_before_the_work(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "run_parts", lambda *_: pytest.fail("it measures"))
    (tmp_path / "file").touch()
    assert message in error_of([word.replace("FILE", str(tmp_path / "file")) for word in words], capsys)
