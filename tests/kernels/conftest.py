import pytest

from tokenzoo.kernels import _native


@pytest.fixture(params=["native", "fallback"])
def lane(request, monkeypatch):
    """Runs a test on the compiled kernels and on the PyTorch fallback."""
    if request.param == "fallback":
        monkeypatch.setattr(_native, "library", lambda: None)
    elif _native.library() is None:
        pytest.skip(_native.status())
    return request.param
