"""What becomes of tests that need an accelerator where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # there may be a build for one


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("required", [None, "", "0"])
def test_they_are_skipped_and_the_reason_says_how_to_insist(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, required: str | None
) -> None:
    monkeypatch.setenv("REQUIRE_GPU", required) if required is not None else monkeypatch.delenv("REQUIRE_GPU", False)
    with pytest.raises(pytest.skip.Exception) as caught:
        request.getfixturevalue("accelerator")
    assert str(caught.value) == "torch finds no accelerator here; with REQUIRE_GPU=1 that is a failure"


@pytest.mark.usefixtures("no_accelerator")
def test_they_fail_where_one_is_required(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUIRE_GPU", "1")
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as caught:  # or a skip would skip this test
        request.getfixturevalue("accelerator")
    assert caught.type is pytest.fail.Exception
    assert str(caught.value) == "REQUIRE_GPU=1 says that there is an accelerator, but torch finds none"


def test_where_there_is_one_they_are_given_it(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setenv("REQUIRE_GPU", "1")
    assert request.getfixturevalue("accelerator") == torch.device("xpu", 3)
