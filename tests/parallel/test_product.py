"""Matrix products by the library that is chosen for them: right for every stride, and so the layers made of them."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from tests.parallel.comparison import drawn, load_full, part, tensor_mesh
from tests.pool import Pool
from weft.parallel import ColumnParallelLinear, RowParallelLinear, gather_full, linear_cross_entropy, shardings
from weft.parallel.product import SMALLEST_FOR_ONEDNN, add_product, is_by_onednn, product

WIDE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
ROWS, IN, OUT = 256, 160, 288


def check(result: Tensor, exact: Tensor) -> None:
    """Within the rounding of sums in float32 of this length."""
    error = (result.double() - exact).abs().max() / exact.abs().max()
    assert error <= 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("leading", [(ROWS,), (2, ROWS // 2)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_product_is_exact_to_rounding(leading: tuple[int, ...], strided: bool) -> None:
    x, weight = drawn(*leading, IN, dtype=torch.float32), drawn(OUT, IN, seed=1, dtype=torch.float32)
    bias, total = drawn(OUT, seed=2, dtype=torch.float32), drawn(ROWS, OUT, seed=3, dtype=torch.float32)
    if strided:
        x, weight = x.mT.contiguous().mT, weight.mT.contiguous().mT
    exact = x.double() @ weight.double().mT
    check(product(x, weight), exact)
    check(product(x, weight, bias), exact + bias)
    summed = exact.view(ROWS, OUT) + total
    turned = total.t().contiguous()
    add_product(total, x.reshape(ROWS, IN), weight.t())
    check(total, summed)
    add_product(turned, weight, x.reshape(ROWS, IN).t())
    check(turned, summed.t())


@pytest.mark.skipif(not WIDE, reason="this processor has no AVX-512")
@pytest.mark.filterwarnings("ignore:TF32")
def test_onednn_is_for_large_products_in_float32_and_can_be_switched_off() -> None:
    weight = torch.zeros(64, 64)
    large, small = torch.zeros(SMALLEST_FOR_ONEDNN // 64**2, 64), torch.zeros(8, 64)
    assert is_by_onednn(large, weight)
    assert not is_by_onednn(small, weight)
    assert not is_by_onednn(large.double(), weight.double())
    assert not is_by_onednn(large.to("meta"), weight.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_by_onednn(large, weight)


@pytest.mark.skipif(not WIDE, reason="this processor has no AVX-512")
def test_every_large_product_of_a_layer_takes_the_quicker_library(pool: Pool) -> None:
    assert pool.run(1, products_of_a_step) == [("mkldnn::_linear_pointwise", 6)]


def products_of_a_step() -> tuple[str, int]:
    mesh = tensor_mesh()
    layers = nn.Sequential(ColumnParallelLinear(IN, OUT, mesh=mesh), RowParallelLinear(OUT, IN, mesh=mesh))
    with profile() as seen:
        layers(torch.randn(ROWS, IN, requires_grad=True)).sum().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    assert not {"aten::mm", "aten::addmm", "aten::addmm_"} & counts.keys()
    return "mkldnn::_linear_pointwise", counts["mkldnn::_linear_pointwise"]


MANY_SHAPES = """
import ctypes, psutil, torch
from weft.parallel.product import product
weight, memory = torch.randn(688, 256), psutil.Process().memory_info
product(torch.randn(2048, 256), weight)
before = memory().rss
for rows in range(100, 1300):
    product(torch.randn(rows, 256), weight)
ctypes.CDLL(None).malloc_trim(0)  # what the allocator of C still has is no longer kept by anyone
print((memory().rss - before) / 2**20)
"""


@pytest.mark.skipif(not WIDE, reason="this processor has no AVX-512")
def test_products_of_many_shapes_keep_little() -> None:
    ran = subprocess.run([sys.executable, "-c", MANY_SHAPES], check=True, capture_output=True, text=True)
    assert float(ran.stdout) < 150, "MiB; it is 450 when all shapes are kept"


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_large_layers_in_float32_equal_plain_ones_in_float64(pool: Pool, ranks: int, sequence_parallel: bool) -> None:
    pool.run(ranks, compare_with_plain, sequence_parallel)


def compare_with_plain(sequence_parallel: bool) -> None:
    mesh = tensor_mesh()
    x, head, targets = drawn(2, ROWS, IN), drawn(512, IN, seed=1) / 8, torch.arange(2 * ROWS).view(2, ROWS)
    plain = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, IN)).double()
    exact = [x.clone().requires_grad_(), head.clone().requires_grad_()]
    logits = plain(exact[0]) @ exact[1].mT
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    options: dict[str, Any] = {"mesh": mesh, "sequence_parallel": sequence_parallel}
    layers = nn.Sequential(ColumnParallelLinear(IN, OUT, **options), RowParallelLinear(OUT, IN, **options))
    load_full(layers, plain.state_dict())
    mine = [part(x.float(), mesh, 1, wanted=sequence_parallel), part(head.float(), mesh, 0)]
    mine = [tensor.requires_grad_() for tensor in mine]
    linear_cross_entropy(layers(mine[0]), mine[1], targets, chunk=ROWS, **options).backward()

    declared = shardings(layers)
    for name, parameter in layers.named_parameters():
        check(gather_full(gradient(parameter), declared[name]), gradient(plain.get_parameter(name)))
    check(gradient(mine[0]), part(gradient(exact[0]), mesh, 1, wanted=sequence_parallel))
    check(gradient(mine[1]), part(gradient(exact[1]), mesh, 0))


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
