"""Copy orders at smoke size: the comparison runs, its copies are right, and the default order is worth being it."""

import orders
import pytest

from fastcbw.cbw.policies import ORDER_DEFAULT


@pytest.mark.parametrize("pattern", orders.PATTERNS)
def test_the_default_order_holds_less_than_sequential(pattern, full, note):
    length = orders.SIZES["full" if full else "smoke"]
    (peak, copies, right), (base_peak, base_copies, base_right) = (orders.run(order, pattern, length, length // 128)
                                                                    for order in (ORDER_DEFAULT, "sequential"))
    note(f"{ORDER_DEFAULT} beside sequential, {pattern} writes: peak {peak / base_peak:.2f}, guest copies {copies / base_copies:.2f}")
    assert right and base_right
    assert peak < 0.7 * base_peak and copies < 1.2 * base_copies
