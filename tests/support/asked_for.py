"""What a fixture that makes things for many tests at once is asked for, so that it makes nothing else."""

from __future__ import annotations

from typing import Any

import pytest


def asked_for(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter in those selected tests that use the fixture of this request; each once, in order.

    Args:
        request (`pytest.FixtureRequest`): That of the fixture.
        parameter (`str`): The parameter, or the fixture with `params`, by name.
    """
    found: list[Any] = []
    for item in request.session.items:
        if request.fixturename not in getattr(item, "fixturenames", ()) or not hasattr(item, "callspec"):
            continue
        value = item.callspec.params.get(parameter)
        if value is not None and value not in found:
            found.append(value)
    return found
