"""launch(): the short way to a compiled kernel gives what the ordinary one gives, whatever the arguments."""

from typing import Any

import pytest
import torch
from sloth_kernels import _library
from sloth_kernels._library import Launcher, launch, tl, triton


@triton.jit
def _scale_kernel(x_ptr, y_ptr, missing_ptr, n, by, NEGATE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32) * by
    tl.store(y_ptr + at, (-x if NEGATE else x).to(y_ptr.dtype.element_ty), mask=at < n)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, empty in (("_COMPILED", {}), ("_SHORT_WAY", set()), ("_NO_SHORT_WAY", set())):
        monkeypatch.setattr(_library, name, empty)


def scaled(x: torch.Tensor, by: float, negate: bool) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    grid = (-(-x.numel() // 64),)
    launch(_scale_kernel, grid, x, y, None, x.numel(), by, NEGATE=negate, BLOCK=64, num_warps=2)
    return y


def expected(x: torch.Tensor, by: float, negate: bool) -> torch.Tensor:
    return (x.float() * by * (-1 if negate else 1)).to(x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_specialization_is_right(dtype: torch.dtype) -> None:
    for _ in range(2):  # the first round compiles, the second takes the short way
        for size, skip, by, negate in [
            (1, 0, 2.0, False),
            (16, 0, 2.0, False),
            (17, 0, 1.0, False),
            (4096, 0, 3.0, True),
            (4096, 1, 3.0, True),  # not aligned to 16 bytes
            (4097, 8, 3.0, False),
        ]:
            x = torch.randn(size + skip, device="cuda", dtype=dtype)[skip:]
            assert torch.equal(scaled(x, by, negate), expected(x, by, negate)), (size, skip, by, negate)
    assert len(_library._COMPILED) == 6 and len(_library._SHORT_WAY) == 1 and not _library._NO_SHORT_WAY


@pytest.mark.gpu
def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, device="cuda")
    scaled(x, 2.0, False)

    def ordinary(*_: Any, **__: Any) -> None:
        raise AssertionError("bound again")

    monkeypatch.setattr(type(_scale_kernel), "run", ordinary)
    assert torch.equal(scaled(x, 2.0, False), expected(x, 2.0, False))


@pytest.mark.gpu
def test_another_interface_of_triton_keeps_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, device="cuda")
    monkeypatch.setattr(_library, "_prove_short_way", lambda *_: 1 / 0)
    for _ in range(2):
        assert torch.equal(scaled(x, 2.0, True), expected(x, 2.0, True))
    assert not _library._COMPILED and len(_library._NO_SHORT_WAY) == 1


@pytest.mark.gpu
def test_a_short_way_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, device="cuda")
    monkeypatch.setattr(_library.torch, "equal", lambda *_: False)
    y = scaled(x, 2.0, True)
    monkeypatch.undo()
    assert torch.equal(y, expected(x, 2.0, True))


@pytest.mark.gpu
def test_under_cuda_graph_capture() -> None:
    x = torch.randn(100, device="cuda")
    scaled(x, 2.0, False)
    _library._SHORT_WAY.clear()
    _library._COMPILED.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scaled(x, 2.0, False)  # no proof here: it would synchronise
    graph.replay()
    assert torch.equal(y, expected(x, 2.0, False))


@pytest.mark.gpu
def test_a_launcher_knows_scalars_by_type_and_finds_its_device() -> None:
    launcher = Launcher(_scale_kernel, NEGATE=True, BLOCK=64, num_warps=2)
    x = torch.randn(100, device="cuda")
    for _ in range(2):
        for by in (2, 2.0, 1, 1.0, 0.5):
            y = torch.full_like(x, float("nan"))
            launcher((2, 1, 1), (x, y, None), (100, by))
            assert torch.equal(y, expected(x, by, True)), by
    assert len(_library._COMPILED) == 5


def test_a_launcher_is_made_once_for_its_constants() -> None:
    made: list[tuple[Any, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: made.append((grid, args, options))

    kernel, x = Kernel(), torch.zeros(3)
    before = len(_library._LAUNCHERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "INTERPRETED", True)
        for constant in (1, True, 1, 1.0, True):
            launch(kernel, (4,), x, None, 5, CONSTANT=constant, num_warps=2)
    options = [options for _, _, options in made]
    assert [type(each["CONSTANT"]) for each in options] == [int, bool, int, float, bool]
    assert made[0] == ((4,), (x, None, 5), {"CONSTANT": 1, "num_warps": 2})
    assert len(_library._LAUNCHERS) == before + 3


def test_a_tensor_behind_a_scalar_is_refused() -> None:
    x = torch.zeros(3)
    assert _library._leading_tensors((x, None, x, 1, 2.0)) == 3
    assert _library._leading_tensors((x,)) == 1
    with pytest.raises(TypeError, match="a tensor behind a scalar"):
        launch(_scale_kernel, (1,), x, 1, x, num_warps=1)
