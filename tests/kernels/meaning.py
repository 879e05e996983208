"""What int8 and nf4 say of a product, as formulas: see petalite.kernels.int8 and native/digits.h."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.kernels.quantized import NF4_LEVELS, Int8Weight, Nf4Weight, column_order

_NF4_STEPS = 124.11  # levels are whole numbers of them
Product = tuple[Tensor, Tensor]  # (T, N), and the sum of its terms without their signs; float64


def _step(largest: Tensor) -> Tensor:
    return (largest * (1 / 127)).clamp(min=1e-30)


def _digits(x: Tensor, order: Tensor, n_fine: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outlier columns' first and second digits and the others' only ones, as what they stand for, in float64;
    made in float32, which decides what they are rounded to.
    """
    n_in = len(order)
    x = pad(x.float(), (0, n_in - x.shape[1]))[:, order]
    outliers, others = (
        pad(part, (0, -part.shape[1] % 64)).unflatten(1, (-1, 64)) for part in _cut(x, n_fine)
    )
    step = _step(outliers.abs().amax(2, keepdim=True))
    scaled = outliers * (1 / step)
    high = scaled.round()
    low = ((scaled - high) * 254).round()
    largest = others.abs().amax(2, keepdim=True)
    unit = _step(largest.amax(1, keepdim=True)) / 128
    factor = (largest / (unit * 127)).ceil().clamp(1, 128) * unit
    ones = (others * (1 / factor)).round().double() * factor
    fine = (high * step.double(), low * step.double() / 254)
    first, second = (part.flatten(1)[:, :n_fine] for part in fine)
    return first, second, ones.flatten(1)[:, : n_in - n_fine]


def _cut(x: Tensor, n_fine: int) -> tuple[Tensor, Tensor]:
    return x[:, :n_fine], x[:, n_fine:]


def int8_meaning(weight: Int8Weight, x: Tensor) -> Product:
    """Fine codes meet first digits alone."""
    n_fine = len(weight.fine_columns)
    order = column_order(weight.fine_columns, weight.shape[1])
    first, second, ones = _digits(x, order, n_fine)
    codes, fine = weight.codes[:, order].double(), weight.fine_codes.double()
    values = torch.cat((first + second, ones), dim=1)
    exact = values @ codes.t() + first / 254 @ fine.t()
    terms = values.abs() @ codes.abs().t() + first.abs() / 254 @ fine.abs().t()
    return exact * weight.scales, terms * weight.scales


def nf4_meaning(weight: Nf4Weight, x: Tensor) -> Product:
    """Levels are rounded to one digit."""
    n_fine = len(weight.fine_columns)
    order = column_order(weight.fine_columns, weight.shape[1])
    levels = (torch.tensor(NF4_LEVELS, dtype=torch.float64) * _NF4_STEPS).round() / _NF4_STEPS
    assert float((levels - torch.tensor(NF4_LEVELS)).abs().max()) < 0.0037
    codes = levels[weight.codes().int()] * weight.scales.double().repeat_interleave(64, dim=1)
    n_filled = n_fine + -n_fine % 64
    fine = codes[:, :n_fine] + codes[:, n_filled : n_filled + n_fine]
    dense = torch.cat((fine, codes[:, 2 * n_filled :]), dim=1)
    first, second, ones = _digits(x, order, n_fine)
    values = torch.cat((first + second, ones), dim=1)
    return values @ dense.t(), values.abs() @ dense.abs().t()
