"""Generated and recorded electrocardiograms, and mosaics: the truth is where it is said to be."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb

from lightning_plugins.data import ECGRecord, ecg_windows, mosaics, read_ecg, read_ecg_folder, synthetic_ecg
from lightning_plugins.data.ecg import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_abnormal_beats_are_within_their_masks(kind):
    """Without noise, what differs from a normal record lies in the spans of the abnormal beats."""
    record = synthetic_ecg(120, kinds=[kind], abnormal=0.15, noise=0.0, seed=3)
    windows = ecg_windows([record], 1024)
    assert set(windows.labels.tolist()) == {0, 1}
    assert 0.05 < windows.masks[windows.labels == 1].float().mean() < 0.6
    assert windows.masks[windows.labels == 0].all()
    abnormal, normal = (record.r_peaks[record.labels == label] for label in (1, 0))
    measure = {  # of the samples around an R peak
        "premature": lambda at: torch.zeros(()),  # its place is what is strange
        "wide": lambda at: record.signal[at - 4 : at + 5].sum(),
        "inverted": lambda at: -record.signal[at + 45 : at + 60].mean(),
        "ventricular": lambda at: -record.signal[at + 45 : at + 60].mean(),
    }[kind]
    there, here = (torch.stack([measure(int(at)) for at in beats[1:-1]]).mean() for beats in (abnormal, normal))
    assert there > here + 0.1 or kind == "premature"
    early = record.r_peaks.diff()[record.labels[1:] == 1].float().mean()
    usual = record.r_peaks.diff()[(record.labels[1:] == 0) & (record.labels[:-1] == 0)].float().mean()
    assert (early < 0.75 * usual) == (kind in {"premature", "ventricular"})


def test_records_repeat_by_seed_and_several_kinds_have_classes():
    record = synthetic_ecg(60, kinds=["wide", "inverted"], abnormal=0.4)
    assert set(record.labels.tolist()) == {0, 1, 2}
    again = synthetic_ecg(60, kinds=["wide", "inverted"], abnormal=0.4)
    torch.testing.assert_close(record.signal, again.signal, rtol=0, atol=0)
    assert not torch.equal(record.signal, synthetic_ecg(60, seed=1).signal)


def test_without_abnormal_beats_every_draw_is_a_normal_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.zeros(size))  # the lowest that can be drawn
    assert not synthetic_ecg(20, abnormal=0.0).labels.any()


def test_windows_take_the_class_and_spans_of_what_is_abnormal():
    signal = torch.arange(100.0)
    record = ECGRecord(signal, torch.tensor([10, 30, 50, 60, 90]), torch.tensor([0, 1, 0, 0, 0]), 100.0)
    windows = ecg_windows([record], 50)
    assert windows.labels.tolist() == [1, 0]
    assert windows.masks[0].nonzero()[:, 0].tolist() == list(range(20, 50))
    torch.testing.assert_close(windows.signals.std(-1), torch.ones(2, 1))
    assert len(ecg_windows([record], 50, stride=10).labels) == 6
    coarse = record.coarser(2)
    assert coarse.r_peaks.tolist() == [5, 15, 25, 30, 45]
    torch.testing.assert_close(coarse.signal[:2], torch.tensor([0.5, 2.5]))


def test_npz_and_wfdb_records_read_alike(tmp_path):
    rng = np.random.default_rng(0)
    ecg = rng.integers(-300, 300, 2000).astype("int16")
    peaks, pvc = np.array([100, 400, 700, 1000, 1500]), np.array([700])
    np.savez(tmp_path / "one.npz", ecg=ecg, r_peaks=peaks, pvc=pvc)
    (tmp_path / "w").mkdir()
    wfdb.wrsamp(
        "two", fs=360, units=["mV"], sig_name=["MLII"], p_signal=ecg[:, None] / 200, fmt=["16"],
        adc_gain=[200.0], baseline=[0], write_dir=str(tmp_path / "w"),
    )  # fmt: skip
    symbols = ["N", "A", "V", "N", "L"]
    wfdb.wrann(
        "two", "atr", np.sort(np.append(peaks, 500)), symbol=[*symbols[:2], "+", *symbols[2:]],
        write_dir=str(tmp_path / "w"),
    )  # fmt: skip
    first, second = read_ecg(tmp_path / "one.npz"), read_ecg(tmp_path / "w" / "two.hea")
    for record in (first, second):
        assert record.rate == 360
        assert record.labels.tolist() == [0, 0, 1, 0, 0]  # a change of rhythm is no beat
        assert record.r_peaks.tolist() == peaks.tolist()
    torch.testing.assert_close(first.signal, second.signal, atol=1e-6, rtol=0)
    assert [record.name for record in read_ecg_folder(tmp_path)] == ["one"]
    assert [record.name for record in read_ecg_folder(tmp_path / "w", ["two"])] == ["two"]


def test_the_study_keeps_patients_apart(monkeypatch):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    study = importlib.import_module("ecg_attribution")
    names = ["106", "119", "116", *study.TEST_PATIENTS]
    records = [dataclasses.replace(synthetic_ecg(30, seed=seed), name=name) for seed, name in enumerate(names)]
    own = {name: ecg_windows([record], study.LENGTH).signals for name, record in zip(names, records, strict=True)}
    train, test = study.split(records, "patient")
    torch.testing.assert_close(train.signals, torch.cat([own[name] for name in ("106", "119", "116")]))
    torch.testing.assert_close(test.signals, torch.cat([own[name] for name in ("200", "105", "114")]))
    train, test = study.split(records, "window")
    whole = torch.cat(list(own.values()))
    torch.testing.assert_close(test.signals, whole[2::3])
    assert len(train.labels) + len(test.labels) == len(whole)


def test_mosaics_know_their_tile():
    images = torch.arange(6).float()[:, None, None, None].expand(6, 1, 4, 4)
    made = mosaics(images, torch.tensor([0, 1, 2, 3, 4, 5]), 12, classes=(4, 2), seed=1)
    assert made.labels.tolist() == [0, 1] * 6
    for image, label, mask in zip(made.images, made.labels, made.masks, strict=True):
        assert image[0][mask].unique().tolist() == [(4.0, 2.0)[label]]
        assert not torch.isin(image[0][~mask], torch.tensor([4.0, 2.0])).any()
    assert made.masks.flatten(1).sum(1).tolist() == [16] * 12
    assert len(made.masks.unique(dim=0)) == 4  # every place is taken


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: synthetic_ecg(1), ValueError, "`seconds` must be at least 2"),
        (lambda: synthetic_ecg(9, kinds=["wied"]), ValueError, "`kinds` must be .* did you mean 'wide'"),
        (lambda: synthetic_ecg(9, kinds=[]), ValueError, "`kinds` must have at least one"),
        (lambda: synthetic_ecg(9, abnormal=20), ValueError, "did you mean 0.2"),
        (lambda: ecg_windows([synthetic_ecg(5)], 10_000), ValueError, "`length` must leave a window"),
        (lambda: read_ecg("nothing.npz"), FileNotFoundError, "no record at nothing.npz"),
        (lambda: read_ecg_folder("."), FileNotFoundError, "no records"),
        (lambda: mosaics(torch.rand(4, 1, 2, 2), torch.arange(4), 2, classes=(9,)), ValueError, "`classes` must be so"),
        (lambda: mosaics(torch.rand(4, 2, 2), torch.arange(4), 2), ValueError, "`images` must have shape"),
    ],
)
def test_bad_inputs_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_record_without_its_arrays_says_so(tmp_path):
    np.savez(tmp_path / "bad.npz", ecg=np.zeros(5))
    with pytest.raises(ValueError, match="must have the arrays ecg, r_peaks and pvc, got none called 'r_peaks'"):
        read_ecg(tmp_path / "bad.npz")
