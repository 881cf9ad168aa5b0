#!/usr/bin/env python3
"""The picture of the schedules in algorithm.md, drawn from the functions that training uses.

python docs/make_schedules.py        # needs the extra hvd_lars[plot]
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hvd_lars.train.schedules import constant_warmup, gradual_warmup, multistep, poly

PICTURE = Path(__file__).parent / "pictures/schedules.png"
TOTAL, WARMUP, TARGET = 900, 50, 16.0


def main() -> None:
    """Two panels: what poly does after a ramp, and the two warmups."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    steps = range(TOTAL)
    for power in (1.0, 2.0):
        main_rule = poly(TARGET, TOTAL, power, start_step=WARMUP)
        left.plot([gradual_warmup(main_rule, WARMUP, TARGET)(t) for t in steps],
                  label=f"p = {power:g}, post_warmup")  # fmt: skip
    from_zero = gradual_warmup(poly(TARGET, TOTAL, 2.0), WARMUP, TARGET)
    left.plot([from_zero(t) for t in steps], "--", label="p = 2, total: drops as the ramp ends")
    left.set_title("poly: γ(t) = γ·(1 − t/T)ᵖ after a gradual warmup")
    main_rule = multistep(TARGET, [300, 600, 800])
    right.plot([gradual_warmup(main_rule, WARMUP, TARGET)(t) for t in steps], label="gradual")
    right.plot([constant_warmup(main_rule, 2 * WARMUP, TARGET / 8)(t) for t in steps],
               label="constant, then a jump to γ")  # fmt: skip
    right.set_title("warmups before multistep, ÷10 at epochs 30, 60, 80 of 90")
    for panel in (left, right):
        panel.set_xlabel("step")
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("learning rate γ")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
