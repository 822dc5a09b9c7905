"""Matrix products ``x @ weight.T (+ bias)`` whose kernels were timed on this device, for few rows.

With few rows a product is little but reading its weights, and which of cuBLASLt's kernels reads them fastest
is found out by timing them (``neo_cuda_linear_tune``), once for every size that rows are padded to; numbers
of rows between two sizes take the kernel of the larger one. Everything else is torch's: fp32 (whose results
are compared exactly), many rows, layouts that a plan cannot describe, and machines without cuBLASLt.

A kernel gives the same bits every time. Which kernel is the fastest may differ from one process to the next,
and results then differ by rounding.
"""

from __future__ import annotations

import ctypes
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from neo.runtime import cuda_library as c
from neo.runtime.cuda_fold import MOST_ROWS as FOLDED_ROWS
from neo.runtime.cuda_fold import fold_norms, foldable
from neo.runtime.cuda_kernels import CODE, current_stream
from neo.runtime.weights import Weights

ROW_SIZES = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, *range(128, 513, 32), 768, 1024, 1536, 2048)
"""Rows of captured steps are padded to these. Rows of nobody cost next to nothing where weights are what is
read, up to some 200; beyond, arithmetic takes the time, and sizes lie closer."""
MOST_ROWS = 1024  # of a tuned product: with more, arithmetic takes the time, and cuBLAS chooses well
WORKSPACE = 32 << 20
_TUNED = frozenset({torch.float16, torch.bfloat16})
_READ = 256 << 20  # bytes of weights that one measurement reads: several times what an L2 holds
_MOST_LAUNCHES = 16


def padded_rows(count: int) -> int:
    """The size that so many rows are padded to; beyond the last, `count` itself."""
    return ROW_SIZES[bisect_left(ROW_SIZES, count)] if count <= ROW_SIZES[-1] else count


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found for a size; cuBLASLt's numbers for the kernel.

    Attributes:
        candidates: kernels that were timed.
        chosen: 0 for cuBLASLt's own first choice.
        seconds, first_seconds: of one product with the kernel, and with cuBLASLt's first; 0: not tuned.
    """

    candidates: int
    chosen: int
    algorithm: int
    tile: int
    stages: int
    splits: int
    cluster: int
    workspace_bytes: int
    seconds: float
    first_seconds: float


class Size(NamedTuple):
    """What a plan is made for: rows x in by out x in, the type, whether there is a bias, whether it adds."""

    rows: int
    out: int
    in_: int
    dtype: torch.dtype
    bias: bool
    add: bool = False


class Plan:
    """A kernel for one size, on the current device.

    Args:
        size: in fp16 or bf16, in and out multiples of 8. Tensors are contiguous.
        workspace: uint8 on the device, aligned to 256 bytes; one product at a time.
        like: take over this plan's kernel (of another number of rows).
        search: 0 to 2, see ``neo_cuda.h``.

    Raises:
        ValueError: the size is refused.
        CudaKernelError: no cuBLASLt here, or it has no kernel for this.
    """

    def __init__(self, size: Size, workspace: Tensor, like: Plan | None = None, search: int = 1) -> None:
        self.size = size
        shape = c.LinearShape(
            like=None if like is None else like.handle,
            x_stride=size.in_,
            weight_stride=size.in_,
            out_stride=size.out,
            workspace_bytes=workspace.numel(),
            rows=size.rows,
            in_=size.in_,
            out=size.out,
            dtype=CODE[size.dtype],
            bias=size.bias,
            add=size.add,
            search=search,
        )
        library, handle = c.load(), ctypes.c_void_p()
        c.check(library.neo_cuda_linear_create(shape, handle))
        assert handle.value is not None
        self.handle: int = handle.value
        weakref.finalize(self, library.neo_cuda_linear_destroy, handle)
        self._launch = library.neo_cuda_linear
        self._workspace = workspace
        self.args = c.Linear(
            plan=self.handle,
            workspace=workspace.data_ptr() if workspace.numel() else None,
            workspace_bytes=workspace.numel(),
        )

    def tune(self, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, out: Tensor) -> Choice:
        """Time all kernels with these operands, the weights in turn, and keep the fastest.

        The device should have nothing else to do. Waits for it; not while a graph is being captured.
        """
        by = weights[0].numel() * weights[0].element_size()
        torch.cuda.current_stream().synchronize()  # what writes the operands must have ended
        c.check(
            c.load().neo_cuda_linear_tune(
                c.LinearTrial(
                    plan=self.handle,
                    x=x.data_ptr(),
                    weights=(ctypes.c_void_p * len(weights))(*(w.data_ptr() for w in weights)),
                    bias=None if bias is None else bias.data_ptr(),
                    out=out.data_ptr(),
                    workspace=self.args.workspace,
                    weight_count=len(weights),
                    launches=min(_MOST_LAUNCHES, max(2, -(-_READ // by))),
                )
            )
        )
        return self.choice()

    def choice(self) -> Choice:
        """The kernel it takes."""
        found = c.LinearChoice()
        c.check(c.load().neo_cuda_linear_describe(self.handle, found))
        return Choice(
            found.candidates,
            found.chosen,
            found.algorithm,
            found.tile,
            found.stages,
            found.splits,
            found.cluster,
            found.workspace_bytes,
            found.us * 1e-6,
            found.first_us * 1e-6,
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Launch on torch's current stream; operands as the size says, which is not looked at again."""
        args = self.args
        args.x, args.weight, args.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        args.bias = None if bias is None else bias.data_ptr()
        status = self._launch(args, current_stream())
        if status:
            c.check(status)


def torch_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, add: bool = False) -> None:
    """``out = x @ weight.T (+ bias)`` by torch; ``add``: added to what is in ``out``."""
    if add:
        out.addmm_(x, weight.t())
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def tunable(weight: Tensor) -> bool:
    """Whether products with a weight [out, in] can be planned."""
    fits = weight.is_contiguous() and not any(n % 8 for n in weight.shape)
    return weight.is_cuda and weight.dtype in _TUNED and fits


Family = Sequence[tuple[Tensor, Tensor | None]]
"""Weights and biases of one product in all layers."""


class Products:
    """The products of a model, tuned as far as it pays.

    Args:
        families: of one shape each; timing takes a family's weights in turn.
        most_rows: of a tuned product; 0: torch multiplies everything. May be changed at any time: plans that
            were made for more rows are then not used.
        adding: indices of families whose products are added to what is there, with up to ``most_added`` rows.

    Attributes:
        search: how widely kernels are looked for, see ``neo_cuda.h``.
    """

    def __init__(
        self,
        families: Sequence[Family],
        most_rows: int = MOST_ROWS,
        adding: Sequence[int] = (),
        most_added: int = 0,
    ) -> None:
        self._families = families
        self._adding = frozenset(adding)
        self.most_rows, self.most_added = most_rows, most_added
        self.search = 1
        self.choices: dict[Size, Choice] = {}
        self._plans: dict[Size, Plan | None] = {}  # None: torch's
        self._tuned: set[int] = set()
        self._workspace: Tensor | None = None
        self.why_not = ""

    def prepare(self, rows: int) -> None:
        """Tune for so many rows, as padded, unless that was done; it then waits for the device.

        Not while a graph is captured, but before: products of other numbers of rows are torch's.
        """
        padded = padded_rows(rows)
        if not 0 < padded <= self.most_rows or self.why_not:
            return
        if padded not in self._tuned:
            self._tuned.add(padded)
            for size, family in self._sizes(padded):
                weights = [w for w, _ in family]
                if size not in self._plans and all(tunable(w) for w in weights):
                    self._tune(size, weights, family[0][1])
        for size, _ in self._sizes(rows):
            if size not in self._plans:
                self._between(size)

    def forget(self) -> None:
        """Tune anew what is asked for from now on. Not while captured steps that took plans may run again."""
        self._plans.clear()
        self._tuned.clear()
        self.choices.clear()

    def _sizes(self, rows: int) -> list[tuple[Size, Family]]:
        """Of every family's product; as padded, a step may have rows on either side of ``most_added``."""
        added = rows <= self.most_added
        return [
            (_size(rows, *family[0], added and i in self._adding), family)
            for i, family in enumerate(self._families)
        ]

    def _tune(self, size: Size, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        device = weights[0].device
        if self._workspace is None:
            self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        generator = torch.Generator(device).manual_seed(0)  # torch's own state stays as it is
        x = torch.randn((size.rows, size.in_), generator=generator, device=device, dtype=size.dtype)
        out = torch.zeros((size.rows, size.out), dtype=size.dtype, device=device)
        try:
            plan = Plan(size, self._workspace, search=self.search)
            self.choices[size] = plan.tune(x, weights, bias, out)
        except c.CudaKernelError as error:
            self.why_not = str(error)
            return
        self._plans[size] = plan

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, add: bool = False
    ) -> None:
        """``out = x @ weight.T (+ bias) (+ out)``; x [rows, in], weight [out, in], out [rows, out]."""
        plan = self._plan(_size(len(x), weight, bias, add))
        if plan is None or not (x.is_contiguous() and out.is_contiguous()):
            torch_product(x, weight, bias, out, add)
        else:
            plan(x, weight, bias, out)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x @ weight.T``, as `torch.nn.functional.linear` has it."""
        out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
        self(x, weight, None, out)
        return out

    def _plan(self, size: Size) -> Plan | None:
        if padded_rows(size.rows) > self.most_rows:  # it may have become less since
            return None
        return self._plans[size] if size in self._plans else self._between(size)

    def _between(self, size: Size) -> Plan | None:
        """The plan of a size that was not tuned itself, by the next that was padded to."""
        padded = padded_rows(size.rows)
        if padded not in self._tuned:
            return None  # not yet
        tuned = self._plans.get(size._replace(rows=padded))
        plan = None
        if tuned is not None and self._workspace is not None and padded != size.rows:
            try:
                plan = Plan(size, self._workspace, like=tuned)
            except c.CudaKernelError:
                plan = None  # that kernel does not do this number of rows
        self._plans[size] = plan
        return plan


def _size(rows: int, weight: Tensor, bias: Tensor | None, add: bool = False) -> Size:
    return Size(rows, weight.shape[0], weight.shape[1], weight.dtype, bias is not None, add)


class Tuned:
    """All products of a model, its layers' and its head's: made once, for one executor after another.

    Args:
        weights: of the model; norms are folded into them where that can be (``neo.runtime.cuda_fold``).
        most_rows: of a tuned product; 0: torch multiplies everything.

    Attributes:
        folded: whether steps of up to ``layers.most_added`` rows do without kernels for norms.
    """

    def __init__(self, weights: Weights, most_rows: int = MOST_ROWS) -> None:
        layers = weights.layers  # as `neo.runtime.cuda_rows` multiplies: it adds the bias of qkv elsewhere
        families: list[Family] = [
            [(w.qkv, None) for w in layers],
            [(w.out, w.out_bias) for w in layers],
            [(w.gate_up, w.gate_up_bias) for w in layers],
            [(w.down, w.down_bias) for w in layers],
        ]
        self.folded = foldable(weights)
        if self.folded:
            with torch.inference_mode():
                fold_norms(layers)
        self.layers = Products(families, most_rows, (1, 3), FOLDED_ROWS if self.folded else 0)
        self.head = Products([[(weights.head, None)]], most_rows)

    def prepare_all(self, rows: int) -> None:
        """Tune every size up to ``rows``: seconds at start, so that no step waits for it later."""
        for size in ROW_SIZES[1:]:
            if size <= padded_rows(rows):
                self.layers.prepare(size)
                self.head.prepare(size)
