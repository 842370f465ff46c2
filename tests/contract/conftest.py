"""Every contract holds on either transport."""

import pytest

from extproc.transport import TRANSPORTS


@pytest.fixture(autouse=True, params=list(TRANSPORTS))
def transport(request, monkeypatch):
    """Its name; what the configuration takes by default is this one."""
    monkeypatch.setitem(TRANSPORTS, "lean", TRANSPORTS[request.param])
    return request.param
