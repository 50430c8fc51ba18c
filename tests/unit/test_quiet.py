"""Which messages are left out, and for how long."""

import logging
import sys
import warnings
from collections.abc import Iterator

import pytest

from decodiff_anomalib import quiet
from decodiff_anomalib.quiet import OF_DEMO_TEXTURES, OF_RUNS, begin, end, quiet_imports

EVAL_MODE = "Found 268 module(s) in eval mode at the start of training. This may lead to unexpected behavior"
FIT_LOOP = "lightning.pytorch.loops.fit_loop"
TEXTURES = "The 'train_dataloader' does not have many workers which may be a bottleneck."
CONNECTOR = "lightning.pytorch.trainer.connectors.data_connector"


@pytest.fixture(autouse=True)
def filters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of a fresh Python, of which no user has asked for warnings."""
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield
        end()


def is_shown(message: str, module: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        shown: list[object] = []
        patch.setattr(warnings, "showwarning", lambda *arguments: shown.append(arguments))
        warnings.warn_explicit(message, UserWarning, "file.py", 1, module)
    return bool(shown)


def test_a_message_is_left_out_until_the_end() -> None:
    assert is_shown(EVAL_MODE, FIT_LOOP)
    begin()
    begin()
    assert not is_shown(EVAL_MODE, FIT_LOOP)
    end()
    assert is_shown(EVAL_MODE, FIT_LOOP)


def test_other_messages_and_other_modules_stay() -> None:
    begin(OF_RUNS + OF_DEMO_TEXTURES)
    assert is_shown("The loss is not finite.", FIT_LOOP)
    assert is_shown(EVAL_MODE, "project.training")


def test_missing_callbacks_are_named_unless_they_are_ours() -> None:
    begin()
    message = "Be aware that when using `ckpt_path`, callbacks … Please add the following callbacks: {}."
    assert not is_shown(message.format(["WeightAveraging"]), "lightning.pytorch.trainer.call")
    assert is_shown(message.format(["WeightAveraging", "EarlyStopping"]), "lightning.pytorch.trainer.call")


def test_loaders_without_workers_are_left_out_only_where_they_are_ours() -> None:
    begin()
    assert is_shown(TEXTURES, CONNECTOR)
    begin(OF_RUNS + OF_DEMO_TEXTURES)
    assert not is_shown(TEXTURES, CONNECTOR)
    end()
    assert is_shown(TEXTURES, CONNECTOR)


def test_filters_that_others_add_meanwhile_stay() -> None:
    with quiet_imports():
        assert not is_shown("Importing from timm.models.layers is deprecated, please …", "timm.models.layers")
        warnings.filterwarnings("ignore", "theirs")
    assert is_shown("Importing from timm.models.layers is deprecated, please …", "timm.models.layers")
    assert not is_shown("theirs", FIT_LOOP)


def test_users_who_ask_python_for_warnings_see_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    begin()
    assert is_shown(EVAL_MODE, FIT_LOOP)


@pytest.mark.parametrize("package", ["lightning.pytorch", "lightning_fabric"])
def test_records_are_left_out_until_the_end(package: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(f"{package}.utilities.rank_zero")
    with caplog.at_level(logging.INFO):
        begin()
        logger.info("💡 Tip: try another product")
        logger.info("`Trainer.fit` stopped: `max_steps=20` reached.")
        end()
        logger.info("💡 Tip: try yet another")
    assert [record.getMessage()[:8] for record in caplog.records] == ["`Trainer", "💡 Tip: t"[:8]]


def test_each_notice_has_a_reason() -> None:
    reasons = [notice.reason for notice in quiet.OF_IMPORTS + OF_RUNS + OF_DEMO_TEXTURES]
    assert all(reason.endswith(".") for reason in (*reasons, *quiet.RECORDS.values()))
