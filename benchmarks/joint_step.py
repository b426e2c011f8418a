"""Joint stage: training steps on Qwen3 with LoRA beside Hugging Face's Qwen3 with PEFT.

    python benchmarks/joint_step.py [--device gpu] [--quick]

(1) The same tokens: prompts of one length, adapters of rank 16 on all seven projections, dropout 0.1 before them, the
last token's state against the other prompts' targets, clipped AdamW on the adapters. (2) The stage: histories of 20
items, every position supervised. nqf reads a history once, with a branch for each position; PyTorch reads a prompt for
each position, sorted by length, padded per batch of 40. (3) The public UniRec as written: one supervised position per
prompt, padded to 512 tokens; ten items encoded by a 12-layer Item Q-Former in each step, its tokens injected one by one
by a Python loop; mean pooling. An example is one supervised position. Accelerators get 0.6B's true shape.
"""

from __future__ import annotations

from typing import Any

from common import Bench, alternate, begin, product, product_flops, ratio, target, torch_module, trace_table

RANK, ALPHA, DROPOUT, TEMPERATURE = 16, 32, 0.1, 0.07
INSTRUCTION, ITEM_TOKENS, USER_TOKENS = 12, 2, 2
LENGTH_AS_WRITTEN, SLOTS_AS_WRITTEN, NEGATIVES_AS_WRITTEN = 512, 10, 10


def shape(bench: Bench) -> dict[str, int]:
    """Sizes of the backbone and of a batch."""
    if bench.options.quick:
        sizes = dict(width=32, mlp=64, layers=1, heads=2, kv=1, head=16, rows=128)
        return sizes | dict(prompts=2, length=16, users=2, history=4, items=64, written=1)
    if bench.gpu:
        sizes = dict(width=1024, mlp=3072, layers=28, heads=16, kv=8, head=128, rows=151_669)
        return sizes | dict(prompts=64, length=128, users=32, history=20, items=10_000, written=16)
    sizes = dict(width=512, mlp=1536, layers=4, heads=8, kv=4, head=64, rows=8_192)
    return sizes | dict(prompts=16, length=64, users=8, history=20, items=10_000, written=2)


def backbone(sizes: dict[str, int], kind: str) -> Any:
    """nqf's configuration of the Qwen3; `products` rounds the operands of its products to bfloat16 and nothing else."""
    import jax.numpy as jnp
    from world import small_backbone

    from nqf.ops.products import bfloat16_dot_general

    return small_backbone(
        vocab_size=sizes["rows"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        head_dim=sizes["head"],
        lora_rank=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        dtype=jnp.bfloat16 if kind == "bfloat16" else jnp.float32,
        param_dtype=jnp.float32 if kind == "float32" else jnp.bfloat16,
        dot_general=bfloat16_dot_general if kind == "products" else None,
    )


def nqf_tokens(sizes: dict[str, int], kind: str, ids: Any) -> tuple[Any, float]:
    """A step on plain prompts, and its operations in products."""
    import jax
    import numpy as np

    from nqf.config import OptimConfig
    from nqf.models.qwen3 import Qwen3
    from nqf.ops.losses import info_nce, unit
    from nqf.training.loop import make_state, make_train_step
    from nqf.training.optimizer import make_optimizer

    model = Qwen3(backbone(sizes, kind))
    made = jax.jit(model.init)(jax.random.key(0), ids[:1])
    targets = np.random.default_rng(1).standard_normal((len(ids), sizes["width"]), np.float32)

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, dict]:
        variables = {"params": frozen, "lora": params["lora"]}
        last = np.full((1, 1), batch.shape[1] - 1)
        pooled = model.apply(variables, batch, read_at=last, deterministic=False, rngs={"dropout": key})[:, 0]
        scores = unit(pooled) @ unit(targets).T / TEMPERATURE
        return info_nce(scores, np.arange(len(ids))), {}

    optimizer = make_optimizer(OptimConfig(), 1_000)
    step = make_train_step(loss, optimizer, seed=0, skip=0)
    state, frozen, batch = make_state({"lora": made["lora"]}, optimizer), made["params"], jax.device_put(ids)
    flops = product_flops(step, state, frozen, batch)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)

    return run, flops


def peft_model(torch: Any, sizes: dict[str, int], device: str, dtype: Any) -> Any:
    """Hugging Face's Qwen3 with PEFT's adapters, in training."""
    import peft
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=sizes["rows"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        head_dim=sizes["head"],
        use_cache=False,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=names
    )
    model = peft.get_peft_model(transformers.Qwen3Model(config).to(dtype), lora).to(device)
    # Adapters in float32, as peft keeps them beside a 16-bit base and nqf everywhere.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


class Peer:
    """The PyTorch sides: one model, one optimizer, several kinds of batches.

    Attributes:
      bench: The benchmark.
      sizes: Sizes of `shape`.
      autocast: Type of autocast, or None.
    """

    def __init__(self, bench: Bench, sizes: dict[str, int], low: bool):
        self.torch = torch = torch_module(bench)
        self.device, self.sizes, self.low = "cuda" if bench.gpu else "cpu", sizes, low
        self.model = peft_model(torch, sizes, self.device, torch.bfloat16 if low else torch.float32)
        self.project = torch.nn.Linear(64, sizes["width"]).to(self.device)
        self.user = torch.nn.Parameter(0.02 * torch.randn(USER_TOKENS, sizes["width"], device=self.device))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = [*trained, *self.project.parameters(), self.user]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-4, fused=True)

    def update(self, losses: Any) -> None:
        """Gradients of some losses, one after the other, and one step of the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        for make in losses:
            with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.low):
                loss = make()
            loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def contrast(self, pooled: Any, targets: Any) -> Any:
        """InfoNCE of pooled states against the targets of the batch."""
        normalize = self.torch.nn.functional.normalize
        scores = normalize(pooled.float(), dim=-1) @ normalize(targets, dim=-1).T / TEMPERATURE
        return self.torch.nn.functional.cross_entropy(scores, self.torch.arange(len(scores), device=self.device))

    def tokens(self, ids: Any) -> Any:
        """A step on plain prompts."""
        torch = self.torch
        ids = torch.from_numpy(ids).long().to(self.device)
        targets = torch.randn(len(ids), self.sizes["width"], device=self.device)
        return lambda: self.update([lambda: self.contrast(self.model(input_ids=ids).last_hidden_state[:, -1], targets)])

    def stage(self) -> Any:
        """A step that supervises every position of the histories, a prompt for each."""
        torch, sizes = self.torch, self.sizes
        ends = torch.arange(1, sizes["history"] + 1).repeat_interleave(sizes["users"])
        batches = []
        for held in ends.split(40):
            length = INSTRUCTION + ITEM_TOKENS * int(held.max()) + USER_TOKENS + 1
            last = INSTRUCTION + ITEM_TOKENS * held + USER_TOKENS
            at = torch.arange(length)[None]
            is_item = (at >= INSTRUCTION) & (at < (last - USER_TOKENS)[:, None])
            is_user = (at >= (last - USER_TOKENS)[:, None]) & (at < last[:, None])
            batch = [at % 8 + 0 * last[:, None], (at <= last[:, None]).long(), last, is_item, is_user]
            items = torch.randn(int(is_item.sum()), 64)
            batches.append([x.to(self.device) for x in (*batch, items, torch.randn(len(held), sizes["width"]))])

        def loss(ids: Any, mask: Any, last: Any, is_item: Any, is_user: Any, items: Any, targets: Any) -> Any:
            embeds = self.model.get_input_embeddings()(ids).float()
            embeds = embeds.masked_scatter(is_item[..., None], self.project(items).float())
            embeds = embeds.masked_scatter(is_user[..., None], self.user.repeat(len(ids), 1))
            hidden = self.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
            return self.contrast(hidden[torch.arange(len(ids)), last], targets) * len(ids) / len(ends)

        return lambda: self.update([lambda batch=batch: loss(*batch) for batch in batches])

    def as_written(self) -> Any:
        """The reference's step, one prompt for each supervised position."""
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        torch, sizes = self.torch, self.sizes
        width, batch = sizes["width"], sizes["written"]
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=1 if width == 32 else 12,
            num_attention_heads=width // 32 if width < 1024 else 16,
            intermediate_size=4 * width,
            encoder_hidden_size=width,
            cross_attention_frequency=2,
            hidden_dropout_prob=0.2,
        )
        qformer = Blip2QFormerModel(config).to(self.device).train()
        queries = torch.nn.Parameter(torch.randn(1, ITEM_TOKENS, width, device=self.device))
        self.trained += [*qformer.parameters(), queries]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        fields = torch.randn(batch * SLOTS_AS_WRITTEN, 14, width, device=self.device)
        ids = torch.randint(64, sizes["rows"], (batch, LENGTH_AS_WRITTEN), device=self.device)
        filled = torch.arange(LENGTH_AS_WRITTEN, device=self.device) < LENGTH_AS_WRITTEN // 2
        mask = filled.long().expand(batch, -1)
        # Placeholder k, of 20, is row k of the vocabulary, and stands at place 10 k.
        for token in range(SLOTS_AS_WRITTEN * ITEM_TOKENS):
            ids[:, 10 * token] = token
        positives = torch.randn(batch, width, device=self.device)
        negatives = torch.randn(batch, NEGATIVES_AS_WRITTEN, width, device=self.device)

        def loss() -> Any:
            embeds = self.model.get_input_embeddings()(ids).float()
            made = qformer(query_embeds=queries.expand(len(fields), -1, -1), encoder_hidden_states=fields)
            tokens = made.last_hidden_state.view(batch, -1, width).float()
            for token in range(tokens.shape[1]):
                for row in range(batch):
                    places = (ids[row] == token).nonzero(as_tuple=True)[0]
                    if len(places) > 0:
                        embeds[row, places] = tokens[row, token]
            output = self.model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
            users = torch.nn.functional.normalize(output.hidden_states[-1].float().mean(dim=1), dim=-1)
            losses = []
            for row in range(batch):
                candidates = torch.nn.functional.normalize(torch.cat([positives[row, None], negatives[row]]), dim=-1)
                scores = candidates @ users[row] / TEMPERATURE
                losses.append(torch.logsumexp(scores, dim=0) - scores[0])
            return torch.stack(losses).mean()

        return lambda: self.update([loss])


def nqf_stage(bench: Bench, sizes: dict[str, int], kind: str) -> tuple[Any, float, Any]:
    """nqf's own joint step on as many histories, its operations, and its batch."""
    import jax
    import numpy as np
    from world import configuration, make_world, training

    world = make_world(
        items=sizes["items"], lengths=np.full(sizes["users"], sizes["history"] + 1), seed=bench.options.seed
    )
    config = configuration(
        batch=sizes["users"], history=sizes["history"], positions=sizes["history"], negatives="in-batch"
    )
    batch = world.data(config, "joint").batches[0]
    made = training(world, config, "joint", backbone=backbone(sizes, kind), instruction=INSTRUCTION)
    supervised = int((batch.supervised >= 0).sum())
    assert supervised == sizes["users"] * sizes["history"]
    batch = jax.device_put(batch)
    return lambda: made.step(batch), product_flops(made.compiled, made.state, made.frozen, batch), made


def main() -> None:
    bench = begin(__file__, __doc__)
    import numpy as np

    sizes = shape(bench)
    ids = np.random.default_rng(bench.options.seed).integers(0, sizes["rows"], (sizes["prompts"], sizes["length"]))
    ids = ids.astype(np.int32)
    # What the operands of the large products are rounded to, here and there.
    low = "bfloat16" if bench.gpu else "products"
    kinds = (low,) if bench.gpu else ("float32", low)
    rows, targets, limits, sides, flops = [], [], {}, {}, {}
    supervised = sizes["users"] * sizes["history"]
    examples = {"tokens": sizes["prompts"], "stage": supervised, "written": sizes["written"]}
    for kind in kinds:
        name = "float32" if kind == "float32" else "bfloat16"
        peer = Peer(bench, sizes, low=name == "bfloat16")
        written = Peer(bench, sizes, low=name == "bfloat16").as_written()
        limit = product(name)
        same, flops["nqf tokens"] = nqf_tokens(sizes, kind, ids)
        stage, flops["nqf stage"], made = nqf_stage(bench, sizes, kind)
        sides = {"matmul": limit.run, "nqf tokens": same, "torch tokens": peer.tokens(ids), "nqf stage": stage}
        sides |= {"torch stage": peer.stage(), "torch written": written}
        timings = alternate(sides, bench.options.repeats, least=0 if bench.options.quick else 0.5)
        rate = limit.flops / timings["matmul"].median
        limits[f"matrix product {name}, FLOP/s"] = rate
        flops["torch tokens"] = flops["nqf tokens"]
        labels = {
            "nqf tokens": "same tokens, nqf",
            "torch tokens": "same tokens, transformers + PEFT",
            "nqf stage": "every position of a history, nqf",
            "torch stage": "every position of a history, transformers + PEFT",
            "torch written": "the reference as written",
        }
        for side, label in labels.items():
            timing, what = timings[side], side.split()[1]
            done = flops[side] / timing.median if side in flops else None
            rows.append(
                [
                    label,
                    name,
                    timing.median * 1e3,
                    timing.spread,
                    examples[what] / timing.median,
                    done / 1e9 if done else "",
                    done / rate if done else "",
                ]
            )
        scale = {what: examples["stage"] / examples[what] for what in examples}
        targets += [
            target(
                f"nqf over transformers + PEFT, same tokens, {name}",
                ratio(timings["torch tokens"], timings["nqf tokens"]),
                "≥",
                1.5 if bench.gpu else 2.0,
                "both spend their time in the same products of the frozen projections, which neither can leave out",
            ),
            target(
                f"nqf over transformers + PEFT, examples/s of the stage, {name}",
                ratio(timings["torch stage"], timings["nqf stage"]),
                "≥",
                1.5 if bench.gpu else 2.0,
                "the branches of a prompt are short, so that small operations weigh more",
            ),
            target(
                f"nqf over the reference as written, examples/s, {name}",
                ratio(timings["torch written"], timings["nqf stage"]) * scale["written"],
                "≥",
                20.0,
                "the reference's prompt is 512 tokens long whatever the history",
            ),
        ]
        bench.say(f"{name} done")
        del peer, written, sides
    import jax

    trace = trace_table(
        "Operations of nqf's step on histories that take longest", lambda: jax.block_until_ready(stage())
    )
    bench.finish(
        [
            {
                "title": "Training step of the joint stage",
                "columns": ["what", "type", "ms", "max/min", "examples/s", "GFLOP/s", "of the matmul rate"],
                "rows": rows,
            },
            trace,
        ],
        targets=targets,
        limits=limits,
        notes=[
            f"Qwen3 of width {sizes['width']}, {sizes['layers']} layers, feed-forward {sizes['mlp']}, {sizes['heads']} "
            f"and {sizes['kv']} heads of {sizes['head']}; {sizes['prompts']} prompts of {sizes['length']} tokens; "
            f"{sizes['users']} histories of {sizes['history']} items.",
            "bfloat16 is, on a CPU, products of operands in bfloat16 with sums in float32 beside PyTorch's autocast, "
            "which no configuration key of training selects; on an accelerator it is the whole backbone's type.",
        ],
        details={"sizes": sizes, "flops": flops, "trained": len(jax.tree.leaves(made.state.params))},
    )


if __name__ == "__main__":
    main()
