"""Models that several commands are tried on, made once a module."""

import pytest
import vlm_pairs
from vlm_pairs import Pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A vision-language model, a text model that fits its tower, and the base of both. Read only."""
    return vlm_pairs.make_pair(tmp_path_factory.mktemp("pair"), "llava_next")
