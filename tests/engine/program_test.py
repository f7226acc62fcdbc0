"""What a program refuses before it is compiled."""

import pytest

from personmae_jax.config import Config
from personmae_jax.engine.program import assemble
from personmae_jax.errors import ConfigError
from personmae_jax.sharding import make_mesh


def test_more_steps_than_int32_counts_are_refused():
    with pytest.raises(ConfigError, match="makes 2147483648 steps, more than int32"):
        assemble(
            *(Config(), make_mesh()),
            num_steps=2**31,
            batch_size=1,
            init=lambda _=None: None,
            step=lambda state, _: (state, {}),
            batch={},
        )
