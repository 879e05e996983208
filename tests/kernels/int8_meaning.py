"""What int8 says of a product, as a formula: see petalite.kernels.int8."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from petalite.kernels.quantized import Int8Weight, column_order


def _step(largest: Tensor) -> Tensor:
    return (largest * (1 / 127)).clamp(min=1e-30)


def int8_meaning(weight: Int8Weight, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product (T, N), and the sum of its terms without their signs. Digits are made in float32, which
    decides what they are rounded to; sums are float64's.
    """
    n_fine, n_in = len(weight.fine_columns), weight.shape[1]
    order = column_order(weight.fine_columns, n_in)
    codes, x = weight.codes[:, order].double(), pad(x.float(), (0, n_in - x.shape[1]))[:, order]

    outliers = x[:, :n_fine]
    step = _step(pad(outliers, (0, 1)).abs().amax(1, keepdim=True))
    scaled = outliers * (1 / step)
    high = scaled.round()
    low = ((scaled - high) * 254).round()

    others = pad(x[:, n_fine:], (0, (n_fine - n_in) % 64)).unflatten(1, (-1, 64))
    largest = others.abs().amax(2, keepdim=True)
    unit = _step(largest.amax(1, keepdim=True)) / 128
    factor = (largest / (unit * 127)).ceil().clamp(1, 128) * unit
    ones = (others * (1 / factor)).round().double() * factor

    fine_high, fine_low = high * step.double(), low * step.double() / 254
    values = torch.cat((fine_high + fine_low, ones.flatten(1)[:, : n_in - n_fine]), dim=1)
    fine = weight.fine_codes.double()
    exact = values @ codes.t() + fine_high / 254 @ fine.t()
    terms = values.abs() @ codes.abs().t() + fine_high.abs() / 254 @ fine.abs().t()
    return exact * weight.scales, terms * weight.scales
