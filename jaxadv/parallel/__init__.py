"""One step, many executors: a step is written once and runs on one device, on many, or on fake ones.

What lives here: the door `compile_step` (`steps.py`) and its executors (`executors.py`), the four functions through
which a step talks to the other shards (`axes.py`), meshes and how states lie on them (`meshes.py`), padding and
spreading of batches (`batches.py`), and the talk of several processes (`processes.py`). What does not: any training
step, data loading. A state is whole on every device unless a `Layout` (`fsdp`) splits it.

The rules that make the answer the same in every executor:

1. A step is `step(state, batch, *, axis_name=None) -> (state, metrics)`, pure, and sees the rows of one shard.
2. Losses are sums with counts; both go through `psum`, then are divided once. A mean of means is wrong as soon as masks
   make the shards unequal.
3. Parameters go through `varying` before every `jax.grad` with respect to them. Inside `jax.shard_map` the gradient
   with respect to a value that is the same on all shards is summed over the shards *inside* `jax.grad`, without an
   error: a later `psum` then counts it once for each device, and per-example clipping clips sums of gradients of
   strangers.
4. Noise and the optimizer come after the `psum` and use the same key on all shards, so that the state stays the same on
   all.
5. Randomness of an example comes from its `index`, never from its device.
6. Loop carries start from data (`zeros_like(x)`), not from constants (`zeros(shape)`).
"""

from jaxadv.parallel.axes import Axis as Axis
from jaxadv.parallel.axes import AxisName as AxisName
from jaxadv.parallel.axes import axis_index as axis_index
from jaxadv.parallel.axes import pmean_weighted as pmean_weighted
from jaxadv.parallel.axes import psum as psum
from jaxadv.parallel.axes import varying as varying
from jaxadv.parallel.batches import global_batch as global_batch
from jaxadv.parallel.batches import pad_batch as pad_batch
from jaxadv.parallel.executors import HOW as HOW
from jaxadv.parallel.executors import Step as Step
from jaxadv.parallel.meshes import Layout as Layout
from jaxadv.parallel.meshes import fsdp as fsdp
from jaxadv.parallel.meshes import local as local
from jaxadv.parallel.meshes import make_mesh as make_mesh
from jaxadv.parallel.meshes import replicate as replicate
from jaxadv.parallel.processes import agree as agree
from jaxadv.parallel.processes import distributed as distributed
from jaxadv.parallel.processes import exchange as exchange
from jaxadv.parallel.processes import preempted as preempted
from jaxadv.parallel.processes import whole as whole
from jaxadv.parallel.steps import Executor as Executor
from jaxadv.parallel.steps import compile_step as compile_step
