"""What `recray doctor` inspects. It imports Ray, so it is not a unit test; judging the findings is."""

from importlib import metadata

from recray.cluster import environment


def test_every_part_of_the_environment_is_inspected() -> None:
    """Names and values only: whether this machine's driver, disks and shared memory suffice is not for a test to say."""
    found = {one.name: one for one in environment.inspect()}
    assert {"python", "recray", "torch", "ray", "pyarrow", "numpy", "faiss", "driver", "cpu", "all-reduce gloo"} <= set(
        found
    )
    for name in ("ray", "pyarrow", "numpy"):
        assert found[name].value == metadata.version(name)
    assert all(one.value for one in found.values())
    assert not found["all-reduce gloo"].problem  # needs nothing but this process and loopback
