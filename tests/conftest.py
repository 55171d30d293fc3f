"""What all tests share: no network, one thread for torch, the same random numbers every time."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.request import Request, urlopen

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ["RAY_TQDM_PATCH_PRINT"] = "0"  # or it puts a function of its own in the place of `print`, for all tests

import pytest
import torch
from models import BatchNormNet, BlockStack
from ranks import Ranks
from s3_server import Bucket, reached, serving, serving_moto
from torch import nn
from torch.nn.modules import module as torch_module

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off for jobs in the background

collect_ignore = ["typing", "noxfile.py"]  # for mypy and nox alone
GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
pytest_plugins = ["activation_extractor.pytest_plugin", "pytester"]


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test that fails can be run again, and a model whose weights make it fail is not met once in twenty runs."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_hook_is_left_on_every_module():
    """A hook of `torch.nn.modules.module` would be on all models of the tests that follow."""
    yield
    left = {name: [*value] for name, value in vars(torch_module).items() if name in GLOBAL_HOOKS and value}
    for name in left:
        vars(torch_module)[name].clear()
    assert not left


@pytest.fixture
def cnn() -> nn.Module:
    torch.manual_seed(0)
    return BatchNormNet().eval()


@pytest.fixture
def stack() -> nn.Module:
    torch.manual_seed(0)
    return BlockStack().eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 50, (2, 5))


@pytest.fixture
def accelerator() -> torch.device:
    """This machine's accelerator, for tests marked `gpu`; without one they are skipped, or fail under REQUIRE_GPU=1."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        return torch.device(kind, torch.accelerator.current_device_index())
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail("REQUIRE_GPU=1 says that there is an accelerator, but torch finds none", pytrace=False)
    pytest.skip("torch finds no accelerator here; with REQUIRE_GPU=1 that is a failure")


@pytest.fixture(scope="session")
def ranks():
    """Two processes in one process group, that call the functions that a test hands to them."""
    processes = Ranks()
    yield processes
    processes.stop()


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The sizes of what is read from files rather than mapped."""
    sizes: list[int] = []

    def preadv(descriptor, buffers, position):
        sizes.append(sum(map(len, buffers)))
        return real(descriptor, buffers, position)

    real = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    return sizes


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """The bucket ``s3://bucket`` of the tests' own server, which fails when it is asked to."""
    with serving() as (bucket, url), reached(url):
        yield bucket


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """The URL of moto's server."""
    if find_spec("moto") is None or find_spec("flask_cors") is None:
        pytest.skip("moto, or its server, is not installed")
    with serving_moto() as url:
        yield url


@pytest.fixture
def moto_bucket(moto_server) -> Iterator[str]:
    """The URL, ``s3://...``, of a new bucket of moto's server."""
    name = f"bucket-{uuid.uuid4().hex}"
    urlopen(Request(f"{moto_server}/{name}", method="PUT")).close()
    with reached(moto_server):
        yield f"s3://{name}"
