"""Promises about memory that is used again: never while anybody can see it."""

import pickle

import numpy as np

from personmae_jax.data.buffer_pool import BufferPool


def test_memory_is_used_again_once_the_last_view_is_gone():
    memory = BufferPool(2, 6, 4)
    array = memory.take()
    address = array.ctypes.data
    view = array[1, 2:, ::2]
    holders = [array, view[1:], np.asarray(memoryview(view)), view.T.view(np.int8)]
    del array, view
    while holders:
        assert memory.take().ctypes.data != address
        holders.pop(0)
    assert address in {memory.take().ctypes.data, memory.take().ctypes.data}


def test_arrays_in_use_are_apart():
    memory = BufferPool(3, 5)
    arrays = [memory.take() for _ in range(4)]
    for value, array in enumerate(arrays):
        array[:] = value
    for value, array in enumerate(arrays):
        assert array.shape == (3, 5)
        assert array.dtype == np.uint8
        assert (array == value).all()


def test_a_pickle_brings_the_shape_and_no_memory():
    memory = BufferPool(1000, 1000)
    memory.take()
    assert len(pickle.dumps(memory)) < 1000
    assert pickle.loads(pickle.dumps(memory)).take().shape == (1000, 1000)
