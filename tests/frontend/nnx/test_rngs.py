"""Random streams: the same keys and counts as Flax's for the same seeds and the same calls."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.frontend import nnx

flax_nnx = pytest.importorskip("flax.nnx")


def words(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def streams(rngs):
    return {name: (words(s.key[...]), s.count[...].tolist(), s.tag) for name, s in rngs.items()}


NAMES = ["default", "params", "dropout"]
names = st.sampled_from(NAMES)
shapes = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
# One step of a program: what to call, and its argument.
steps = st.one_of(
    st.tuples(st.just("draw"), names),
    st.tuples(st.just("normal"), names),
    st.tuples(st.just("initialize"), names),
    st.tuples(st.sampled_from(["fork", "restore_fork", "reseed"]), names),
    st.tuples(st.sampled_from(["split", "broadcast", "restore_split"]), shapes),
    st.tuples(st.sampled_from(["split", "broadcast"]), st.dictionaries(names, shapes, min_size=1)),
    st.tuples(st.just("split_only"), names),
)


def run(nnx, seeds, program):
    rngs, seen = nnx.Rngs(**seeds), []
    for call, arg in program:
        if call == "draw":
            seen.append(words(rngs[arg]()))
        elif call == "normal":
            seen.append(np.asarray(rngs[arg].normal((2,))).tolist())
        elif call == "initialize":
            seen.append(np.asarray(rngs[arg].lecun_normal()((2, 3))).tolist())
        elif call == "fork":
            seen.append(streams(rngs.fork()))
            rngs = rngs.fork()
        elif call in ("split", "broadcast"):
            seen.append(streams(getattr(rngs, call)(arg)))
        elif call == "restore_split":
            with nnx.split_rngs(rngs, splits=arg):
                seen.append(streams(rngs))
        elif call == "split_only":
            seen.append(streams(nnx.split_rngs(rngs, splits=2, only=arg, graph_updates=False)))
        elif call == "restore_fork":
            with nnx.fork_rngs(rngs):
                seen.append(words(rngs[arg]()))
        elif call == "reseed":
            nnx.reseed(rngs, **{arg: 17})
        seen.append(streams(rngs))
    return seen


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(names, st.integers(0, 100)), st.integers(0, 9), st.lists(steps, max_size=5))
def test_drawn_programs_give_the_keys_of_flax(seeds, default, program):
    seeds = {"default": default, **seeds}
    assert run(nnx, seeds, program) == run(flax_nnx, seeds, program)


@pytest.mark.parametrize(
    "make",
    [
        lambda nnx: nnx.Rngs(0, params=1),
        lambda nnx: nnx.Rngs({"params": 3, "noise": jax.random.key(4)}, noise=5),
        lambda nnx: nnx.Rngs(jax.random.PRNGKey(3)),
        lambda nnx: nnx.Rngs(params=nnx.Rngs(8).default),
        lambda nnx: nnx.Rngs(np.int32(5)),
        lambda nnx: nnx.Rngs(jax.random.key(2, impl="rbg")),
    ],
)
def test_streams_start_as_in_flax(make):
    try:
        other = streams(make(flax_nnx))
    except (TypeError, ValueError):  # an integer of NumPy, which Flax takes for no seed
        other = streams(flax_nnx.Rngs(5))
    assert streams(make(nnx)) == other


def test_samplers_and_initializers_are_those_of_flax():
    for name in dir(flax_nnx.RngStream):
        method = getattr(flax_nnx.RngStream, name)
        if inspect.isfunction(method) and not name.startswith("_"):
            assert callable(getattr(nnx.RngStream, name)) and callable(getattr(nnx.Rngs, name)), name


def test_what_there_is_no_stream_for():
    rngs = nnx.Rngs(params=0)
    with pytest.raises(AttributeError, match=r"'dropout'.*\['params'\]"):
        rngs.dropout()
    with pytest.raises(KeyError, match="dropout"):
        rngs["dropout"]
    with pytest.raises(AttributeError, match="default"):
        rngs()
    with pytest.raises(ValueError, match=r"jax\.random\.key"):
        nnx.Rngs("seed")
    assert "params" in rngs and "dropout" not in rngs and list(rngs) == ["params"] and len(rngs) == 1


def test_a_divided_stream_says_where_to_draw():
    with pytest.raises(ValueError, match=r"'params' holds keys of shape \(3,\)"):
        nnx.Rngs(params=0).split(3).params()


def test_streams_are_found_anywhere_and_put_back():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rngs = nnx.data([rngs, rngs])
            self.own = rngs.dropout.fork()

    model = Model(nnx.Rngs(0, dropout=1))
    before = streams(model.rngs[0]), words(model.own.key[...])
    with pytest.raises(RuntimeError), nnx.split_rngs(model, splits=4, only="dropout") as backups:
        assert len(list(backups)) == 2
        assert model.rngs[1].dropout.key.shape == model.own.count.shape == (4,)
        raise RuntimeError
    after = streams(model.rngs[0]), words(model.own.key[...])
    assert before[1] == after[1] and before[0]["dropout"][0] == after[0]["dropout"][0]


def test_decorators_divide_the_arguments_for_the_call():
    @nnx.split_rngs(splits=3, only="params")
    def inside(rngs, *, more):
        return rngs.params.key.shape, more["a"].params.key.shape, rngs.noise.key.shape

    @nnx.with_rngs(split={"params": 2}, fork="noise", graph_updates=False)
    def copied(rngs):
        return rngs.params.key.shape, words(rngs.noise.key[...])

    rngs, more = nnx.Rngs(params=0, noise=1), {"a": nnx.Rngs(params=2)}
    assert inside(rngs, more=more) == ((3,), (3,), ())
    assert rngs.params.key.shape == more["a"].params.key.shape == ()
    noise = nnx.Rngs(noise=1).noise()
    assert copied(rngs) == ((2,), words(noise))
    with pytest.raises(NotImplementedError, match="graph_updates=False"):
        nnx.with_rngs(rngs, split=2)


def test_squeeze():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="squeeze"):
        nnx.split_rngs(rngs, splits=2, squeeze=True)
    nnx.split_rngs(rngs, splits=1, squeeze=True)
    assert words(rngs()) == words(
        jax.random.fold_in(jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 1)[0], 0)
    )


def test_reseed_policies():
    rngs = nnx.Rngs(params=0, noise=1).split({"params": 3})
    before = streams(rngs)
    with pytest.raises(ValueError, match=r"\(3,\).*match_shape"):
        nnx.reseed(rngs, noise=4, params=4)
    assert streams(rngs) == before
    nnx.reseed(rngs, policy="match_shape", params=4)
    other = flax_nnx.Rngs(params=0, noise=1).split({"params": 3})
    flax_nnx.reseed(other, policy="match_shape", params=4)
    assert streams(rngs) == streams(other)
    nnx.reseed(rngs, policy=lambda path, key, shape: jnp.broadcast_to(key, shape), params=4)
    assert rngs.params.key[...][0] == rngs.params.key[...][2]
    with pytest.raises(ValueError, match="policy"):
        nnx.reseed(rngs, policy="none", params=1)


def test_drawing_under_a_jit_that_does_not_know_the_stream():
    rngs = nnx.Rngs(0)
    with pytest.raises(Exception, match=r"(?i)trace"):
        jax.jit(lambda: rngs())()
    assert rngs.default.count[...] == 0
