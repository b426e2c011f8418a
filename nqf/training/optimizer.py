"""AdamW with warm-up, cosine decay and clipping, labeled leaf by leaf."""

from __future__ import annotations

from typing import Any

import jax
import optax

from nqf.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int, *, peak: float) -> optax.Schedule:
    """Linear warm-up from zero, then cosine decay to `final_share` of the peak at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=max(1, min(round(config.warmup_share * steps), steps - 1)),
        decay_steps=max(2, steps),
        end_value=peak * config.final_share,
    )


def labels(params: Any) -> Any:
    """Labels every leaf `adapter` (LoRA), `decay` (dense kernels) or `plain` (norms, biases, tables)."""

    def label(path: tuple, _: Any) -> str:
        names = [part.key for part in path]
        if names[-1] in ("lora_a", "lora_b"):
            return "adapter"
        return "decay" if names[-1] == "kernel" else "plain"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a stage of `steps` steps.

    Only trainable leaves may be passed to it: a norm over frozen gradients would keep them alive in the compiled
    step and clip by the wrong norm.
    """
    main = learning_rate(config, steps, peak=config.learning_rate)
    adapter = learning_rate(config, steps, peak=config.adapter_learning_rate)
    # b2 0.98: rows of item tables get a gradient only when their item occurs, and forget it too slowly at 0.999.
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(
            {
                "decay": optax.adamw(main, b2=0.98, weight_decay=config.weight_decay),
                "plain": optax.adam(main, b2=0.98),
                "adapter": optax.adam(adapter, b2=0.98),
            },
            labels,
        ),
    )
