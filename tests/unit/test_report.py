"""The loss curve says what the record says: read back from the drawn figure and from the picture."""

import json
from pathlib import Path

import matplotlib.image as image
import numpy as np
import pytest

from trainer.errors import DataError
from trainer.evaluate.report import loss_curve, read_curve, smooth


def record(path: Path, *steps: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps({"step": number, **step}) + "\n" for number, step in enumerate(steps, 1)))
    return path


def test_reading_separates_faults_and_validation(tmp_path: Path):
    metrics = record(
        tmp_path / "metrics.jsonl",
        {"loss": 2.0},
        {"loss": "nan"},
        {"loss": 1.5, "val_loss": 1.25},
        {"loss": 1, "val_loss": "inf"},
    )
    curve = read_curve(metrics)
    assert (curve.steps, curve.losses, curve.faults) == ([1, 3, 4], [2.0, 1.5, 1.0], [2])
    assert (curve.validation_steps, curve.validation_losses) == ([3], [1.25])


def test_smoothing_keeps_constants_and_has_no_lag():
    assert smooth([3.0] * 9, 2.0) == pytest.approx([3.0] * 9)
    line = [10.0 - 0.5 * step for step in range(41)]
    assert smooth(line, 2.0)[10:-10] == pytest.approx(line[10:-10])
    noisy = np.random.default_rng(0).normal(size=400)
    assert np.std(smooth(noisy.tolist(), 5.0)) < 0.5 * np.std(noisy)
    assert smooth([7.0], 0.02) == [7.0]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(image.imread(path))[..., :3]


def near(picture: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return int((np.abs(picture - wanted).max(axis=-1) < 0.04).sum())


def test_the_picture_shows_training_validation_and_faults(tmp_path: Path):
    plain: list[dict[str, object]] = [{"loss": 3.0 - 0.1 * step} for step in range(20)]
    loss_curve(record(tmp_path / "a.jsonl", *plain), tmp_path / "a.png", title="plain")
    plain[9] = {"loss": 2.1, "val_loss": 2.0}
    plain[19] = {"loss": 1.1, "val_loss": 1.2}
    plain[4] = {"loss": "inf"}
    loss_curve(record(tmp_path / "b.jsonl", *plain), tmp_path / "b.png", title="more")
    a, b = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert a.shape == b.shape == (900, 1600, 3)
    assert near(a, "#ffffff") > 0.8 * 900 * 1600
    assert near(a, "#1f5fa8") > 1000
    assert near(a, "#c8501e") == near(a, "#b00020") == 0
    assert near(b, "#c8501e") > 500
    assert near(b, "#b00020") > 100


@pytest.mark.parametrize("losses", [[1.0], [5.0, 0.1, 0.05], [0.0, 0.0], [9.0, 0.0, 1.0]])
def test_short_flat_and_steep_records_are_drawn(tmp_path: Path, losses):
    loss_curve(record(tmp_path / "m", *({"loss": loss} for loss in losses)), tmp_path / "m.png", title="$5 {x} _y")
    assert near(pixels(tmp_path / "m.png"), "#1f5fa8") > 20


def test_the_same_record_gives_the_same_bytes(tmp_path: Path):
    metrics = record(tmp_path / "m", {"loss": 2.0}, {"loss": 1.0, "val_loss": 1.5})
    loss_curve(metrics, tmp_path / "1.png", title="t")
    loss_curve(metrics, tmp_path / "2.png", title="t")
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 steps, none with a finite loss"),
        ('{"step": 1, "loss": "nan"}\n', "1 steps, none with a finite loss"),
        ('{"step": 1, "loss": 1}\n{"step": 2', "line 2"),
        ('{"step": 1}\n', "line 1: 'loss'"),
        ('{"step": 1, "loss": null}\n', "line 1: None is not a number"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=f"cannot draw a loss curve\n  got: {message}"):
        loss_curve(tmp_path / "metrics.jsonl", tmp_path / "x.png", title="t")
    assert not (tmp_path / "x.png").exists()


def test_a_missing_record_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="No such file"):
        read_curve(tmp_path / "metrics.jsonl")
