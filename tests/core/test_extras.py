"""What optional packages log when they are imported."""

import logging

import pytest

from castalia.core.extras import NOTICES_OF_TORCHAO, quiet_torchao


def test_notices_about_kernels_of_torchao_are_left_out_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("torchao")
    own = logging.getLogger("torch.utils._pytree")
    caplog.set_level(logging.WARNING)
    with quiet_torchao():
        logger.warning("Failed to load _C.so: Could not load this library")
        own.warning("<enum 'KernelPreference'> is an Enum subclass and is now supported")
        logger.warning("this version of torch is too old")
        own.warning("a leaf of another kind")
        logging.getLogger("castalia").warning("Failed to load the page")
    assert [record.message for record in caplog.records] == [
        "this version of torch is too old",
        "a leaf of another kind",
        "Failed to load the page",
    ]
    caplog.clear()
    for name, notice in NOTICES_OF_TORCHAO.items():
        logging.getLogger(name).warning("%s x", notice)
    assert len(caplog.records) == len(NOTICES_OF_TORCHAO)
