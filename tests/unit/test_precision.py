"""The one place that asks what the hardware computes."""

import pytest
import torch

from decodiff_anomalib.precision import check_precision, computes_bfloat16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "avx2": True}, False),
        ({"avx2": True}, False),
        ({}, False),
    ],
)
def test_cpus_need_the_instructions(monkeypatch: pytest.MonkeyPatch, capabilities: dict, expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_bfloat16("cpu") is expected
    assert computes_bfloat16(torch.device("cpu")) is expected


def test_gpus_must_not_emulate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or True)
    assert computes_bfloat16("cuda:1")
    assert asked == [{"including_emulation": False}]


def test_other_devices_compute_in_float32() -> None:
    assert not computes_bfloat16("mps")


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_precisions_that_round_statistics_are_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=rf"trainer.precision={precision} .* Use bf16-mixed"):
        check_precision(precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_precisions_that_keep_statistics_are_served(precision: str) -> None:
    check_precision(precision)
