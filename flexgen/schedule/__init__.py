"""The steps of a block, what each step needs, and the orders in which they run. No torch."""

from flexgen.schedule.orders import ORDERS, Order, Slots, order
from flexgen.schedule.steps import LOADS, STORES, Grid, Op, Step, all_steps, check, needs

__all__ = [
    "LOADS", "ORDERS", "STORES", "Grid", "Op", "Order", "Slots", "Step", "all_steps", "check", "needs", "order",
]  # fmt: skip
