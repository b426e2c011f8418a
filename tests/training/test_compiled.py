"""What is read of programs: exchanges between devices, and operations of products."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from nqf.ops.attention import _splash
from nqf.ops.pins import on_examples_and_heads
from nqf.training.compiled import collectives, product_flops
from nqf.training.mesh import AXES

# As XLA writes them: a loop of 28 rounds around an exchange, two without a note of their rounds, an exchange that
# begins and ends apart, groups in three notations.
PROGRAM = """HloModule jit_f

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %all-gather.1 = bf16[1024,3072]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%a, %b)
}

%fused (q: f32[4]) -> f32[4] {
  ROOT %all-reduce.3 = f32[4]{0} all-reduce(%q), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%counted (q: (s32[], f32[8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(7)
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter.1, %limit.1), direction=LT
}

%twice (r: (s32[], f32[8])) -> (s32[], f32[8]) {
  %two = s32[]{:T(128)} constant(2)
  %r = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %counter.2 = s32[]{:T(128)} get-tuple-element(%r), index=0
  %next.1 = s32[]{:T(128)} add(%counter.2, %two)
  %all-to-all.1 = f32[8]{0:T(128)} all-to-all(%v), replica_groups={{0,1}}
  %piece.2 = f32[8]{0:T(128)} fusion(%v), kind=kCustom, calls=%later
  ROOT %tuple.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next.1, /*index=1*/%all-to-all.1)
}

%first (v: f32[4]) -> f32[12] {
  ROOT %all-gather.8 = f32[12]{0} all-gather(%v), channel_id=8, replica_groups=[1,3]<=[3], dimensions={0}
}

%later (v: f32[4]) -> f32[12] {
  ROOT %all-gather.9 = f32[12]{0} all-gather(%v), channel_id=8, replica_groups=[1,3]<=[3], dimensions={0}
}

%until_done (s: (pred[], f32[8])) -> pred[] {
  %s = (pred[], f32[8]{0}) parameter(0)
  ROOT %done = pred[] get-tuple-element(%s), index=0
}

%endless (u: (pred[], f32[8])) -> (pred[], f32[8]) {
  %collective-permute.1 = f32[8]{0} collective-permute(%w), source_target_pairs={{0,1}}
  ROOT %tuple.3 = (pred[], f32[8]{0}) tuple(%d, %collective-permute.1)
}

%elsewhere (q: (s32[], f32[8])) -> pred[] {
  %limit.2 = s32[]{:T(128)} constant(5)
  %flag.1 = s32[]{:T(128)} copy(%o)
  ROOT %lt.2 = pred[]{:T(512)} compare(%flag.1, %limit.2), direction=LT
}

%unclear (r: (s32[], f32[8])) -> (s32[], f32[8]) {
  %one = s32[]{:T(128)} constant(1)
  %other = s32[]{:T(128)} add(%u, %one)
  %all-reduce.4 = f32[8]{0:T(128)} all-reduce(%v), replica_groups={{0,1}}, to_apply=%add
  ROOT %tuple.4 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%t, %all-reduce.4)
}

ENTRY %main.2_spmd (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"28"}}
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%counted, body=%twice
  %while.3 = (pred[], f32[8]{0}) while(%t), condition=%until_done, body=%endless
  %while.4 = (s32[], f32[8]{0}) while(%t), condition=%elsewhere, body=%unclear
  %ag = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%y), replica_groups=[1,8]<=[8], dimensions={0}
  %agd = f32[16,4]{1,0} all-gather-done(%ag)
  %rs = f32[3]{0} reduce-scatter(%z), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, to_apply=%add
  %piece.1 = f32[12]{0} fusion(%v), kind=kCustom, calls=%first
  %f = f32[4]{0} fusion(%g), kind=kCustom, calls=%fused
  ROOT %r = f32[8]{0} copy(%o)
}
"""


def test_exchanges_are_counted_as_often_as_they_run() -> None:
    exchanges = collectives(PROGRAM)
    # Two fusions have a piece each of one exchange of 12 numbers among three devices.
    assert [one.sent for one in exchanges if one.devices == 3] == [48 * 2 / 3]
    found = {one.kind + str(one.loops): one for one in exchanges if one.devices != 3}
    outside = {"all-gather0", "reduce-scatter0", "all-reduce0"}
    assert set(found) == {"all-gather1", "all-to-all1", "collective-permute1", "all-reduce1"} | outside
    layer = found["all-gather1"]
    assert (layer.bytes, layer.devices, layer.times) == (1024 * 3072 * 2, 8, 28)
    assert layer.sent == 28 * layer.bytes * 7 / 8
    # libtpu leaves no note: seven rounds, two at a time. Of the last two loops nobody knows, which is said.
    assert found["all-to-all1"].times == 4
    assert math.isnan(found["collective-permute1"].sent) and math.isnan(found["all-reduce1"].sent)
    # The start returns its operand, too.
    assert found["all-gather0"].bytes == 16 * 4 * 4
    assert (found["reduce-scatter0"].devices, found["reduce-scatter0"].sent) == (4, 3 * 12)
    assert (found["all-reduce0"].devices, found["all-reduce0"].sent) == (2, 16)


@pytest.mark.parametrize("remat", [False, True])
def test_products_in_loops_are_counted_as_often_as_they_run(remat: bool) -> None:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0].sum()

    w, x = jnp.ones((5, 16, 16)), jnp.ones((3, 16))
    once = 2.0 * 3 * 16 * 16
    assert product_flops(jax.make_jaxpr(loss)(w, x).jaxpr) == 5 * once
    # Two products of a gradient, and with recomputation the forward one again.
    assert product_flops(jax.make_jaxpr(jax.grad(loss))(w, x).jaxpr) == (20 if remat else 15) * once


def test_products_of_a_kernel_are_those_of_all_its_pieces() -> None:
    q, k = jnp.ones((2, 600, 4, 128)), jnp.ones((2, 640, 2, 128))
    # 600 queries are filled up to 640. Logits and what they read, for each query head, skipped pieces among them.
    wanted = 2 * 4 * 2 * 2.0 * 640 * 640 * 128
    causal = jax.make_jaxpr(functools.partial(_splash, interpret=True))
    assert product_flops(causal(q, k, k).jaxpr) == wanted
    # On a mesh each device has a part of it.
    mesh = jax.sharding.AbstractMesh((2, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh):
        split = jax.make_jaxpr(functools.partial(on_examples_and_heads, functools.partial(_splash, interpret=True)))
        assert product_flops(split(q, k, k).jaxpr) == wanted
