"""How long spinning pays before whoever waits goes to sleep: a worker or a driver."""

from kernels.jit import kernel

SPIN_MIN_NS = 2_000  # about one wake-up spared


@kernel
def adapt_spin(waiting, slept):
    """Spin longer when a longer spin would have met the work, shorter when it came much later.

    waiting: a record with spin_ns and spin_max_ns. slept: nanoseconds asleep; 0: there was work already.
    """
    if slept == 0:
        return
    if slept < waiting.spin_max_ns:
        waiting.spin_ns = min(waiting.spin_max_ns, max(waiting.spin_ns * 2, 2 * slept))
    else:
        waiting.spin_ns = max(min(SPIN_MIN_NS, waiting.spin_max_ns), waiting.spin_ns // 2)
