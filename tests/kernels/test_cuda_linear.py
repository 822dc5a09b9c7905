"""Tuned matrix products: which plan serves how many rows, what is refused; on a GPU, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from cuda_cases import EPSILON, emulated_path, why_no_gpu
from torch import Tensor

from neo.runtime import cuda_library as c
from neo.runtime import cuda_linear
from neo.runtime.cuda_linear import ROW_SIZES, Choice, Plan, Products, Size, padded_rows

BF16 = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- sizes ------------------------------------------------------------------------------------------------


def test_rows_are_padded_to_the_next_size() -> None:
    for count in range(4097):
        padded = padded_rows(count)
        assert padded == min((n for n in ROW_SIZES if n >= count), default=count)


class FakePlan:
    """Notes what it is asked for; multiplies on the CPU."""

    made: ClassVar[list[FakePlan]] = []
    refuses: frozenset[int] = frozenset()
    none_here = False

    def __init__(self, size: Size, workspace: Tensor, like: FakePlan | None = None, search: int = 1) -> None:
        if self.none_here or (like is not None and size.rows in self.refuses):
            raise c.CudaKernelError("no cuBLASLt")
        self.size, self.like, self.calls, self.weights = size, like, 0, 0
        self.made.append(self)

    def tune(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor) -> Choice:
        assert x.shape == (self.size.rows, self.size.in_)
        assert out.shape == (self.size.rows, self.size.out)
        assert (bias is not None) == self.size.bias
        self.weights = len(weights)
        return Choice(3, 1, 66, 0, 0, 1, 0, 0, 1e-6, 2e-6)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        self.calls += 1
        cuda_linear.torch_product(x, weight, bias, out, self.size.add)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakePlan]:
    class Fresh(FakePlan):
        made: ClassVar[list[FakePlan]] = []

    monkeypatch.setattr(cuda_linear, "Plan", Fresh)
    monkeypatch.setattr(cuda_linear, "tunable", lambda weight: weight.dtype is not torch.float32)
    return Fresh


def layers(out: int, width: int, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    return [
        (normal(out, width, dtype=dtype, seed=i), normal(out, dtype=dtype, seed=i) if bias else None)
        for i in range(3)
    ]


def multiply(products: Products, rows: int, family: list[Any], add: bool = False) -> None:
    weight, bias = family[-1]
    x = normal(rows, weight.shape[1], dtype=weight.dtype)
    out = torch.full((rows, len(weight)), 3.0 if add else float("nan"), dtype=weight.dtype)
    products(x, weight, bias, out, add)
    exact = x.double() @ weight.double().t() + (3.0 if add else 0.0)
    if bias is not None:
        exact += bias.double()
    assert ((out.double() - exact).abs() <= EPSILON[weight.dtype] * exact.abs() + 1e-3).all()


def test_a_size_is_tuned_once_for_each_shape_with_all_its_layers(fake: type[FakePlan]) -> None:
    families = [layers(24, 16), layers(16, 24, bias=True), layers(24, 16)]
    products = Products(families)
    products.prepare(7)
    products.prepare(8)
    tuned = [plan for plan in fake.made if plan.like is None]
    assert [plan.size for plan in tuned] == [Size(8, 24, 16, BF16, False), Size(8, 16, 24, BF16, True)]
    assert all(plan.weights == 3 for plan in tuned)
    assert set(products.choices) == {plan.size for plan in tuned}
    # What a capture will need is there already.
    assert {plan.size.rows for plan in fake.made if plan.like is not None} == {7}


def test_rows_between_sizes_take_the_larger_ones_kernel(fake: type[FakePlan]) -> None:
    family = layers(24, 16)
    products = Products([family])
    products.prepare(16)
    for rows in (16, 13, 13, 16):
        multiply(products, rows, family)
    tuned, between = fake.made
    assert (tuned.size.rows, tuned.calls) == (16, 2)
    assert (between.size.rows, between.calls, between.like) == (13, 2, tuned)


def test_torch_multiplies_what_has_no_plan(fake: type[FakePlan]) -> None:
    family, exact, other = layers(24, 16), layers(24, 16, dtype=torch.float32), layers(32, 16)
    products = Products([family, exact], most_rows=16)
    fake.refuses = frozenset({11})
    products.prepare(12)
    products.prepare(24)  # too many
    assert [plan.size.rows for plan in fake.made] == [12]
    for rows, of in ((24, family), (17, family), (3, family), (11, family), (12, exact), (12, other)):
        multiply(products, rows, of)
    assert not fake.made[0].calls
    x = normal(16, 12).t()  # not contiguous
    products(x, family[0][0], None, torch.empty(12, 24, dtype=torch.bfloat16))
    assert not fake.made[0].calls


def test_rows_tuned_later_are_taken_then(fake: type[FakePlan]) -> None:
    family = layers(24, 16)
    products = Products([family])
    multiply(products, 5, family)
    products.prepare(5)
    multiply(products, 5, family)
    assert [plan.size.rows for plan in fake.made] == [8, 5]
    assert fake.made[1].calls == 1


def test_plans_made_before_can_be_turned_off(fake: type[FakePlan]) -> None:
    family = layers(24, 16)
    products = Products([family])
    products.prepare(8)
    products.prepare(3)
    products.most_rows = 4
    for rows in (8, 3):
        multiply(products, rows, family)
    assert {plan.size.rows: plan.calls for plan in fake.made} == {8: 0, 4: 0, 3: 1}
    products.most_rows = 0
    multiply(products, 3, family)
    assert {plan.size.rows: plan.calls for plan in fake.made} == {8: 0, 4: 0, 3: 1}


def test_families_that_add_are_tuned_so_with_few_rows(fake: type[FakePlan]) -> None:
    plain, adding = layers(24, 16), layers(16, 24)
    products = Products([plain, adding], adding=(1,), most_added=8)
    products.prepare(7)
    products.prepare(12)
    tuned = [plan.size for plan in fake.made if plan.like is None]
    assert tuned == [
        Size(8, 24, 16, BF16, False), Size(8, 16, 24, BF16, False, True),
        Size(12, 24, 16, BF16, False), Size(12, 16, 24, BF16, False),
    ]  # fmt: skip
    for rows in (7, 8, 3):
        multiply(products, rows, plain)
        multiply(products, rows, adding, add=True)
    multiply(products, 12, adding)
    calls = [(plan.size.rows, plan.size.add) for plan in fake.made for _ in range(plan.calls)]
    assert sorted(calls) == [(7, False), (7, True), (8, False), (8, True), (12, False)]  # 3 is torch's


def test_without_cublaslt_everything_is_torchs(fake: type[FakePlan]) -> None:
    family = layers(24, 16)
    products = Products([family])
    fake.none_here = True
    products.prepare(8)
    products.prepare(4)
    assert products.why_not == "no cuBLASLt"
    for rows in (8, 4, 3):
        multiply(products, rows, family)


def test_weights_on_the_cpu_and_fp32_are_not_tuned() -> None:
    family = layers(24, 16, bias=True)
    products = Products([family, layers(8, 8, dtype=torch.float32)])
    products.prepare(8)
    assert not products.choices
    multiply(products, 8, family)


# -- the library ------------------------------------------------------------------------------------------


@pytest.fixture(params=["real", "emulated"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Either; arguments are refused before a device is looked for."""
    if request.param == "emulated":
        if not emulated_path().is_file():
            pytest.skip("the emulated CUDA kernels are not built here (make kernels)")
        monkeypatch.setenv(c.LIBRARY_VARIABLE, str(emulated_path()))
    try:
        return c.load()
    except c.CudaKernelsMissingError as error:
        pytest.skip(str(error))


def shape(**fields: Any) -> c.LinearShape:
    good: dict[str, Any] = {
        "x_stride": 64, "weight_stride": 64, "out_stride": 128, "rows": 2, "in_": 64, "out": 128, "dtype": 2,
    }  # fmt: skip
    return c.LinearShape(**good | fields)


REFUSED = [
    ({"size": 3}, "shape has size 3"),
    ({"dtype": 0}, "dtype is 0, must be 1"),
    ({"dtype": 3}, "dtype is 3"),
    ({"rows": 0}, "rows is 0"),
    ({"in_": 60}, "in is 60"),
    ({"out": 0}, "out is 0"),
    ({"search": 3}, "search is 3"),
    ({"x_stride": 56}, "x_stride is 56, must be a multiple of 8, at least 64"),
    ({"weight_stride": 65}, "weight_stride is 65"),
    ({"out_stride": 64}, "out_stride is 64, must be a multiple of 8, at least 128"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_bad_shapes_are_refused(library: ctypes.CDLL, fields: dict[str, Any], said: str) -> None:
    plan = ctypes.c_void_p(1)
    with pytest.raises(ValueError, match=said):
        c.check(library.neo_cuda_linear_create(shape(**fields), plan))
    assert plan.value is None


def test_null_plans_are_refused(library: ctypes.CDLL) -> None:
    for call in (
        lambda: library.neo_cuda_linear_create(shape(), None),
        lambda: library.neo_cuda_linear_tune(c.LinearTrial()),
        lambda: library.neo_cuda_linear_describe(None, c.LinearChoice()),
        lambda: library.neo_cuda_linear(c.Linear(), None),
    ):
        with pytest.raises(ValueError, match="plan must not be NULL"):
            c.check(call())
    library.neo_cuda_linear_destroy(None)


def test_no_plan_without_a_device(library: ctypes.CDLL) -> None:
    if not why_no_gpu() and "emulated" not in str(c.library_path()):
        pytest.skip("there is a GPU")
    plan = ctypes.c_void_p(1)
    with pytest.raises(c.CudaKernelError):
        c.check(library.neo_cuda_linear_create(shape(), plan))
    assert plan.value is None


# -- on a GPU ---------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(bool(why_no_gpu()), reason=why_no_gpu() or "-")
SIZES = [(1, 64, 64), (2, 4096, 4096), (7, 1024, 512), (16, 6144, 4096), (33, 256, 14336), (64, 4096, 1000)]
SIZES += [(64, 28672, 4096), (100, 512, 11008), (256, 4096, 4096)]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "out", "width"), SIZES)
def test_against_float64(rows: int, out: int, width: int, bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda", dtype=dtype)

    family = [(random(out, width), random(out) if bias else None) for _ in range(2)]
    products = Products([family])
    products.prepare(rows)
    assert not products.why_not
    (choice,) = products.choices.values()
    assert choice.candidates >= 1
    assert 0 < choice.seconds <= choice.first_seconds
    x, (weight, added) = random(rows, width), family[1]
    behind = torch.full((rows + 1, out), float("nan"), dtype=dtype, device="cuda")
    got, again = behind[:rows], torch.empty(rows, out, dtype=dtype, device="cuda")
    products(x, weight, added, got)
    products(x, weight, added, again)
    torch.cuda.synchronize()
    assert torch.equal(got, again)
    assert behind[rows:].isnan().all()
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    if added is not None:
        exact, size = exact + added.double(), size + added.double().abs()
    # One rounding to the type; sums in fp32 of terms this large, in whatever order.
    bound = 1.01 * EPSILON[dtype] * exact.abs() + 16 * EPSILON[torch.float32] * size + 2.0**-24
    assert ((got.double() - exact).abs() <= bound).all()


@needs_gpu
@pytest.mark.parametrize(("rows", "out", "width"), SIZES)
def test_added_to_what_is_there(rows: int, out: int, width: int) -> None:
    """In place; some of cuBLASLt's kernels round the product before they add."""
    family = [(normal(out, width, seed=i).cuda(), None) for i in range(2)]
    products = Products([family], adding=(0,), most_added=1024)
    products.prepare(rows)
    assert not products.why_not
    x, weight, before = normal(rows, width, seed=3).cuda(), family[1][0], normal(rows, out, seed=4).cuda() * 9
    got, again = before.clone(), before.clone()
    products(x, weight, None, got, add=True)
    products(x, weight, None, again, add=True)
    torch.cuda.synchronize()
    assert torch.equal(got, again)
    product = x.double() @ weight.double().t()
    exact = product + before.double()
    size = x.double().abs() @ weight.double().abs().t() + before.double().abs()
    rounded = EPSILON[BF16] * (exact.abs() + product.abs())
    bound = 1.01 * rounded + 16 * EPSILON[torch.float32] * size + 2.0**-24
    assert ((got.double() - exact).abs() <= bound).all()


@needs_gpu
def test_it_can_be_captured() -> None:
    family = [(normal(512, 256, seed=i).cuda(), normal(512, seed=i).cuda()) for i in range(2)]
    products = Products([family])
    products.prepare(12)
    x, out = torch.zeros(11, 256, dtype=torch.bfloat16, device="cuda"), torch.zeros(11, 512).bfloat16().cuda()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        products(x, *family[0], out)
    x.normal_()
    graph.replay()
    eager = torch.empty_like(out)
    products(x, *family[0], eager)
    torch.cuda.synchronize()
    assert torch.equal(out, eager)


@needs_gpu
def test_plans_of_other_sizes_are_refused() -> None:
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    plan = Plan(Size(8, 64, 64, torch.float16, False), workspace)
    with pytest.raises(ValueError, match="like: its plan is of 64 x 64"):
        Plan(Size(4, 128, 64, torch.float16, False), workspace, like=plan)
    x = torch.zeros(8, 64, dtype=torch.float16, device="cuda")
    with pytest.raises(ValueError, match="bias must be NULL"):
        plan(x, x, x, x)
