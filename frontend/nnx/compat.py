"""The functions of ``nnx`` in graph mode and with updates of structure, whatever ``nnx.set_graph_mode`` says."""

import functools

from distaff.frontend.nnx import graph_functions, module, rng_splitting, spmd, traversal
from distaff.frontend.nnx.transforms import abstract, autodiff, compilation, control, loops, mapping
from distaff.frontend.nnx.transforms import custom_vjp as _custom_vjp
from distaff.frontend.nnx.transforms import shard_map as _shard_map

split = functools.partial(graph_functions.split, graph=True)
state = functools.partial(graph_functions.state, graph=True)
clone = functools.partial(graph_functions.clone, graph=True)
graphdef = functools.partial(graph_functions.graphdef, graph=True)
flatten = functools.partial(graph_functions.flatten, graph=True)
iter_graph = functools.partial(traversal.iter_graph, graph=True)
iter_children = functools.partial(traversal.iter_children, graph=True)
iter_modules = functools.partial(module.iter_modules, graph=True)
recursive_map = functools.partial(traversal.recursive_map, graph=True)
view = functools.partial(module.view, graph=True)
view_info = functools.partial(module.view_info, graph=True)
reseed = functools.partial(rng_splitting.reseed, graph=True)
backup_keys = functools.partial(rng_splitting.backup_keys, graph=True)
get_abstract_model = functools.partial(spmd.get_abstract_model, graph=True)

split_rngs = functools.partial(rng_splitting.split_rngs, graph=True, graph_updates=True)
fork_rngs = functools.partial(rng_splitting.fork_rngs, graph=True, graph_updates=True)
cached_partial = functools.partial(compilation.cached_partial, graph=True, graph_updates=True)
jit = functools.partial(compilation.jit, graph=True, graph_updates=True)
shard_map = functools.partial(_shard_map.shard_map, graph=True, graph_updates=True)
grad = functools.partial(autodiff.grad, graph=True, graph_updates=True)
value_and_grad = functools.partial(autodiff.value_and_grad, graph=True, graph_updates=True)
custom_vjp = functools.partial(_custom_vjp.custom_vjp, graph=True, graph_updates=True)
vjp = functools.partial(autodiff.vjp, graph=True, graph_updates=True)
jvp = functools.partial(autodiff.jvp, graph=True, graph_updates=True)
remat = functools.partial(autodiff.remat, graph=True, graph_updates=True)
vmap = functools.partial(mapping.vmap, graph=True, graph_updates=True)
pmap = functools.partial(mapping.pmap, graph=True, graph_updates=True)
scan = functools.partial(loops.scan, graph=True, graph_updates=True)
while_loop = functools.partial(loops.while_loop, graph=True, graph_updates=True)
fori_loop = functools.partial(loops.fori_loop, graph=True, graph_updates=True)
eval_shape = functools.partial(abstract.eval_shape, graph=True, graph_updates=True)
cond = functools.partial(control.cond, graph=True, graph_updates=True)
switch = functools.partial(control.switch, graph=True, graph_updates=True)
checkify = functools.partial(control.checkify, graph=True, graph_updates=True)
