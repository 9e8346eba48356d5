"""Electrocardiograms with known beat positions: generated, or read from a folder of records."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import (
    check_choice,
    check_finite_number,
    check_fraction,
    check_non_negative_int,
    check_positive_int,
    check_room,
)
from lightning_plugins.functional.attribution import beat_spans, spans_to_mask

KINDS = ("premature", "wide", "inverted", "ventricular")
# Seconds from the R peak, millivolts and width in seconds of the waves P, Q, R, S and T.
_WAVES = ((-0.17, 0.15, 0.025), (-0.03, -0.12, 0.010), (0.0, 1.1, 0.011), (0.03, -0.25, 0.011), (0.28, 0.30, 0.055))
_EARLY = 0.62  # of the usual distance between beats; the following pause compensates for it
# WFDB annotation codes of beats; all others mark rhythm, noise or waves.
_BEATS = frozenset("NLRBAaJSVrFejnE/fQ?")


@dataclass(frozen=True)
class ECGRecord:
    """One lead of an electrocardiogram and its beats.

    Attributes:
        signal: Millivolts, shape ``(length,)``.
        r_peaks: Sample indices of the R peaks, increasing, shape ``(n,)``.
        labels: The class of each beat, 0 for a normal one, shape ``(n,)``.
        rate: Samples per second.
        name: Name of the record.
    """

    signal: Tensor
    r_peaks: Tensor
    labels: Tensor
    rate: float
    name: str = ""

    def coarser(self, factor: int) -> "ECGRecord":
        """Average groups of samples.

        Args:
            factor: Number of samples averaged into one.

        Returns:
            The record with ``rate / factor`` samples per second.

        Example:
            >>> synthetic_ecg(10, rate=200).coarser(2).rate
            100.0
        """
        length = len(self.signal) // check_positive_int("factor", factor)
        signal = self.signal[: length * factor].reshape(length, factor).mean(1)
        kept = self.r_peaks // factor < length
        return ECGRecord(signal, self.r_peaks[kept] // factor, self.labels[kept], self.rate / factor, self.name)


class ECGWindows(NamedTuple):
    """Windows of records, of equal length.

    Attributes:
        signals: Each with mean 0 and standard deviation 1, shape ``(n, 1, length)``.
        labels: The class of each, shape ``(n,)``: the most frequent class of its abnormal beats, 0 if there are none.
        masks: Samples in the spans of the beats of this class, bools of shape ``(n, length)``.
    """

    signals: Tensor
    labels: Tensor
    masks: Tensor


def synthetic_ecg(
    seconds: float,
    *,
    rate: int = 180,
    kinds: Sequence[str] = ("ventricular",),
    abnormal: float = 0.1,
    noise: float = 0.03,
    seed: int = 0,
) -> ECGRecord:
    """Generate an electrocardiogram as a sum of Gaussians, one per wave of each beat.

    Kinds of abnormal beats: ``"premature"`` comes early, without a P wave, and is followed by a pause; ``"wide"`` has a
    three times wider QRS complex; ``"inverted"`` has an inverted T wave; ``"ventricular"`` combines all three.

    Args:
        seconds: Length.
        rate: Samples per second.
        kinds: The kinds of abnormal beats, equally frequent; their classes are 1, 2, … in this order.
        abnormal: The fraction of abnormal beats, which are never consecutive.
        noise: Standard deviation in millivolts, in addition to a slow drift.
        seed: Random seed.

    Returns:
        The record, with the exact positions of its beats.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range, or a kind is unknown.

    Example:
        >>> record = synthetic_ecg(60, abnormal=0.2)
        >>> record.signal.shape, sorted(record.labels.unique().tolist())
        (torch.Size([10800]), [0, 1])
    """
    check_arguments(synthetic_ecg, locals())
    names = [check_choice("kinds", kind, KINDS) for kind in ((kinds,) if isinstance(kinds, str) else kinds)]
    if not names:
        raise ValueError("`kinds` must have at least one kind of abnormal beat, got none")
    if check_finite_number("seconds", seconds) < 2:
        raise ValueError(f"`seconds` must be at least 2, for a beat or two, got {seconds!r}")
    check_finite_number("noise", noise)
    check_room("seconds", seconds * rate)
    check_fraction("abnormal", abnormal)
    draw = torch.Generator().manual_seed(check_non_negative_int("seed", seed))
    length = int(seconds * check_positive_int("rate", rate))
    signal = noise * torch.randn(length, generator=draw)
    time = torch.arange(length) / rate
    signal += 0.1 * torch.sin(2 * torch.pi * (0.25 * time + torch.rand(1, generator=draw)))
    at = 0.4
    beats: list[tuple[int, int]] = []
    period = 0.75 + 0.2 * float(torch.rand(1, generator=draw))
    while at < seconds - 0.4:
        chosen, which, jitter = torch.rand(3, generator=draw).tolist()
        label = 0
        if beats and not beats[-1][1] and chosen < abnormal:
            label = 1 + int(which * len(names))
        kind = names[label - 1] if label else ""
        early = kind in {"premature", "ventricular"}
        at -= (1 - _EARLY) * period if early else 0.0
        signal += _beat(time - at, kind)
        beats.append((round(at * rate), label))
        at += period * (0.95 + 0.1 * jitter) + (1 - _EARLY) * period * early
    peaks, labels = torch.tensor(beats).unbind(1)
    return ECGRecord(signal, peaks, labels, float(rate), f"synthetic {seed}")


def ecg_windows(records: Sequence[ECGRecord], length: int, *, stride: int | None = None) -> ECGWindows:
    """Cut records into windows with the class and the positions of abnormal beats.

    Args:
        records: The records; windows with fewer than two beats are dropped.
        length: Samples in a window.
        stride: Samples between the starts of windows; by default ``length``, without overlap.

    Returns:
        The windows of all records, in their order.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If one is less than 1, or no record is as long as a window.

    Example:
        >>> windows = ecg_windows([synthetic_ecg(60, abnormal=0.2)], 512)
        >>> windows.signals.shape, windows.masks.shape
        (torch.Size([21, 1, 512]), torch.Size([21, 512]))
    """
    check_arguments(ecg_windows, locals())
    check_positive_int("length", length)
    step = length if stride is None else check_positive_int("stride", stride)
    found = [
        _window(record, start, length)
        for record in records
        for start in range(0, len(record.signal) - length + 1, step)
        if int(((record.r_peaks >= start) & (record.r_peaks < start + length)).sum()) > 1
    ]
    if not found:
        raise ValueError(f"`length` must leave a window with two beats in one of {len(records)} records, got {length}")
    signals, labels, masks = zip(*found, strict=True)
    return ECGWindows(torch.stack(signals)[:, None], torch.tensor(labels), torch.stack(masks))


def read_ecg(path: str | Path) -> ECGRecord:
    """Read the first lead of a record, with premature ventricular beats as class 1.

    Args:
        path: An ``.npz`` file with ``ecg`` (integers, 200 per millivolt, 360 per second), ``r_peaks`` of all beats and
            ``pvc`` of the ventricular ones; or a WFDB record, by its header ``.hea`` or without extension, with its
            annotations ``.atr`` next to it.

    Returns:
        The record.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an array is missing.
        ImportError: If it is a WFDB record and the package wfdb is missing.

    Example:
        >>> read_ecg("nowhere.npz")
        Traceback (most recent call last):
            ...
        FileNotFoundError: `path`: no record at nowhere.npz; give an `.npz` file, or a WFDB record by its `.hea` file
    """
    check_arguments(read_ecg, locals())
    place = Path(path)
    if not place.name:
        raise ValueError(f"`path` must name a record, got {str(path)!r}")
    if place.suffix == ".npz" and place.exists():
        return _read_npz(place)
    header = place.with_suffix(".hea")
    if place.suffix not in {"", ".hea"} or not header.exists():
        raise FileNotFoundError(
            f"`path`: no record at {path}; give an `.npz` file, or a WFDB record by its `.hea` file"
        )
    return _read_wfdb(header.with_suffix(""))


def read_ecg_folder(folder: str | Path, names: Sequence[str] | None = None) -> list[ECGRecord]:
    """Read the records of a folder.

    Args:
        folder: Folder with ``<name>.npz`` or ``<name>.hea`` files.
        names: Names of the records; by default all, in alphabetical order.

    Returns:
        The records.

    Raises:
        FileNotFoundError: If the folder has none, or not one of ``names``.

    Example:
        >>> read_ecg_folder("nowhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: `folder`: no records (`.npz` or `.hea`) in nowhere
    """
    check_arguments(read_ecg_folder, locals())
    place = Path(folder)
    known = {path.stem: path for pattern in ("*.hea", "*.npz") for path in sorted(place.glob(pattern))}
    if not known:
        raise FileNotFoundError(f"`folder`: no records (`.npz` or `.hea`) in {folder}")
    if missing := [name for name in names or () if name not in known]:
        raise FileNotFoundError(f"`names`: no record {missing[0]!r} in {folder}; it has {', '.join(sorted(known))}")
    return [read_ecg(known[name]) for name in (sorted(known) if names is None else names)]


def _beat(time: Tensor, kind: str) -> Tensor:
    whole = kind == "ventricular"
    total = torch.zeros_like(time)
    for number, (offset, height, width) in enumerate(_WAVES):
        if number == 0 and (whole or kind == "premature"):
            continue
        if number in {1, 2, 3} and (whole or kind == "wide"):
            offset, width = 3 * offset, 3 * width
        if number == 4 and (whole or kind == "inverted"):
            height = -height
        total += height * torch.exp(-0.5 * ((time - offset) / width) ** 2)
    return total


def _window(record: ECGRecord, start: int, length: int) -> tuple[Tensor, int, Tensor]:
    inside = (record.r_peaks >= start) & (record.r_peaks < start + length)
    labels = record.labels[inside]
    strange = labels[labels > 0]
    label = int(strange.mode().values) if len(strange) else 0
    spans = beat_spans(record.r_peaks[inside] - start, labels, length)
    piece = record.signal[start : start + length]
    spread = piece.std().clamp_min(1e-6)
    return (piece - piece.mean()) / spread, label, spans_to_mask(spans[label], length)


def _read_npz(path: Path) -> ECGRecord:
    import numpy as np  # comes with torchmetrics

    with np.load(path, allow_pickle=False) as arrays:
        if missing := [name for name in ("ecg", "r_peaks", "pvc") if name not in arrays]:
            raise ValueError(f"{path.name} must have the arrays ecg, r_peaks and pvc, got none called {missing[0]!r}")
        signal = torch.from_numpy(arrays["ecg"].astype("float32")) / 200
        peaks, pvc = (torch.from_numpy(arrays[name].astype("int64")) for name in ("r_peaks", "pvc"))
    return _record(signal, peaks, torch.isin(peaks, pvc).long(), 360.0, path.stem)


def _read_wfdb(path: Path) -> ECGRecord:
    try:
        import wfdb
    except ImportError as error:
        raise ImportError("WFDB records need the package wfdb; run `pip install wfdb`") from error
    record, notes = wfdb.rdrecord(str(path), channels=[0]), wfdb.rdann(str(path), "atr")
    beats = [(int(at), symbol) for at, symbol in zip(notes.sample, notes.symbol, strict=True) if symbol in _BEATS]
    peaks = torch.tensor([at for at, _ in beats])
    labels = torch.tensor([int(symbol == "V") for _, symbol in beats])
    signal = torch.from_numpy(record.p_signal[:, 0].astype("float32"))
    return _record(signal, peaks, labels, float(record.fs), path.name)


def _record(signal: Tensor, peaks: Tensor, labels: Tensor, rate: float, name: str) -> ECGRecord:
    order = peaks.argsort()
    peaks, labels = peaks[order], labels[order]
    kept = (peaks >= 0) & (peaks < len(signal)) & (peaks.diff(prepend=peaks.new_full((1,), -1)) > 0)
    return ECGRecord(signal, peaks[kept], labels[kept], rate, name)
